"""A disk that fills up takes no finished run along, and each file that failed is named once."""

import errno
import json
import os
import subprocess
from pathlib import Path

import pytest

import blink
from blink.__main__ import main
from blink.errors import UserError
from blink.training.outputs import Outputs
from tests.test_train_cli import QUICK, inside

FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a disk of 400 KB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("nothing can be mounted here")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


NARROW = [word for i in range(3) for word in ("--set", f"network.conv_groups.{i}.channels=16")]


def test_a_small_disk(small_disk, image_folder, tmp_path, capsys):
    """Three runs of networks of about 90 KB and their checkpoints, which take thrice that."""
    words = ["--data", image_folder, *QUICK[:2], *QUICK[4:], "--epochs", "2", *NARROW]
    code, out, err = inside(capsys, *words, "--runs", "6", "--out", small_disk, "--json", tmp_path / "x.json")
    assert code == 2 and err.count("\n") == 1 and err.startswith(f"blink: could not write {small_disk}")
    assert "No space left on device" in err and "note     no checkpoint of epoch 1" in out and "summary" in out
    # every run is on record, where there was room
    assert len(json.loads((tmp_path / "x.json").read_text())["runs"]) == 6
    files = sorted(path.name for path in small_disk.iterdir())
    networks = [name for name in files if name.endswith(".safetensors") and "gallery" not in name]
    assert 0 < len(networks) < 6 and not [name for name in files if name.endswith(".tmp")]
    for name in networks:
        blink.load(small_disk / name, device="cpu")
    if "summary.json" in files:
        json.loads((small_disk / "summary.json").read_text())
    named = [f"hlb-seed{seed}.safetensors" for seed in range(6) if f"hlb-seed{seed}.safetensors" not in networks]
    assert all(name in err for name in named)


def test_every_moment(image_folder, tmp_path, capsys, monkeypatch):
    """One write after another fails for a full disk, once: it is made up for at the end."""
    replace = os.replace
    words = ["--data", image_folder, *QUICK, *NARROW, "--runs", "2", "--out"]
    # from here on the images are cached
    assert inside(capsys, *words[:-3])[0] == 0
    for moment in range(7):
        count = iter(range(100))

        def failing(source, target, moment=moment, count=count):
            if next(count) == moment:
                raise FULL
            replace(source, target)

        with monkeypatch.context() as patched:
            patched.setattr(os, "replace", failing)
            code, out, err = inside(capsys, *words, tmp_path / str(moment))
        assert (code, err) == (0, "") and "it is tried again at the end" in " ".join(out.split())
        files = sorted(path.name for path in (tmp_path / str(moment)).iterdir())
        of_runs = [f"hlb-seed{seed}{kind}.safetensors" for seed in (0, 1) for kind in (".gallery", "")]
        assert files == [*of_runs, "summary.json"]
        assert len(json.loads((tmp_path / str(moment) / "summary.json").read_text())["runs"]) == 2


def test_what_stays_unwritten_is_named_once(tmp_path):
    notes, calls = [], []

    def fail():
        calls.append(1)
        raise UserError("could not write a") from FULL

    outputs = Outputs(notes.append)
    assert outputs.write(Path("b"), lambda: None)
    assert not outputs.write(Path("a"), fail) and not outputs.write(Path("a"), fail)
    with pytest.raises(UserError, match=r"^could not write a \(No space left on device\); all other files are whole"):
        outputs.finish()
    assert len(calls) == 3 and len(notes) == 1


@pytest.mark.parametrize("command", ["train", "inspect", "bench", "profile", "until"])
def test_json_replaces_nothing_silently(command, tmp_path, capsys, monkeypatch):
    """Found before the work."""
    words = {"until": ["until", "0.9"], "bench": ["bench", "norm_act"]}.get(command, [command])
    other, ours = tmp_path / "notes.json", tmp_path / "ours.json"
    other.write_text('{"mine": 1}')
    ours.write_text('{\n "blink": "0.1.0",\n "rows": []}')
    for path, more, message in (
        (other, [], "holds something else than results; name another file"),
        (other, ["--overwrite"], "holds something else than results; name another file"),
        (ours, [], "holds earlier results; replace them by --overwrite, or name another file"),
    ):
        before = path.read_text()
        assert main([*words, "--json", str(path), *more]) == 2
        assert capsys.readouterr().err == f"blink: {path} {message}\n" and path.read_text() == before


def test_json_is_overwritten_when_asked_to_and_goes_to_standard_output(image_folder, tmp_path, capsys):
    words, path = ["--data", image_folder, *QUICK, "--runs", "2"], tmp_path / "x.json"
    for more in ([], ["--overwrite"]):
        assert inside(capsys, *words, "--json", path, *more)[0] == 0
    code, out, err = inside(capsys, *words, "--json", "-")
    assert code == 0 and len(json.loads(out)["runs"]) == 2 and "Blink: hlb on images" in err and "summary" in err
    assert json.loads(out)["recipe"] == json.loads(path.read_text())["recipe"]
