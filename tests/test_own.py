"""Recipes and plans of one's own, from a file that the command line names."""

import json

import pytest

from blink.__main__ import main
from blink.errors import UserError
from blink.experiments.plans import PLANS, Plan
from blink.training.own import named
from blink.training.recipes import HLB, RECIPES, Recipe

FILE = """
from dataclasses import replace
from blink.experiments.plans import Plan, narrowed
from blink.training.recipes import HLB, with_network

MINE = replace(narrowed(HLB, 0.0625), name="mine", label_smoothing=0.1)
PLAN = Plan("with and without", {"with": MINE, "without": with_network(MINE, se_reduction=None)})
number = 3
"""


@pytest.fixture
def file(tmp_path):
    (tmp_path / "mine.py").write_text(FILE)
    return tmp_path / "mine.py"


def test_known_and_own_names(file):
    assert named("hlb", RECIPES, Recipe) is HLB
    assert named(f"{file}:MINE", RECIPES, Recipe).label_smoothing == 0.1
    assert list(named(f"{file}:PLAN", PLANS, Plan).variants) == ["with", "without"]


@pytest.mark.parametrize(
    "text, message",
    [
        ("none", r"unknown recipe 'none'; expected one of blink, .*, or FILE\.py:NAME"),
        ("nothing.py:MINE", r"there is no nothing\.py; expected a Python file that defines the recipe MINE"),
        ("{file}:number", r"has no recipe 'number'; it holds HLB, MINE"),
        ("{file}:", r"has no recipe ''"),
        ("{file}", r"unknown recipe"),
    ],
)
def test_what_is_no_recipe_is_one_line(file, text, message):
    with pytest.raises(UserError, match=message):
        named(text.format(file=file), RECIPES, Recipe)


@pytest.mark.parametrize(
    "content, message",
    [("x = 1\ny = 1 / 0\n", "line 2: ZeroDivisionError: division by zero"), ("x = (\n", "SyntaxError")],
)
def test_a_file_that_fails_is_one_line(tmp_path, content, message):
    (tmp_path / "bad.py").write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        named(f"{tmp_path / 'bad.py'}:MINE", RECIPES, Recipe)
    assert "\n" not in str(caught.value)


def test_an_own_recipe_trains_and_is_shown(file, tmp_path, image_folder, capsys):
    words = ["--recipe", f"{file}:MINE", "--data", str(image_folder), "--device", "cpu", "--steps", "2"]
    assert main(["train", *words, "--batch-size", "8", "--json", str(tmp_path / "x.json")]) == 0
    assert json.loads((tmp_path / "x.json").read_text())["recipe"]["label_smoothing"] == 0.1
    capsys.readouterr()
    assert main(["recipes", f"{file}:MINE"]) == 0
    assert "  label_smoothing = 0.1\n" in capsys.readouterr().out


def test_an_own_plan_is_compared(file, tmp_path, image_folder, capsys):
    words = ["ablate", f"{file}:PLAN", "--data", str(image_folder), "--device", "cpu", "--epochs-factor", "0.05"]
    assert main([*words, "--batch-size", "8", "--json", str(tmp_path / "x.jsonl")]) == 0
    out = capsys.readouterr().out
    assert "with and without" in out and "without  " in out
    assert len((tmp_path / "x.jsonl").read_text().splitlines()) == 2
