"""`blink ablate --decide`: which variants are given up, and when a plan is decided."""

import random

import pytest

from blink.__main__ import main
from blink.experiments import deciding, records
from tests.test_ablate import record


def queue(variants, seeds):
    return [record(name, seed, None) for seed in range(seeds) for name in variants]


def on_file(accuracies: dict[str, list[float]]):
    return [record(name, seed, value) for name, values in accuracies.items() for seed, value in enumerate(values)]


def test_nothing_stops_before_all_have_two_seeds():
    asked = queue("abcd", 4)
    assert deciding.stopped(asked, []) == {}
    assert deciding.stopped(asked, on_file({"a": [0.9, 0.9], "b": [0.1, 0.1], "c": [0.2, 0.2], "d": [0.9]})) == {}


def test_the_worse_half_goes_unless_it_may_still_win():
    """b is 10 points behind in both seeds; c is behind in the mean, but by less than its seeds vary.

    Of two values Student's t has one degree of freedom: t = -0.107 / 0.002 = -53.5, and 1 / (53.5 pi) is 0.6 %.
    """
    asked = queue("abcde", 8)
    found = on_file({"a": [0.9, 0.91], "b": [0.8, 0.811], "c": [0.92, 0.85], "d": [0.905, 0.92], "e": [0.9, 0.92]})
    assert deciding.stopped(asked, found) == {"b": "after 2 seeds better than 'd' with a probability of 0.6%"}
    # runs of another plan or machine are none of these
    other = [record("c", seed, 0.1, width=1.0) for seed in range(2)]
    assert deciding.stopped(asked, [*other, *found]) == deciding.stopped(asked, found)


def test_the_first_always_stays():
    found = on_file({"a": [0.1, 0.1], "b": [0.9, 0.9], "c": [0.89, 0.9]})
    assert "a" not in deciding.stopped(queue("abc", 8), found)


@pytest.mark.parametrize("gain, spread, seeds", [(0.01, 0.001, 4), (-0.01, 0.001, 2), (0.002, 0.002, 16)])
def test_it_ends_when_the_last_two_are_told_apart(gain, spread, seeds):
    noise = random.Random(1)
    base = [0.9 + noise.gauss(0, spread) for _ in range(64)]
    other = [value + gain + noise.gauss(0, spread) for value in base]
    for count in (1, 2, 4, 8, 16):
        found = deciding.stopped(queue("ab", 64), on_file({"a": base[:count], "b": other[:count]}))
        assert ("b" in found) == (count >= seeds), (count, found)
        assert ("a" in found) == (count >= max(4, seeds)), (count, found)


def test_a_variant_that_wins_by_luck_alone_is_no_decision():
    """Of alike variants the right one is among those left in most plans."""
    noise, kept = random.Random(0), 0
    for _ in range(100):
        found = {name: [0.9 + (name == "d") * 0.002 + noise.gauss(0, 0.001) for _ in range(8)] for name in "abcdefgh"}
        kept += (
            "d" not in deciding.stopped(queue("abcdefgh", 8), on_file(found))
            or "decided" in (deciding.stopped(queue("abcdefgh", 8), on_file(found))["d"])
        )
    assert kept >= 95


def test_the_command(image_folder, tmp_path, capsys, monkeypatch):
    from blink.experiments import ablate

    asked, own = [], ablate.Runner.run

    def run(self, name, seed, listener):
        asked.append((name, seed))
        return {**own(self, name, seed, listener), "accuracy": {"air": 0.9, "blink": 0.5}[name] + seed / 1000}

    monkeypatch.setattr(ablate.Runner, "run", run)
    words = ["ablate", "recipes", "--data", str(image_folder), "--device", "cpu", "--epochs-factor", "0.01"]
    words += ["--width", "0.1", "--batch-size", "8", "--json", str(tmp_path / "x.jsonl")]
    assert main([*words, "--runs", "6", "--decide"]) == 0
    # with equal differences there is no doubt
    assert asked == [(name, seed) for seed in range(2) for name in ("air", "blink")] + [("air", 2), ("air", 3)]
    out = " ".join(capsys.readouterr().out.split())
    assert "blink: no more runs (after 2 seeds better than 'air' with a probability of 0.0%)" in out
    assert "air: no more runs (decided after 4 seeds)" in out
    assert all(run["held_out"]["cross_entropy"] > 0 for run in records.read(tmp_path / "x.jsonl"))
    assert main([*words, "--shard", "1/2", "--decide"]) == 2
    assert "--decide looks at all runs" in capsys.readouterr().err
