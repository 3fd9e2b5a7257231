"""What `blink train` writes and when: nothing that ends a run takes the finished ones with it."""

import json
from dataclasses import replace

import pytest
import torch

from blink.errors import UserError
from blink.training import command
from blink.training.recipes import RECIPES
from tests.test_train_cli import QUICK, inside, refused


@pytest.fixture(autouse=True)
def _settings_are_put_back(monkeypatch):
    for name in ("deterministic", "benchmark"):
        monkeypatch.setattr(torch.backends.cudnn, name, getattr(torch.backends.cudnn, name))


def test_a_run_is_on_file_when_it_ends(image_folder, tmp_path, capsys, monkeypatch):
    """Whatever ends the process later, a signal or a second interrupt, finished runs are whole."""
    path, out, seen = tmp_path / "runs.json", tmp_path / "out", []
    on_start = command.Report.on_start

    def look(self, *arguments):
        files = (path, out / "summary.json")
        seen.append([len(json.loads(file.read_text())["runs"]) if file.exists() else 0 for file in files])
        on_start(self, *arguments)

    monkeypatch.setattr(command.Report, "on_start", look)
    code, *_ = inside(capsys, "--data", image_folder, *QUICK, "--runs", "3", "--json", path, "--out", out)
    assert code == 0 and seen == [[0, 0], [1, 1], [2, 2]]


def test_what_cannot_be_written_is_told_before_training(image_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command, "prepare", None)
    assert "nothing can be written to /proc" in refused(
        capsys, "--data", image_folder, *QUICK, "--json", "/proc/runs.json"
    )
    assert "is a folder; name a file" in refused(capsys, "--data", image_folder, *QUICK, "--json", tmp_path)
    assert "nothing can be written to /proc" in refused(capsys, "--data", image_folder, *QUICK, "--out", "/proc")


@pytest.mark.parametrize("option", ["--json", "--out"])
def test_output_below_a_file_is_refused_before_training(capsys, tmp_path, image_folder, option):
    (tmp_path / "file").write_text("kept")
    err = refused(capsys, "--data", image_folder, *QUICK, option, tmp_path / "file" / "x")
    assert "could not make the folder" in err
    assert (tmp_path / "file").read_text() == "kept"


def test_loss_that_stops_being_finite_is_one_line(capsys, monkeypatch, tmp_path, image_folder):
    hlb = RECIPES["hlb"]
    monkeypatch.setitem(RECIPES, "hlb", replace(hlb, param_groups=tuple(replace(g, lr=1e8) for g in hlb.param_groups)))
    target = tmp_path / "x.json"
    err = refused(capsys, "--data", image_folder, *QUICK, "--steps", "4", "--json", target)
    assert "the loss became" in err and "of 4 (batch size 8)" in err
    assert not target.exists()


def on_second_run(monkeypatch, error):
    real, calls = command.train, []

    def run(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            raise error
        return real(*args, **kwargs)

    monkeypatch.setattr(command, "train", run)
    return calls


def test_interrupt_keeps_the_finished_runs(capsys, monkeypatch, tmp_path, image_folder):
    calls = on_second_run(monkeypatch, KeyboardInterrupt())
    target = tmp_path / "x.json"
    arguments = ["--data", image_folder, *QUICK, "--runs", "3", "--json", target, "--out", tmp_path / "out"]
    code, out, err = inside(capsys, *arguments)
    assert (code, err, len(calls)) == (130, "", 2)
    assert "interrupted" in out and "summary" in out and "accuracy" in out.split("summary")[1]
    content = json.loads(target.read_text())
    assert [run["seed"] for run in content["runs"]] == [0]
    assert content["summary"]["accuracy"]["n"] == 1
    files = ["hlb-seed0.gallery.safetensors", "hlb-seed0.safetensors", "summary.json"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == files


def test_interrupt_of_the_first_run_says_that_none_finished(capsys, monkeypatch, tmp_path, image_folder):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "train", interrupt)
    code, out, err = inside(capsys, "--data", image_folder, *QUICK, "--json", tmp_path / "x.json")
    assert (code, err) == (130, "") and "no run finished" in out
    assert not (tmp_path / "x.json").exists()


def test_failed_later_run_keeps_the_finished_ones(capsys, monkeypatch, tmp_path, image_folder):
    on_second_run(monkeypatch, UserError("the loss became nan"))
    err = refused(capsys, "--data", image_folder, *QUICK, "--runs", "3", "--json", tmp_path / "x.json")
    assert "the loss became nan" in err
    assert len(json.loads((tmp_path / "x.json").read_text())["runs"]) == 1
