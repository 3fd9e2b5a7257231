"""Digits are not mirrored unless it is asked for, whatever trains on them."""

import json
from pathlib import Path

import pytest

from blink.__main__ import main, parse
from blink.experiments import records
from blink.experiments.plans import PLANS, Plan
from blink.experiments.race import command as race
from blink.experiments.race.contest import Contestant
from blink.training import data
from blink.training.budget import plan_budget
from blink.training.job import count_flops
from blink.training.recipes import AIR, with_flip
from blink.training.setting import choose_setting
from tests.published import FOLDERS, make_idx, make_svhn


@pytest.fixture(autouse=True)
def _own_folders(tmp_path, monkeypatch):
    monkeypatch.setenv("BLINK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(data, "DEFAULT_ROOT", tmp_path / "data")


def train(*options):
    """(what `blink train` said, its summary)"""
    target = data.DEFAULT_ROOT.parent / "out.json"
    arguments = ["--steps", "1", "--batch-size", "4", "--limit", "20", "--device", "cpu", "--json", str(target)]
    assert main(["train", *arguments, *options]) == 0
    return json.loads(target.read_text())


@pytest.mark.parametrize(
    "name, options, flip, tta, said",
    [
        ("mnist", (), "none", None, True),
        ("svhn", (), "none", None, True),
        ("fashionmnist", (), "random", "mirror", False),
        ("mnist", ("--flip", "random"), "random", "mirror", False),
        ("mnist", ("--flip", "none"), "none", None, False),
        ("mnist", ("--set", "flip=random"), "random", None, True),
    ],
)
def test_digits_are_not_mirrored_unless_asked_for(monkeypatch, capsys, name, options, flip, tta, said):
    make_idx(data.DEFAULT_ROOT / FOLDERS["mnist"])
    make_idx(data.DEFAULT_ROOT / FOLDERS["fashionmnist"])
    make_svhn(monkeypatch, data.DEFAULT_ROOT)
    recipe = train("--data", name, "--recipe", "hlb", *options)["recipe"]
    assert (recipe["flip"], recipe["tta"]) == (flip, tta)
    assert ("the recipe's mirroring is off (--flip)" in " ".join(capsys.readouterr().out.split())) == said


def test_variants_and_races_do_not_mirror_digits_either(monkeypatch, capsys):
    make_idx(data.DEFAULT_ROOT / FOLDERS["mnist"])
    monkeypatch.setitem(PLANS, "test", Plan("what a test asks", {"air": AIR}))
    target = data.DEFAULT_ROOT.parent / "runs.jsonl"
    words = ["--data", "mnist", "--width", "0.1", "--epochs-factor", "0.1", "--device", "cpu", "--json", str(target)]
    assert main(["ablate", "test", *words]) == 0
    (run,) = records.read(target)
    assert (run["recipe"]["flip"], run["recipe"]["tta"]) == ("none", "translate")
    assert "mirror images are of other classes here: no variant mirrors any" in capsys.readouterr().out

    options = parse("race", ["x=y", "--recipe", "air", "--data", "mnist", "--device", "cpu"])
    dataset = data.load("mnist", lambda done, total: None, lambda line: None)
    ours = Contestant(race.OURS, Path.cwd(), options=())
    facts = race.describe(ours, choose_setting(options), dataset, options)
    expected = count_flops(with_flip(AIR, "none"), plan_budget(AIR, 30), dataset)["total"] / 1e15
    assert facts["pflop"] == expected < count_flops(AIR, plan_budget(AIR, 30), dataset)["total"] / 1e15
