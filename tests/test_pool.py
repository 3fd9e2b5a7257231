"""Runs of several machines and files in one table: what pools, what is paired with what, and what is said of it."""

import pytest

from blink.experiments import compare, provenance
from blink.experiments.plans import Plan
from blink.experiments.pool import pooled
from blink.training.recipes import AIR, HLB
from tests.test_ablate import held_out, pool_of, record

PLAN = Plan("asked", {"base": AIR, "other": HLB, "third": HLB})
GPU = {"device": "gpu", "threads": 16, "power_limit": "700 W", "torch": "4", "triton": "5"}
# of the differences 0.01, 0.02, 0.03
MEAN, STD = 0.02, 0.01


def there(variant, seed, accuracy, seconds=1.0, **changes):
    return record(variant, seed, accuracy, seconds, environment=GPU, **changes)


def two_machines():
    """The GPU is 5 points better and 10 times as fast; of either machine's difference nothing is left of that."""
    here = [record("base", 0, 0.80, 10.0), record("other", 0, 0.81, 5.0)]
    gpu = [there("base", s, 0.85, 1.0) for s in (0, 1)] + [there("other", s, 0.87 + s / 100, 0.5) for s in (0, 1)]
    return here + gpu


def test_an_offset_between_machines_cancels_in_the_pairs():
    base, other = compare.compare(pool_of(two_machines()).runs, PLAN)
    assert other.accuracy["n"] == base.accuracy["n"] == other.pairs == 3
    assert other.difference["mean"] == pytest.approx(MEAN) and other.difference["std"] == pytest.approx(STD)
    # 2 on every machine, whatever its seconds, of which there is no mean
    assert (other.ratio["mean"], other.ratio["std"]) == (pytest.approx(2), pytest.approx(0))
    assert base.seconds is None and other.seconds is None
    assert base.accuracy["mean"] == pytest.approx((0.80 + 2 * 0.85) / 3)


def test_rulers_are_paired_within_a_machine_too():
    entropies = {"base": {"cpu": 0.5, "gpu": 0.3}, "other": {"cpu": 0.49, "gpu": 0.28}}
    runs = [
        {**run, "held_out": held_out(entropies[run["variant"]][run["environment"]["device"]], 1.0)}
        for run in two_machines()
    ]
    _, other = compare.compare(pool_of(runs).runs, PLAN)
    assert other.ruler_differences["cross_entropy"]["mean"] == pytest.approx(-(0.01 + 2 * 0.02) / 3)
    assert other.ruler_differences["margin"]["mean"] == 0


def test_the_table_says_where_runs_came_from_and_has_no_seconds():
    pool = pool_of(two_machines())
    _, head, _, base, other, *_ = compare.lines(pool, PLAN)
    assert head.endswith(
        "fp32, reference; 2 runs on cpu, 1 thread, torch 2, triton 3; 4 runs on gpu, 700 W, torch 4, triton 5"
    )
    assert base.split()[-3:] == ["-", "1", "0.0020"]
    assert other.split() == ["other", "3", "85.33", "+-9.40", "+2.00", "+-2.48", "-", "2.00x", "0.0020"]
    assert "| other | 3 |" not in compare.markdown(pool, PLAN, "")


def test_a_variant_without_a_partner_on_its_machine_has_no_difference():
    pool = pool_of([*two_machines(), there("third", 2, 0.9), there("third", 3, 0.9)])
    *_, third = compare.compare(pool.runs, PLAN)
    assert (third.accuracy["n"], third.pairs, third.difference, third.ratio, third.better) == (2, 0, None, None, None)
    assert third.variant == "third" and not third.first and compare.verdict(third) is None
    line = next(line for line in compare.lines(pool, PLAN) if line.startswith("third"))
    assert line.split() == ["third", "0/2", "90.00", "+-0.00", "-", "-", "-", "0.0020"]
    # beside the differences of others its own absolute values would be taken for such
    assert compare.ruler_cells(third) == ("third", "-", "-", "-", "-", "-")


def test_stems_are_compared_within_a_machine():
    def stem(ms):
        return {"features": 12, "channels": 32, "output": [31, 31], "macs": 1000, "milliseconds": ms}

    runs = [record("base", 0, 0.8, stem=stem(8.0)), record("other", 0, 0.8, stem=stem(4.0))]
    runs += [there("base", 0, 0.8, stem=stem(0.2)), there("other", 0, 0.8, stem=stem(0.06))]
    plan = Plan("asked", PLAN.variants, stems=("base", "other"))
    rows = compare.compare(pool_of(runs).runs, plan)
    assert [row.stem_ratio for row in rows] == [1, pytest.approx((0.5 + 0.3) / 2)]
    assert compare.stem_cells(rows[1])[-2:] == ("-", "0.40x")
    said = compare.footers(rows, plan)
    assert any("0.40x its time" in line for line in said)
    # on either machine 10 s, or 1 s, of both variants
    assert "- over a second saved of about ten: 0.0 %; by operations 0.0 %" in said
    alone = compare.footers(compare.compare([runs[0], runs[3]], plan), plan)
    assert "- over a second saved of about ten: no machine trained both; by operations 0.0 %" in alone


def test_files_pool_and_a_run_in_two_of_them_counts_once():
    runs, notes = two_machines(), []
    changed = {**runs[1], "accuracy": 0.1}
    (pool,) = pooled([("a", runs[:2]), ("b", [changed, *runs[2:]])], notes.append)
    assert {name: len(found) for name, found in pool.by_file.items()} == {"a": 2, "b": 4}
    assert pool.runs == runs and notes == ["b: 1 of its runs are in a file before it too; the first counts"]


def test_runs_of_another_recipe_or_budget_stay_apart():
    """All of that machine: its variants are compared with the first one as it was there."""
    runs = two_machines()
    for change in ({"recipe": {"name": "changed"}}, {"epochs": 5}):
        gpu = [there("base", 0, 0.8, **change), there("other", 0, 0.9)]
        pools = pooled([("a", [*runs[:2], *gpu])], pytest.fail)
        assert [pool.runs for pool in pools] == [runs[:2], gpu]


def differing(*points):
    runs = [record("base", seed, 0.5) for seed in range(len(points))]
    return compare.compare(runs + [record("other", s, 0.5 + p / 100) for s, p in enumerate(points)], PLAN)[1]


@pytest.mark.parametrize(
    ("points", "said"),
    [
        # half intervals: t(0.975, 2) = 4.3027 times std / sqrt 3
        ((0.9, 1.0, 1.1), "better"),
        ((-0.9, -1.0, -1.1), "worse"),
        # 0.2484 around 0.25 and around 0.24
        ((0.15, 0.25, 0.35), "better"),
        ((0.14, 0.24, 0.34), None),
        # 0.1987 around 0 and around -0.1, 0.2012 around 0
        ((-0.08, 0.0, 0.08), "no more than 0.20 points either way"),
        ((-0.18, -0.1, -0.02), "no more than 0.30 points either way"),
        ((-0.081, 0.0, 0.081), None),
        # no interval, and one of no width
        ((5.0,), None),
        ((1.0, 1.0), None),
        ((0.0, 0.0, 0.0), None),
    ],
)
def test_verdicts_are_of_the_interval_alone(points, said):
    assert compare.verdict(differing(*points)) == said


def test_a_bound_is_rounded_upwards():
    # 4.3027 * 0.05 / sqrt 3 = 0.12421
    assert compare.verdict(differing(-0.05, 0.0, 0.05)) == "no more than 0.13 points either way"


def test_a_variant_that_is_bound_to_a_small_difference_is_tabulated():
    runs = [record("base", s, 0.5) for s in range(3)] + [record("other", s, 0.5 + (s - 0.8) / 2e3) for s in range(3)]
    text = compare.markdown(pool_of(runs), PLAN, "where from\n")
    assert "| other | 3 | 50.01 +-0.12 | +0.01 +-0.12 |" in text and "Too few" not in text
    assert text.split("\n\n")[1] == "where from"


def test_numbers_as_ranges():
    assert provenance.ranges([5, 0, 1, 2, 2, 8, 9]) == "0 to 2, 5, 8, 9"


def test_where_results_come_from():
    def run(command, commit):
        return {"command": command, "environment": {"commit": commit}}

    known = run(["blink", "ablate", "se", "--only", "2x2 same", "--json", "a.jsonl"], "c0ffee")
    assert provenance.paragraph([known, known], [3, 4, 5]) == (
        "`blink ablate se --only '2x2 same' --json a.jsonl`; seeds 3 to 5; commit c0ffee.\n"
    )
    other = {"environment": {"commit": "beef+"}}
    assert provenance.paragraph([known, other], [3]) == (
        "`blink ablate se --only '2x2 same' --json a.jsonl`, not recorded of 1 run; seed 3; commits c0ffee, beef+.\n"
    )
    assert provenance.paragraph([{"environment": {}}], []) == (
        "Command not recorded; seeds not recorded; commit not recorded.\n"
    )
    assert provenance.commands([run(["blink", "`"], None)]) == "`` blink '`' ``"
