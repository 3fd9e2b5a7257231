"""A training that was interrupted, by a signal or by kill -9, ends as the unbroken one: bit for bit."""

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from blink.__main__ import main
from blink.training import command
from blink.training.listener import Listener
from tests import forked
from tests.processes import started
from tests.test_train_cli import refused

# everything that an epoch carries to the next: weight average, images of two sizes, groups that stop, alternating
# mirrors, images that sit out, cutout and jitter
RECIPE = """
from dataclasses import replace
from blink.model.network import Group
from blink.training.recipes import AIR, HLB, Resolution, with_network

def small(recipe, **changes):
    groups = tuple(replace(group, channels=8) for group in recipe.network.conv_groups)
    network = {"stem_channels": 8} if recipe.network.stem_channels else {}
    return replace(with_network(recipe, conv_groups=groups, **network), **changes)

CARRYING = dict(ema_fraction=0.6, ema_every=2, resolutions=(Resolution(0.5, 0.8),), flip="alternating", keep=0.8)
MUON = small(AIR, name="mine", epochs=8, cutout=3, jitter=(0.1, 0.1), **CARRYING)
SGD = small(HLB, name="mine", epochs=8, **CARRYING)
PLAIN = small(AIR, name="mine", epochs=8)
"""
QUICK = ["--device", "cpu", "--dtype", "fp32", "--deterministic", "--batch-size", "8"]


@pytest.fixture(autouse=True)
def _settings_are_put_back(monkeypatch):
    for name in ("deterministic", "benchmark"):
        monkeypatch.setattr(torch.backends.cudnn, name, getattr(torch.backends.cudnn, name))


@pytest.fixture
def arguments(image_folder, tmp_path):
    """Of a training into tmp_path / "out" but for the recipe."""
    (tmp_path / "mine.py").write_text(RECIPE)
    return ["train", "--data", str(image_folder), *QUICK]


def recipe(tmp_path, name) -> list[str]:
    return ["--recipe", f"{tmp_path / 'mine.py'}:{name}"]


def results(folder: Path) -> tuple[list, dict]:
    """(the runs but for their seconds, the weights of each) of an --out folder, in which nothing else is left."""
    runs = json.loads((folder / "summary.json").read_text())["runs"]
    for run in runs:
        assert run.pop("seconds") > 0 and run.pop("images_per_second") > 0
        for row in run["epochs"]:
            row.pop("seconds")
    files = sorted(path.name for path in folder.iterdir())
    networks = [f"mine-seed{run['seed']}.safetensors" for run in runs]
    galleries = [name.replace(".safe", ".gallery.safe") for name in networks]
    assert files == sorted([*networks, *galleries, "summary.json"])
    return runs, {name: load_file(folder / name) for name in networks}


def assert_alike(a: Path, b: Path) -> None:
    (runs, weights), (others, other_weights) = results(a), results(b)
    assert runs == others
    for name, tensors in weights.items():
        for key, value in tensors.items():
            assert torch.equal(value, other_weights[name][key]), (name, key)


class Interrupt(Listener):
    """Ctrl-C after so many steps."""

    def __init__(self, steps: int):
        self._left = steps

    def on_step(self, done, losses):
        self._left -= 1
        if self._left == 0:
            raise KeyboardInterrupt


@pytest.mark.parametrize("name", ["MUON", "SGD", "PLAIN"])
def test_interrupted_twice_and_resumed(arguments, tmp_path, name, monkeypatch, capsys):
    arguments = [*arguments, *recipe(tmp_path, name), "--runs", "2", "--keep", "best"]
    assert main([*arguments, "--out", str(tmp_path / "whole")]) == 0
    out, listeners, execute = tmp_path / "out", [Interrupt(7), Interrupt(25)], command.execute
    interrupted = lambda *given, **named: execute(*given, **named, listeners=[listeners.pop(0)] if listeners else [])  # noqa: E731
    monkeypatch.setattr(command, "execute", interrupted)
    assert main([*arguments, "--out", str(out)]) == 130
    assert f"go on with: blink train --resume {out}" in capsys.readouterr().out
    assert [path.suffix for path in sorted(out.iterdir())] == [".checkpoint", ".json"]
    again = ["train", "--resume", str(out), *recipe(tmp_path, name)]
    assert main(again) == 130
    assert len(list(out.glob("*.checkpoint"))) <= 2
    assert main(again) == 0
    assert_alike(tmp_path / "whole", out)
    # and again, when there is nothing left to do
    assert main(again) == 0
    assert_alike(tmp_path / "whole", out)


def test_killed_at_random_moments(arguments, tmp_path):
    """kill -9 at 20 moments, from the first import to the last write."""
    arguments = [*arguments, *recipe(tmp_path, "MUON"), "--runs", "2", "--validate", "4"]
    moments, out = random.Random(0), tmp_path / "out"

    def begun(folder: Path):
        anew = [*arguments, "--out", folder]
        again = ["train", "--resume", folder, *recipe(tmp_path, "MUON")]
        return started(again if (folder / "summary.json").exists() else anew)

    def finished(process) -> None:
        process.join()
        assert process.exitcode == 0

    # what processes are forked from imports its own first
    forked.started(time.sleep, 0).join()
    began = time.perf_counter()
    finished(begun(tmp_path / "whole"))
    lasted, kills = time.perf_counter() - began, 0
    while kills < 20:
        process = begun(out)
        process.join(moments.uniform(0, lasted / 2))
        if process.exitcode is None:
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            kills += 1
            continue
        # it came to its end before: once more from the start
        assert process.exitcode == 0
        assert_alike(tmp_path / "whole", out)
        for path in out.iterdir():
            path.unlink()
    finished(begun(out))
    assert_alike(tmp_path / "whole", out)


def test_a_damaged_checkpoint_falls_back_to_the_one_before(arguments, tmp_path, monkeypatch, capsys):
    arguments, execute = [*arguments, *recipe(tmp_path, "SGD")], command.execute
    assert main([*arguments, "--out", str(tmp_path / "whole")]) == 0
    monkeypatch.setattr(command, "execute", lambda *given, **named: execute(*given, **named, listeners=[Interrupt(17)]))
    out = tmp_path / "out"
    assert main([*arguments, "--out", str(out)]) == 130
    monkeypatch.undo()
    last = max(out.glob("*.checkpoint"))
    assert len(list(out.glob("*.checkpoint"))) == 2
    last.write_bytes(last.read_bytes()[:-100])
    capsys.readouterr()
    assert main(["train", "--resume", str(out), *recipe(tmp_path, "SGD")]) == 0
    assert f"{last.name} is no whole checkpoint" in "".join(capsys.readouterr().out.split("\n"))
    assert_alike(tmp_path / "whole", out)


def test_further_runs_are_added(arguments, tmp_path):
    arguments = [*arguments, *recipe(tmp_path, "PLAIN"), "--epochs", "1"]
    out = tmp_path / "out"
    assert main([*arguments, "--out", str(tmp_path / "whole"), "--runs", "3"]) == 0
    assert main([*arguments, "--out", str(out)]) == 0
    assert main(["train", "--resume", str(out), *recipe(tmp_path, "PLAIN"), "--runs", "3"]) == 0
    assert_alike(tmp_path / "whole", out)


def test_what_cannot_be_resumed_is_one_line(arguments, tmp_path, capsys, monkeypatch):
    arguments = [*recipe(tmp_path, "PLAIN"), *arguments[1:]]
    out, execute = tmp_path / "out", command.execute
    assert "there is no" in refused(capsys, "--resume", tmp_path / "nothing")
    monkeypatch.setattr(command, "execute", lambda *given, **named: execute(*given, **named, listeners=[Interrupt(9)]))
    assert main(["train", *arguments, "--out", str(out)]) == 130
    monkeypatch.undo()
    capsys.readouterr()
    # a folder that somebody sent would else run a file that it names
    assert "of a Python file that would be run; name it again to go on" in refused(capsys, "--resume", out)
    again = ["--resume", out, *recipe(tmp_path, "PLAIN")]
    assert "holds a training with other recipe" in refused(capsys, *again, "--set", "translation=1")
    assert "holds a training with other budget" in refused(capsys, *again, "--epochs", "2")
    assert "is of a run with other keep" in refused(capsys, *again, "--keep", "best")
    assert "holds an earlier training" in refused(capsys, *arguments, "--out", out)
    assert main(["train", *map(str, again)]) == 0
    assert "holds a training with other dtype" in refused(capsys, *again, "--dtype", "bf16")
    (out / "summary.json").write_text("{}")
    assert "is no summary of blink train" in refused(capsys, "--resume", out)
    assert "--keep best chooses by validation" in refused(capsys, *arguments, "--keep", "best", "--validate", "0")


def test_overwritten_when_asked_to(arguments, tmp_path):
    arguments = [*arguments, *recipe(tmp_path, "PLAIN"), "--epochs", "1", "--out", str(tmp_path / "out")]
    assert main(arguments) == 0
    before = results(tmp_path / "out")
    assert main([*arguments, "--seed", "1", "--overwrite"]) == 0
    for path in (tmp_path / "out").glob("mine-seed0.*"):
        path.unlink()
    assert results(tmp_path / "out") != before
