"""`blink export`: what is written gives what the network does and says what it is; if it does not, nothing is left."""

import json
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

import blink
from blink.__main__ import main
from blink.errors import UserError
from blink.inference import export
from blink.model import saved
from tests.small import narrow_network

CLASSES, SHAPE = ("cat", "caf\udce9", "dog"), (3, 12, 14)
ROOT = Path(__file__).resolve().parent.parent


def saved_network(folder: Path, recipe: str) -> Path:
    net, path = narrow_network(recipe, len(CLASSES), SHAPE), folder / f"{recipe}.safetensors"
    saved.save(path, net.state_dict(), net.config, CLASSES, SHAPE, {"accuracy": 0.5, "data": {"name": "x", "test": 8}})
    return path


@pytest.fixture
def file(tmp_path) -> Path:
    return saved_network(tmp_path, "hlb")


def called(capsys, *arguments) -> tuple[int, str, str]:
    code = main(["export", *map(str, arguments)])
    return (code, *capsys.readouterr())


def archive(path: Path) -> tuple[torch.export.ExportedProgram, dict[str, str]]:
    extra = dict.fromkeys(("classes", "image_shape", "output", "model_card", "blink"), "")
    return torch.export.load(path, extra_files=extra), extra


# whitening and its negatives; projected, with gates; padded
@pytest.mark.parametrize("recipe", ["blink", "hlb", "hlb-3x3"])
def test_both_forms_give_the_networks_logits_for_any_number_of_images(tmp_path, capsys, recipe):
    file, onnx_file, program_file = saved_network(tmp_path, recipe), tmp_path / "n.onnx", tmp_path / "n.pt2"
    code, out, err = called(capsys, file, "--onnx", onnx_file, "--torch-export", program_file)
    assert (code, err) == (0, "") and out.count("logits differ by") == 2 and "generated images" in out
    assert all(len(line.replace(f"{tmp_path}/", "")) <= 80 for line in out.splitlines())
    model, session = blink.load(file, "cpu", "reference"), onnxruntime.InferenceSession(onnx_file)
    program, extra = archive(program_file)
    for count in (1, 3, 7):
        images = torch.randint(256, (count, *SHAPE), dtype=torch.uint8)
        want = model(images)
        (logits,) = session.run(["logits"], {"images": images.numpy()})
        assert logits.dtype == np.float32 and np.abs(logits - want.numpy()).max() <= 1e-5 * max(1, want.abs().max())
        assert torch.allclose(program.module()(images), want, rtol=0, atol=1e-5 * max(1, want.abs().max().item()))
    # standard operators only
    content = onnx.load(onnx_file)
    assert {node.domain for node in content.graph.node} == {""} and not content.functions
    assert content.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert all(str(target).startswith(("aten.", "<built-in function getitem>")) for target in targets)
    # and what they are of
    found = session.get_modelmeta().custom_metadata_map
    assert found == extra and tuple(json.loads(found["classes"])) == CLASSES
    assert json.loads(found["image_shape"]) == list(SHAPE) and json.loads(found["blink"]) == model.facts
    assert found["output"] == "logits" and found["model_card"].startswith("# A network on x")
    for path in (onnx_file, program_file):
        assert str(ROOT).encode() not in path.read_bytes()


def test_probabilities_on_images_of_a_folder(file, image_folder, tmp_path, capsys):
    out_file = tmp_path / "new" / "p.pt2"
    arguments = (file, "--torch-export", out_file, "--probabilities", "--data", image_folder / "train")
    code, out, err = called(capsys, *arguments)
    assert (code, err) == (0, "") and f"checked on 40 images of {image_folder / 'train'}" in out
    images = torch.randint(256, (4, *SHAPE), dtype=torch.uint8)
    program, extra = archive(out_file)
    want = blink.load(file, "cpu").probabilities(images)
    assert extra["output"] == "probabilities" and torch.allclose(program.module()(images), want, atol=1e-6)


def test_at_most_a_hundred_images_from_all_over_a_folder(file, image_folder, monkeypatch):
    model = blink.load(file, "cpu")
    monkeypatch.setattr(export, "_CHECKED", 6)
    images, said = export.check_images(str(image_folder), model)
    files = sorted(image_folder.rglob("*.png"))
    chosen = [files[i] for i in (0, 12, 24, 35, 47, 59)]
    assert said == f"6 images of {image_folder}" and torch.equal(model(images).softmax(1), model.predict(chosen))


def test_what_differs_is_not_written_and_what_was_there_stays(file, tmp_path, capsys, monkeypatch):
    old, new = tmp_path / "old.pt2", tmp_path / "new.onnx"
    old.write_bytes(b"before")
    monkeypatch.setattr(export, "archive_runner", lambda content: lambda images: torch.full((len(images), 3), 7.0))
    code, out, err = called(capsys, file, "--torch-export", old)
    assert (code, out) == (2, "") and "old.pt2 was not written: its results differ from the network's by" in err
    assert err.count("\n") == 1 and old.read_bytes() == b"before"
    # of two files neither is, if one differs
    monkeypatch.setattr(export, "as_onnx", lambda program, module: b"")
    monkeypatch.setattr(export, "onnx_runner", lambda content: export.load(file, "cpu"))
    assert called(capsys, file, "--onnx", new, "--torch-export", old)[0] == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hlb.safetensors", "old.pt2"]


@pytest.mark.parametrize("scale, allowed", [(0.01, 1e-5), (500.0, 5e-3)])
def test_a_difference_is_judged_by_the_largest_result(scale, allowed):
    expected = torch.full((4, 3), scale, dtype=torch.float64)

    def difference(amount: float) -> float:
        return export.checked(Path("x"), lambda rows: rows + amount, expected, expected)

    assert difference(0.9 * allowed) == pytest.approx(0.9 * allowed)
    for amount in (1.1 * allowed, -1.1 * allowed, torch.nan):
        with pytest.raises(UserError, match="x was not written"):
            difference(amount)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "give --onnx FILE or --torch-export FILE"),
        (["--onnx", "a", "--torch-export", "./a"], "name one file"),
        (["--onnx", "."], "is a folder; name a file"),
        (["--torch-export", "a.pt2", "--data", "nothing"], "there is no nothing"),
        (["--torch-export", "a.pt2", "--data", "bad.png"], "bad.png is not a readable image"),
    ],
)
def test_mistakes_are_one_line(file, tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    Path("bad.png").write_bytes(b"no image")
    code, out, err = called(capsys, file, *arguments)
    assert (code, out) == (2, "") and message in err and err.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.png", "hlb.safetensors"]


def test_a_missing_library_is_named_with_what_brings_it(file, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    code, out, err = called(capsys, file, "--onnx", tmp_path / "a.onnx")
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert "onnxscript" in err and "pip install onnx onnxscript onnxruntime" in err
    assert called(capsys, file, "--torch-export", tmp_path / "a.pt2")[0] == 0
