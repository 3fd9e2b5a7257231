"""`blink predict`: from a run's file and images to lines."""

import csv
import io
import json

import pytest
import torch
from PIL import Image

import blink
from blink.__main__ import main


@pytest.fixture
def trained(image_folder, tmp_path):
    """(the file of a run, the folder of its test images)"""
    blink.train(data=str(image_folder), steps=2, batch_size=8, validate=0, device="cpu", out=str(tmp_path / "out"))
    return str(tmp_path / "out" / "blink-seed0.safetensors"), image_folder / "test"


def predicted(capsys, *arguments) -> tuple[int, str, str]:
    code = main(["predict", *map(str, arguments), "--device", "cpu"])
    return (code, *capsys.readouterr())


def test_files_and_folders_in_every_form(trained, capsys):
    model, folder = trained
    files = sorted(folder.rglob("*.png"))
    code, out, err = predicted(capsys, model, files[0], folder, "--json", "--top", "99")
    rows = [json.loads(line) for line in out.splitlines()]
    assert (code, err) == (0, "") and [row["image"] for row in rows] == [str(files[0]), *map(str, files)]
    want = blink.load(model, device="cpu").predict(files)
    for row, probabilities in zip(rows[1:], want):
        found = {p["class"]: p["probability"] for p in row["predictions"]}
        assert found == pytest.approx(dict(zip(blink.load(model).classes, probabilities.tolist())), abs=2e-6)
        assert list(found.values()) == sorted(found.values(), reverse=True)
    code, out, _ = predicted(capsys, model, folder, "--csv")
    header, *lines = csv.reader(io.StringIO(out))
    assert header == ["image", "class_1", "p_1", "class_2", "p_2", "class_3", "p_3"] and len(lines) == len(files)
    best = rows[1]["predictions"][0]
    assert lines[0][1] == best["class"] and float(lines[0][2]) == pytest.approx(best["probability"], abs=2e-6)
    code, out, _ = predicted(capsys, model, files[0], "--top", "1")
    assert out == f"{files[0]}: {best['class']} {best['probability']:.1%}\n"


def test_a_list_on_standard_input_and_images_of_other_sizes(trained, capsys, monkeypatch, tmp_path):
    model, _ = trained
    paths = []
    for mode, size in (("RGB", (50, 20)), ("L", (3, 3)), ("RGBA", (12, 12)), ("P", (7, 90))):
        paths.append(tmp_path / f"{mode} {size[0]}.png")
        Image.new(mode, size).save(paths[-1])
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{path}\n" for path in paths)))
    code, out, err = predicted(capsys, model, "-", "--json")
    assert (code, err) == (0, "") and [json.loads(line)["image"] for line in out.splitlines()] == list(map(str, paths))


def test_what_cannot_be_read_is_named_and_the_others_are_predicted(trained, capsys, tmp_path):
    model, folder = trained
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no image")
    good = next(folder.rglob("*.png"))
    code, out, err = predicted(capsys, model, bad, good)
    assert code == 2 and err.startswith(f"blink: {bad} is not a readable image") and err.count("\n") == 1
    assert out.startswith(f"{good}: ") and out.count("\n") == 1


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda path: ["nothing.safetensors", "x.png"], "there is no nothing.safetensors"),
        (lambda path: [path["model"], "x.png"], "there is no x.png; expected an image, a folder of images, or -"),
        (lambda path: [path["model"], path["empty"]], "holds no image"),
        (lambda path: [path["model"], "--top", "0", "-"], "--top: expected a whole number above 0"),
        (lambda path: [path["model"]], "the following arguments are required: IMAGE"),
        (lambda path: [path["model"], "-", "--json", "--csv"], "not allowed with argument --json"),
    ],
)
def test_mistakes_are_one_line(trained, capsys, tmp_path, make, message):
    (tmp_path / "empty").mkdir()
    code, out, err = predicted(capsys, *make({"model": trained[0], "empty": tmp_path / "empty"}))
    assert (code, out) == (2, "") and message in err and err.count("\n") == 1


def test_a_thousand_images_go_in_batches(trained, capsys, monkeypatch):
    model, folder = trained
    files = sorted(folder.rglob("*.png"))
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{files[i % len(files)]}\n" for i in range(600))))
    code, out, _ = predicted(capsys, model, "-", "--json", "--top", "1")
    rows = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and [row["image"] for row in rows] == [str(files[i % len(files)]) for i in range(600)]
    assert all(torch.tensor(row["predictions"][0]["probability"]) > 0 for row in rows)
