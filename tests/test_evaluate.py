"""`blink evaluate`: figures counted anew from `predict`; any data matched by names; a run's own accuracy again."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import blink
from blink.__main__ import main
from blink.inference import evaluate
from blink.model import saved
from blink.training import data
from blink.training.data import synthetic
from tests.small import narrow_network, small_dataset


def trained(folder, out, *arguments) -> str:
    """The file of a short fp32 run on a folder."""
    words = ["--steps", "3", "--batch-size", "8", "--validate", "0", "--device", "cpu", "--dtype", "fp32", *arguments]
    assert main(["train", "--data", str(folder), "--out", str(out), *words]) == 0
    return str(next(path for path in out.glob("*.safetensors") if ".gallery." not in path.name))


def untrained(path, classes, image_shape) -> str:
    net = narrow_network("blink", len(classes), image_shape)
    saved.save(path, net.state_dict(), net.config, tuple(classes), image_shape, {})
    return str(path)


@pytest.fixture
def evaluated(capsys, tmp_path):
    """evaluated(model, folder, ...) -> (exit code, --json, rows of --csv, stdout, stderr)"""

    def call(model, folder, *arguments):
        files = tmp_path / "e.json", tmp_path / "e.csv"
        for file in files:
            file.unlink(missing_ok=True)
        capsys.readouterr()
        words = ["--data", folder, "--json", files[0], "--csv", files[1], "--device", "cpu", *arguments]
        code = main(["evaluate", str(model), *map(str, words)])
        content = json.loads(files[0].read_text()) if files[0].exists() else None
        rows = list(csv.DictReader(files[1].open())) if files[1].exists() else None
        return (code, content, rows, *capsys.readouterr())

    return call


def move(source, target, names):
    """Copy a folder's classes."""
    for name in names:
        shutil.copytree(source / name, target / name)
    return target


@pytest.mark.parametrize("recipe", ["blink", "hlb"])
def test_views_give_a_runs_own_accuracy(image_folder, tmp_path, evaluated, recipe):
    model = trained(image_folder, tmp_path / "out", "--recipe", recipe)
    code, content, *_, err = evaluated(model, image_folder, "--tta")
    reported = json.loads((tmp_path / "out" / "summary.json").read_text())["runs"][0]
    assert (code, err) == (0, "") and content["accuracy"] == blink.load(model).facts["accuracy"] == reported["accuracy"]
    assert content["balanced_accuracy"] == pytest.approx(reported["balanced_accuracy"])
    assert content["data"]["half"] == "test" and not content["data"]["trained_on"]


def test_every_figure_is_what_predict_gives(image_folder, tmp_path, evaluated):
    model = untrained(tmp_path / "m.safetensors", synthetic.CLASSES, (3, 12, 12))
    code, content, rows, out, err = evaluated(model, image_folder, "--half", "all", "--top", "4")
    files = sorted((image_folder / "train").rglob("*.png")) + sorted((image_folder / "test").rglob("*.png"))
    assert (code, err, [row["image"] for row in rows]) == (0, "", list(map(str, files)))
    probabilities = blink.load(model).predict(files)
    best, taken = probabilities.max(1)
    labels = [file.parent.name for file in files]
    predicted = [synthetic.CLASSES[i] for i in taken.tolist()]
    assert [(row["label"], row["predicted"]) for row in rows] == list(zip(labels, predicted))
    assert [float(row["probability"]) for row in rows] == pytest.approx(best.tolist(), abs=2e-6)
    right = [a == b for a, b in zip(labels, predicted)]
    assert content["accuracy"] == sum(right) / 60 and f"accuracy     {sum(right) / 60:.4f}" in out
    parts = []
    for i, (name, entry) in enumerate(zip(synthetic.CLASSES, content["classes"], strict=True)):
        own = [ok for ok, label in zip(right, labels) if label == name]
        assert (entry["class"], entry["images"]) == (name, len(own))
        assert entry["accuracy"] == (pytest.approx(sum(own) / len(own)) if own else None)
        parts += [sum(own) / len(own)] if own else []
        pairs = list(zip(labels, predicted))
        assert content["confusion"][i] == [pairs.count((name, other)) for other in synthetic.CLASSES]
    assert content["balanced_accuracy"] == pytest.approx(np.mean(parts))
    gaps = 0.0
    for low in range(15):
        inside = [k for k in range(60) if low == min(int(best[k].double() * 15), 14)]
        gaps += abs(sum(best[k].item() - right[k] for k in inside))
    assert content["calibration_error"] == pytest.approx(gaps / 60)
    wrong = sorted((k for k in range(60) if not right[k]), key=lambda k: -best[k].item())
    found = [mistake["probability"] for mistake in content["mistakes"]]
    assert found == pytest.approx([best[k].item() for k in wrong], abs=1e-6)
    shown = out.split("most confident mistakes\n")[1].splitlines()
    top = content["mistakes"][:4]
    assert shown == [f"{m['image']}: {m['label']} taken for {m['predicted']}, {m['probability']:.1%}" for m in top]
    assert all(len(line) <= 80 for line in out.split("most confident mistakes\n")[0].splitlines())


def test_classes_are_matched_by_name_and_some_may_lack(image_folder, tmp_path, evaluated):
    names = [folder.name for folder in sorted((image_folder / "train").iterdir())]
    order = [*reversed(names), "unseen"]
    model = untrained(tmp_path / "m.safetensors", order, (3, 12, 12))
    new = move(image_folder / "train", tmp_path / "new", names[:2])
    (new / "unseen").mkdir()
    (new / ".hidden").mkdir()
    code, content, rows, out, err = evaluated(model, new)
    assert (code, err) == (0, "") and {row["label"] for row in rows} == set(names[:2])
    assert content["data"]["half"] == "all" and "no image of 'unseen'" not in out and "note         no image of" in out
    counts = {entry["class"]: entry["images"] for entry in content["classes"]}
    assert counts["unseen"] == 0 and counts[names[0]] == len(list((new / names[0]).iterdir()))
    taken = {row["predicted"] for row in rows}
    predictions = blink.load(model).predict(sorted(new.rglob("*.png"))).argmax(1).tolist()
    assert taken == {order[i] for i in predictions}
    # a folder of one class, which nothing could be trained on
    code, content, rows, _, err = evaluated(model, move(image_folder / "train", tmp_path / "one", names[:1]))
    assert (code, err, {row["label"] for row in rows}) == (0, "", {names[0]})
    # and a class that is another's
    (new / names[1]).rename(new / "other")
    code, content, rows, out, err = evaluated(model, new)
    assert (code, content, rows, out) == (2, None, None, "") and err.count("\n") == 1
    assert "holds the class 'other', which this network does not know; it knows" in err


def test_a_folder_without_halves_is_whole_or_as_the_training_split_it(image_folder, tmp_path, evaluated):
    whole = image_folder / "train"
    shutil.rmtree(image_folder / "test")
    for folder in list(whole.iterdir()):
        if len(list(folder.iterdir())) < 2:
            shutil.rmtree(folder)
    model = trained(whole, tmp_path / "out", "--val-split", "0.4")
    facts = blink.load(model).facts
    count = len(list(whole.rglob("*.png")))
    assert facts["data"]["train"] + facts["data"]["test"] == count
    code, content, rows, out, err = evaluated(model, whole)
    assert (code, err, len(rows)) == (0, "", count) and content["data"]["trained_on"]
    assert "trained on a part of these images; --half test takes the others" in " ".join(out.split())
    code, content, rows, out, err = evaluated(model, whole, "--half", "test", "--tta")
    assert len(rows) == facts["data"]["test"] and content["accuracy"] == facts["accuracy"]
    assert "trained on" not in out
    code, content, rows, out, err = evaluated(model, whole, "--half", "train", "--limit", "5")
    assert len(rows) == 5 and "note         the network was trained on these images" in out
    assert len(evaluated(model, whole, "--half", "test", "--val-split", "0.2")[2]) < facts["data"]["test"]


def test_one_half_can_be_named_and_what_was_trained_on_is_said(image_folder, tmp_path, evaluated):
    model = trained(image_folder, tmp_path / "out")
    for name, count, said in (("train", 40, True), ("test", 20, False)):
        code, content, rows, out, err = evaluated(model, image_folder / name)
        assert (code, err, len(rows), content["data"]["half"]) == (0, "", count, name)
        assert content["data"]["trained_on"] == ("trained on these images" in out) == said
        assert evaluated(model, image_folder, "--half", name)[2] == rows
    assert "trained on a part of these" in evaluated(model, image_folder, "--half", "all")[3]
    # one changed pixel makes it other data
    file = next((image_folder / "test").rglob("*.png"))
    pixels = np.array(Image.open(file))
    pixels[0, 0] ^= 1
    Image.fromarray(pixels).save(file)
    assert "trained on" not in evaluated(model, image_folder, "--half", "all")[3]


def test_images_of_any_size_for_a_rectangle(tmp_path, evaluated):
    model = untrained(tmp_path / "m.safetensors", ("a", "b"), (3, 12, 14))
    files = []
    for name, sizes in (("a", [(50, 20), (12, 14)]), ("b", [(9, 9)])):
        (tmp_path / "set" / name).mkdir(parents=True)
        for size in sizes:
            files.append(tmp_path / "set" / name / f"{size[0]}.png")
            Image.fromarray(np.random.RandomState(size[0]).randint(256, size=(*size, 3)).astype(np.uint8)).save(
                files[-1]
            )
    code, _, rows, _, err = evaluated(model, tmp_path / "set")
    assert (code, err) == (0, "")
    found = {row["image"]: float(row["probability"]) for row in rows}
    want = blink.load(model).predict(files).max(1).values.tolist()
    assert [found[str(file)] for file in files] == pytest.approx(want, abs=2e-6)


def test_a_published_set_of_another_size(tmp_path, evaluated, monkeypatch):
    monkeypatch.setattr(data, "generated", lambda: small_dataset(30, 20, 16))
    model = untrained(tmp_path / "m.safetensors", synthetic.CLASSES[::-1], (3, 12, 14))
    code, _, rows, out, err = evaluated(model, "synthetic", "--half", "all")
    assert (code, err, len(rows)) == (0, "", 50) and "NOT CIFAR-10" in out
    assert "note         images of 16x16 are scaled and cropped to the network's 12x14" in out
    assert [row["image"] for row in rows] == [f"train {i}" for i in range(30)] + [f"test {i}" for i in range(20)]
    images, labels, test_images, test_labels = synthetic.generate(30, 20)
    assert [row["label"] for row in rows] == [synthetic.CLASSES[i] for i in (*labels, *test_labels)]
    want = blink.load(model).predict([*images[:, 8:24, 8:24], *test_images[:, 8:24, 8:24]]).max(1).values.tolist()
    assert [float(row["probability"]) for row in rows] == pytest.approx(want, abs=2e-6)
    assert [row["image"] for row in evaluated(model, "synthetic", "--limit", "1000")[2]] == [
        f"test {i}" for i in range(20)
    ]


def test_many_classes_have_their_most_frequent_confusions():
    counts = torch.zeros(40, 40, dtype=torch.int64)
    counts[3, 7], counts[7, 3], counts[5, 5], counts[0, 39] = 12, 1, 99, 3
    assert evaluate.most_frequent(counts, 2) == [(3, 7, 12), (0, 39, 3)]
    assert evaluate.most_frequent(counts, 99) == [(3, 7, 12), (0, 39, 3), (7, 3, 1)]
    names = tuple(f"class {i}" for i in range(40))
    assert evaluate.confusion_table(names, counts) is None
    assert evaluate.confusion_table(names[:12], 1000 + counts[:12, :12]) is not None
    assert evaluate.confusion_table(names[:12], 100000 + counts[:12, :12]) is None
    table = evaluate.class_table(names, counts)
    assert table.row_count == 30
    # those with an image come first, the worst of them before
    assert [str(cell) for cell in table.columns[0].cells][:4] == ["class 0", "class 3", "class 7", "class 5"]


def test_what_cannot_be_read_is_named_and_the_others_count(image_folder, tmp_path, evaluated):
    model = untrained(tmp_path / "m.safetensors", synthetic.CLASSES, (3, 12, 12))
    bad = next((image_folder / "test").rglob("*.png"))
    bad.write_bytes(b"no image")
    code, content, rows, _, err = evaluated(model, image_folder)
    assert (code, len(rows), content["data"]["images"]) == (2, 19, 19)
    assert err.startswith(f"blink: {bad} is not a readable image") and err.count("\n") == 1


def test_a_network_of_no_numbers_is_one_line(image_folder, tmp_path, evaluated):
    net = narrow_network("blink", 10, (3, 12, 12))
    net.head.weight.data[0] = torch.nan
    path = tmp_path / "m.safetensors"
    saved.save(path, net.state_dict(), net.config, synthetic.CLASSES, (3, 12, 12), {})
    code, content, rows, out, err = evaluated(path, image_folder)
    assert (code, content, rows, out) == (2, None, None, "") and "gives NaN for 20 of 20 images" in err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--data", "nothing"], "there is no nothing; --data takes a folder"),
        (["--data", "m.safetensors"], "is a file; --data takes a folder"),
        (["--data", "empty"], "empty holds neither <class>/<images>"),
        (["--data", "images", "--val-split", "0.5"], "--val-split is for --half train or test of a folder without"),
        (["--data", "images/test", "--half", "none"], "invalid choice: 'none'"),
        (["--data", "images", "--tta"], "does not say which views its recipe averages"),
        (["--data", "images", "--json", "empty"], "empty is a folder; name a file"),
        ([], "the following arguments are required: --data"),
    ],
)
def test_mistakes_are_one_line(image_folder, tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    untrained(tmp_path / "m.safetensors", synthetic.CLASSES, (3, 12, 12))
    code = main(["evaluate", "m.safetensors", "--device", "cpu", *arguments])
    out, err = capsys.readouterr()
    assert (code, out) == (2, "") and message in err and err.count("\n") == 1


def test_a_half_that_the_set_does_not_use_is_a_set_by_itself(image_folder, tmp_path, evaluated):
    """Of train/, test/ and val/, training takes the first two."""
    model = trained(image_folder, tmp_path / "out")
    (image_folder / "test").rename(image_folder / "val")
    shutil.copytree(image_folder / "val", image_folder / "test")
    for name in ("val", "test"):
        code, content, rows, _, err = evaluated(model, image_folder / name)
        assert (code, err) == (0, "") and content["accuracy"] >= 0
        assert rows and all(Path(row["image"]).is_relative_to(image_folder / name) for row in rows)


@pytest.mark.parametrize("key", ["data", "recipe", "command"])
def test_a_file_that_tells_less_of_itself_is_evaluated(image_folder, tmp_path, evaluated, key):
    model = untrained(tmp_path / "m.safetensors", synthetic.CLASSES, (3, 12, 12))
    net = narrow_network("blink", len(synthetic.CLASSES), (3, 12, 12))
    saved.save(Path(model), net.state_dict(), net.config, synthetic.CLASSES, (3, 12, 12), {key: None})
    code, *_ = evaluated(model, image_folder, "--half", "all")
    assert code == 0
