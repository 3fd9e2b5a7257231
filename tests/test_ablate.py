"""Plans, the runs on file, what is compared with what, and the command itself."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from blink.__main__ import main
from blink.errors import UserError
from blink.experiments import compare, records
from blink.experiments.plans import PLANS, Plan, narrowed, stretched
from blink.experiments.pool import Pool, pooled
from blink.model import backend
from blink.training import precision
from blink.training.budget import plan_budget
from blink.training.loop import train
from blink.training.recipes import AIR, HLB, Resolution
from blink.training.trainer import Trainer
from tests.small import small_dataset


def record(variant, seed, accuracy, seconds=10.0, recipe=None, epochs=4, **changes):
    return {
        "plan": "p",
        "variant": variant,
        "seed": seed,
        "width": 0.5,
        "epochs_factor": 1.0,
        "data": {"name": "d", "fingerprint": "f", "train": 10, "test": 5},
        "environment": {"device": "cpu", "threads": 1, "torch": "2", "triton": "3"},
        "kernels": {"name": "reference"},
        "dtype": "fp32",
        "graph": False,
        "deterministic": False,
        "recipe": recipe or {"name": variant},
        "budget": {"total_steps": epochs * 2, "steps_per_epoch": 2},
        "flops": {"total": 2e12},
        "accuracy": accuracy,
        "seconds": seconds,
        **changes,
    }


RUNS = [
    record("base", 0, 0.80, 10.0),
    record("other", 0, 0.84, 5.0),
    record("base", 1, 0.82, 12.0),
    record("other", 1, 0.83, 8.0),
    record("other", 2, 0.99, 8.0),
]
ASKED = Plan("asked", {"base": AIR, "absent": AIR, "other": HLB})


def pool_of(runs) -> Pool:
    (pool,) = pooled([("runs.jsonl", runs)], pytest.fail)
    return pool


def test_differences_are_paired_by_seed():
    other, base = RUNS[1], RUNS[0]
    base, other = compare.compare([other, base, *RUNS[2:]], ASKED)
    assert (base.variant, base.difference, base.ratio) == ("base", None, None)
    assert other.accuracy["n"] == 3 and other.accuracy["mean"] == pytest.approx((0.84 + 0.83 + 0.99) / 3)
    assert other.difference["n"] == 2 and other.difference["mean"] == pytest.approx((0.04 + 0.01) / 2)
    # t(0.975, 1) = 12.7062, std of (0.04, 0.01) = 0.03 / sqrt 2
    assert other.difference["ci95"] == pytest.approx(12.7062047 * 0.03 / 2)
    assert other.ratio["mean"] == pytest.approx((10 / 5 + 12 / 8) / 2)
    assert other.pflop == 0.002


def test_only_runs_under_the_same_conditions_are_compared():
    apart = [record("base", 0, 0.5, **change) for change in ({"width": 1.0}, {"dtype": "fp16"}, {"graph": True})]
    assert [len(pool.runs) for pool in pooled([("a", [*RUNS, *apart])], pytest.fail)] == [5, 1, 1, 1]


def test_runs_that_do_not_belong_together_are_refused():
    with pytest.raises(UserError, match="'base' are of two recipes or budgets"):
        compare.compare([*RUNS, record("base", 5, 0.5, recipe={"name": "changed"})], ASKED)


def test_of_a_seed_that_is_there_twice_the_first_run_counts():
    assert compare.compare([*RUNS, record("base", 1, 0.5)], ASKED) == compare.compare(RUNS, ASKED)


def test_table_names_n_and_fits_80_columns():
    pool = pool_of(RUNS)
    _, head, *lines = compare.lines(pool, ASKED)
    assert head.startswith("n = 2 to 3; d f, 10 training and 5 test images; 0.5 x the channels")
    assert all(len(line) <= 80 for line in lines)
    assert "+2.50 +-19.06" in lines[2] and "1.75x" in lines[2]
    assert head.endswith("fp32, reference; 5 runs on cpu, 1 thread, torch 2, triton 3")
    assert lines[2].split()[1] == "2/3"
    assert "Too few runs to tell from 'base': other." in compare.markdown(pool, ASKED, "")


def held_out(entropy, margin):
    return {"cross_entropy": entropy, "temperature": 1.0, "margin": margin}


def test_rulers_are_paired_and_probabilities_are_students():
    """Of the differences (0.04, 0.01): t = 0.025 / 0.015 with one degree of freedom, so 1/2 + atan(t) / pi."""
    runs = [
        {**run, "held_out": held_out(entropy, margin)}
        for run, entropy, margin in zip(RUNS, (0.30, 0.28, 0.31, 0.30, 0.9), (2.0, 2.2, 1.9, 2.1, 9.0))
    ]
    base, other = compare.compare(runs, ASKED)
    assert (base.better, base.ruler_differences) == (None, {})
    assert base.rulers["cross_entropy"]["mean"] == pytest.approx(0.305)
    assert other.ruler_differences["cross_entropy"]["mean"] == pytest.approx(-0.015)
    assert other.ruler_differences["margin"]["n"] == 2
    assert other.better == pytest.approx(0.5 + math.atan(5 / 3) / math.pi)
    # (0.02, 0.01): t = 3
    assert other.better_by_entropy == pytest.approx(0.5 + math.atan(3) / math.pi)
    said = compare.lines(pool_of(runs), ASKED)
    assert all(len(line) <= 80 for line in said[2:]), said
    cells = next(line for line in said[::-1] if line.startswith("other")).split()
    assert cells == [
        "other",
        "-0.0150",
        "+-0.0635",
        "+0.200",
        "+-0.000",
        "82.8",
        "89.8",
        str(compare.pairs_needed(0.03 / 2**0.5)),
    ]
    # runs that know none of it, as those of earlier versions
    assert "cross-entropy" not in compare.markdown(pool_of(RUNS), ASKED, "")
    assert "| base | 0.3050 | 1.950 | - | - | - |" in compare.markdown(pool_of(runs), ASKED, "")


def test_how_many_pairs_tell_a_tenth_of_a_point():
    """The half interval t(0.975, n - 1) * std / sqrt(n): 0.1 points at n, more at n - 1."""
    # t(0.975, 1) * 0.0001 / sqrt 2 = 0.0009
    assert compare.pairs_needed(0.0001) == 2
    # 1.9842 * 0.005 / sqrt 99 = 0.000997, 1.9845 * 0.005 / sqrt 98 = 0.001002
    assert compare.pairs_needed(0.005) == 99


def test_noise_of_rulers_is_told_from_eight_seeds_on():
    runs = [{**record("base", s, 0.9 + s / 1000), "held_out": held_out(0.3 + s / 100, 2.0)} for s in range(8)]
    plan = Plan("asked", {"base": AIR})
    assert compare.noise(compare.compare(runs[:7], plan)) == []
    std = (6**0.5) / 1000
    assert compare.noise(compare.compare(runs, plan)) == [
        "noise of 'base' over seeds (std, n = 8):",
        f"  accuracy {100 * std:.2f} points, cross-entropy {10 * std:.4f}, margin 0.0000",
    ]


def test_equal_epochs_interpolates_between_rungs():
    ladder = [record(f"off {e}", s, 0.8 + (e + e * (s - 0.5) / 1e3) / 100, epochs=e) for e in (4, 6) for s in (0, 1)]
    plan = Plan("asked", {}, ladder=("with", ("off 4", "off 6")))

    def footer(accuracy):
        rows = compare.compare([*ladder, record("with", 0, accuracy)], plan)
        return compare.footers(rows, plan)

    assert footer(0.855) == [
        "with: the accuracy of 4 epochs, for which 'off 4' takes 5.5 (linear interpolation of the means)"
    ]
    assert "outside" in footer(0.9)[0]
    noisy = [record("off 6", 0, 0.83), record("off 6", 1, 0.89), record("with", 0, 0.855)]
    assert "too few runs" in compare.footers(compare.compare([*ladder[:2], *noisy], plan), plan)[0]
    assert compare.footers(compare.compare(ladder, plan), plan) == []


def test_claims_stand_beside_what_is_measured():
    def stem(features, side, macs, milliseconds):
        return {
            "features": features,
            "channels": 32,
            "output": [side, side],
            "macs": macs,
            "milliseconds": milliseconds,
        }

    runs = [
        record(name, seed, accuracy, seconds, stem=each)
        for seed in (0, 1)
        for name, accuracy, seconds, each in (
            ("base", 0.80, 10.0, stem(27, 32, 1000, 4.0)),
            ("other", 0.79 + seed / 1e5, 8.5, stem(12, 31, 250, 3.0)),
        )
    ]
    plan = Plan("asked", ASKED.variants, stems=("base", "other"))
    said = compare.footers(compare.compare(runs, plan), plan)
    assert "- 27 -> 12 features: 27 -> 12" in said
    assert any("0.25x the stem's multiply-adds, 0.75x its time" in line for line in said)
    assert any("1024 -> 961, 0.94x" in line for line in said)
    assert any("1.5 s of 10.0 s, 15.0 %" in line for line in said) and "here -1.00 +-0.01 points" in said[-1]
    assert all(len(line) <= 80 for line in compare.lines(pool_of(runs), plan)[2:]), said
    text = compare.markdown(pool_of(runs), plan, "")
    assert "| other | 12 | 32 | 31x31 | 0 | 3.00 | 0.75x |" in text and "- 27 -> 12" in text


def test_lines_are_appended_and_a_damaged_one_is_named(tmp_path, monkeypatch):
    path = tmp_path / "runs.jsonl"
    assert records.read(path) == []
    for number in range(2):
        records.append(path, {"n": number})
    assert records.read(path) == [{"n": 0}, {"n": 1}]
    path.write_text(path.read_text() + '{"n": \n')
    with pytest.raises(UserError, match=r"line 3 of .*runs\.jsonl is no run"):
        records.read(path)
    with pytest.raises(UserError, match="could not write"):
        records.append(tmp_path / "missing" / "runs.jsonl", {})
    # /dev/zero would never end
    with pytest.raises(UserError, match="/dev/zero is no file"):
        records.read(Path("/dev/zero"))


def test_a_line_that_does_not_fit_on_the_disk_is_taken_back(tmp_path):
    with open("/dev/full", "wb", buffering=0) as full, pytest.raises(OSError):
        full.write(b"x")
    with pytest.raises(UserError, match=r"could not write /dev/full"):
        records.append("/dev/full", {"n": 1})


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_variants_of_a_plan_differ_and_can_be_scaled(plan):
    recipes = list(plan.variants.values())
    assert len({str(recipe) for recipe in recipes}) == len(recipes) > 1
    for recipe in recipes:
        budget = plan_budget(stretched(narrowed(recipe, 0.25), 0.5), 50_000)
        full = plan_budget(recipe, 50_000)
        assert budget.total_steps == pytest.approx(full.total_steps / 2, abs=1)
    if plan.ladder is not None:
        assert {plan.ladder[0], *plan.ladder[1]} <= set(plan.variants)


def test_narrowed_and_stretched():
    recipe = stretched(narrowed(AIR, 0.3), 0.5)
    assert [group.channels for group in recipe.network.conv_groups] == [16, 80, 80]
    assert recipe.epochs == 4 and [group.epochs for group in recipe.param_groups] == [1.5, None, None, None]
    assert narrowed(HLB, 0.01).network.stem_channels == 8
    assert narrowed(HLB, 1.0) == HLB and stretched(HLB, 1.0) == HLB


def tiny(recipe):
    """Small enough for a test, with every block that a plan's recipe may have."""
    return replace(recipe, resolutions=(Resolution(0.5, 0.6),), keep=0.75)


@pytest.fixture
def plan(monkeypatch):
    made = Plan("what a test asks", {"first": tiny(AIR), "second": tiny(HLB)}, stems=("first", "second"))
    monkeypatch.setitem(PLANS, "test", made)
    return made


@pytest.fixture
def call(plan, image_folder):
    """Calls the command on the test's plan and images."""

    def call(*arguments):
        options = ["--data", image_folder, "--batch-size", "8", "--width", "0.1", "--epochs-factor", "0.1"]
        return main(["ablate", "test", *map(str, (*options, "--kernels", "reference", *arguments))])

    return call


def test_a_plan_is_interleaved_written_run_by_run_and_gone_on_with(call, tmp_path, capsys):
    path = tmp_path / "new" / "runs.jsonl"
    assert call("--json", path, "--runs", "1") == 0
    assert [(r["variant"], r["seed"]) for r in records.read(path)] == [("first", 0), ("second", 0)]
    before = path.read_text()
    assert call("--json", path, "--runs", "2") == 0
    assert path.read_text().startswith(before)
    runs = records.read(path)
    assert [(r["variant"], r["seed"]) for r in runs[2:]] == [("first", 1), ("second", 1)]
    for run in runs:
        assert 0 <= run["accuracy"] <= 1 and run["seconds"] > 0 and run["flops"]["total"] > 0
        assert run["command"][:3] == ["blink", "ablate", "test"] and run["command"][-2] == "--runs"
        assert run["stem"]["output"] == [11, 11] and run["stem"]["milliseconds"] > 0
        assert run["recipe"]["network"]["conv_groups"][0]["channels"] in (8, 16)
    assert runs[0]["stem"]["macs"] == 11 * 11 * 12 * 24 and runs[1]["stem"]["macs"] == 11 * 11 * (12 * 12 + 12 * 8)
    out = capsys.readouterr().out
    assert "n = 2;" in out and "what a test asks" in out


def test_another_machines_runs_in_the_file_share_the_table_and_are_not_ours(call, tmp_path, capsys):
    path = tmp_path / "runs.jsonl"
    assert call("--json", path) == 0
    for run in records.read(path):
        records.append(path, {**run, "environment": {**run["environment"], "device": "another", "threads": 3}})
    capsys.readouterr()
    assert call("--json", path) == 0 and len(records.read(path)) == 4
    out = capsys.readouterr().out
    assert out.count("n = 2;") == out.count("2 runs on another, 3 threads,") == 1 and "; 2 runs on " in out
    # what another machine trained of seed 1 is still missing here
    for run in records.read(path)[2:]:
        records.append(path, {**run, "seed": 1})
    assert call("--json", path, "--runs", "2") == 0 and len(records.read(path)) == 8
    assert [(r["seed"], r["environment"]["device"] != "another") for r in records.read(path)[-2:]] == [(1, True)] * 2


def test_runs_of_a_recipe_that_changed_are_not_gone_on_with(call, plan, tmp_path, capsys, monkeypatch):
    path = tmp_path / "runs.jsonl"
    assert call("--json", path, "--only", "second") == 0
    changed = replace(plan, variants={**plan.variants, "second": replace(plan.variants["second"], translation=1)})
    monkeypatch.setitem(PLANS, "test", changed)
    assert call("--json", path, "--only", "second", "--runs", "2") == 2
    err = capsys.readouterr().err
    assert "holds runs of 'second' with another recipe or budget" in err and err.count("\n") == 1
    assert len(records.read(path)) == 1


def test_no_run_begins_that_the_minutes_would_not_hold(call, tmp_path, capsys):
    path = tmp_path / "runs.jsonl"
    assert call("--json", path, "--runs", "3", "--minutes", "0.0001") == 0
    assert "stopped before run" in capsys.readouterr().out and len(records.read(path)) < 6


def test_tuning_split_is_what_is_tested_on(call, tmp_path):
    path = tmp_path / "runs.jsonl"
    assert call("--json", path, "--only", "second", "--tuning-split") == 0
    (run,) = records.read(path)
    assert "tuning split" in run["data"]["name"] and run["variant"] == "second"
    assert run["data"]["train"] + run["data"]["test"] == 40 and run["data"]["test"] <= 20


def test_another_commands_file_is_refused_and_kept(call, tmp_path, capsys):
    path = tmp_path / "race.jsonl"
    records.append(path, {"contestant": "blink"})
    assert call("--json", path) == 2
    err = capsys.readouterr().err
    assert "line 1" in err and "without 'plan'" in err and err.count("\n") == 1
    assert records.read(path) == [{"contestant": "blink"}]


VARIANTS = [(plan, name) for plan in PLANS for name in PLANS[plan].variants]


@pytest.fixture(scope="module")
def dataset():
    return small_dataset(16, 8, side=16)


@pytest.mark.parametrize(("plan", "name"), VARIANTS, ids=[f"{plan}-{name}" for plan, name in VARIANTS])
def test_every_variant_of_every_plan_trains(plan, name, dataset):
    """A step of each, so that a plan does not end hours later at one that cannot."""
    recipe = narrowed(PLANS[plan].variants[name], 0.05)
    budget = plan_budget(recipe, len(dataset.train_images), 8, steps=1)
    compute = precision.choose("fp32", torch.device("cpu"), False)
    trainer = Trainer(recipe, dataset, budget, backend.reference(), compute, False)
    assert all(map(math.isfinite, train(trainer, 0, validate=0).losses))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "third"], "no variant 'third'; it has 'first', 'second'"),
        (["--json", "/dev/null/x"], "could not make the folder /dev/null"),
        (["--json", "/proc/x"], "nothing can be written to /proc"),
        (["--data", "nowhere"], "there is no nowhere"),
        (["--kernels", "compiled", "--graph", "on", "--device", "cpu"], "--graph on needs a GPU"),
    ],
)
def test_mistakes_are_one_line(call, capsys, arguments, message):
    assert call(*arguments) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


def test_without_a_plan_the_plans_are_listed(capsys):
    assert main(["ablate"]) == 0
    out = capsys.readouterr().out
    assert all(f"{name}: " in out for name in PLANS)


def test_records_are_json_lines(call, tmp_path):
    path = tmp_path / "runs.jsonl"
    call("--json", path, "--only", "first")
    assert all(isinstance(json.loads(line), dict) for line in path.read_text().splitlines())
