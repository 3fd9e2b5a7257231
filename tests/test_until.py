"""The smallest budget that reaches a target: the search by itself, and through the command."""

import json
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blink.__main__ import main
from blink.experiments.plans import narrowed
from blink.experiments.until import Trial, search, smallest_budget
from blink.training.recipes import AIR, RECIPES


@given(st.integers(1, 400), st.integers(1, 100))
@settings(deadline=None, max_examples=200)
def test_the_least_budget_is_found_in_few_trials(answer, start):
    most = 4 * start
    tried = []

    def reaches(at):
        assert 1 <= at <= most and at not in tried
        tried.append(at)
        return at >= answer

    assert smallest_budget(reaches, start, most) == (answer if answer <= most else None)
    assert len(tried) <= 30


def trial(epochs, mean):
    spread = {"n": 1, "mean": mean, "std": None, "ci95": None}
    return Trial(epochs, round(epochs * 10), spread, spread, 0.1)


def test_each_budget_is_trained_anew_and_said_in_80_columns():
    said, trained = [], []

    def train(epochs):
        trained.append(epochs)
        return trial(epochs, min(0.95, 0.9 + epochs / 100))

    found = search(0.935, 5, train, said.append)
    assert found == trial(3.5, 0.935)
    assert len(said) == len(trained) == len(set(trained)) and all(len(line) <= 80 for line in said)
    assert [("reached" in line) for line in said] == [epochs >= 3.5 for epochs in trained]
    assert search(0.99, 1, train, said.append) is None


@pytest.fixture
def narrow(monkeypatch):
    monkeypatch.setitem(RECIPES, "air", narrowed(AIR, 0.1))


def run(images, tmp_path, *arguments):
    path = tmp_path / "until.json"
    options = ["--recipe", "air", "--data", str(images), "--batch-size", "10", "--kernels", "reference"]
    code = main(["until", *options, "--runs", "2", "--epochs", "0.5", "--json", str(path), *arguments])
    return code, json.loads(path.read_text())


def test_until_through_the_command_line(narrow, image_folder, tmp_path, capsys):
    # everything reaches it, so the search ends at its smallest budget: one step
    code, content = run(image_folder, tmp_path, "0.0001")
    assert code == 0
    found = content["until"]
    assert found["smallest"] == found["trials"][-1] and found["smallest"]["epochs"] == 0.25
    assert found["smallest"]["steps"] == 1 and found["smallest"]["accuracy"]["n"] == 2
    assert all(a["pflop"] > b["pflop"] for a, b in pairwise(found["trials"]))
    assert "smallest: 0.25 epochs" in capsys.readouterr().out


def test_an_unreached_target_is_one_line_and_keeps_what_was_tried(narrow, image_folder, tmp_path, capsys):
    code, content = run(image_folder, tmp_path, "1")
    assert code == 2
    assert content["until"]["smallest"] is None and len(content["until"]["trials"]) >= 3
    err = capsys.readouterr().err
    assert "no budget up to 2 epochs reached 1" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["94"], "expected a fraction as 0.94, not '94'"),
        ([], "required: ACCURACY"),
        (["0.9", "--out", "x"], "unrecognized arguments: --out"),
    ],
)
def test_bad_arguments_are_one_line(capsys, arguments, message):
    assert main(["until", *arguments]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
