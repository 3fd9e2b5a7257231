"""A recipe that two plans name: its runs count in both."""

import json
from dataclasses import asdict

import pytest

from blink.experiments.lending import lent
from blink.experiments.plans import PLANS, narrowed, stretched
from blink.experiments.runs import trial
from tests.test_ablate import record

SE, WHITENING = PLANS["se"].variants, PLANS["whitening"].variants


def run(plan: str, variant: str, seed: int = 0, batch_size: int = 512, **changes) -> dict:
    recipe = json.loads(json.dumps(asdict(stretched(narrowed(PLANS[plan].variants[variant], 0.5), 1.0))))
    budget = {"total_steps": 8, "steps_per_epoch": 2, "batch_size": batch_size}
    return record(variant, seed, 0.9, recipe=recipe, **{"plan": plan, "budget": budget, **changes})


def conditions(of: dict, plan: str) -> set[str]:
    return {trial({**of, "plan": plan})[0]}


def test_a_run_is_lent_to_the_variant_of_the_same_recipe():
    whitening = run("whitening", "2x2 unpadded", seed=3)
    (copy,) = lent([whitening], "se", SE, conditions(whitening, "se"))
    assert copy == {**whitening, "plan": "se", "variant": "reduction 16"}
    (back,) = lent([copy], "whitening", WHITENING, conditions(whitening, "whitening"))
    assert back == whitening


@pytest.mark.parametrize(
    "changes, why",
    [
        ({"variant": "3x3 same"}, "no variant of se has that stem"),
        ({"width": 1.0}, "its recipe is not that width's"),
        ({"dtype": "bf16"}, "other conditions than were asked for"),
        ({"batch_size": 500}, "a batch size of its own"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_differs_is_not_lent(changes, why):
    given = {"variant": "2x2 unpadded", **changes}
    asked = conditions(run("whitening", "2x2 unpadded", **({"width": 1.0} if "width" in changes else {})), "se")
    assert not lent([run("whitening", **given)], "se", SE, asked), why


def test_the_plans_own_run_counts_before_a_lent_one():
    own, other = run("se", "reduction 16"), run("whitening", "2x2 unpadded")
    assert not lent([other, own], "se", SE, conditions(own, "se"))
    assert lent([other, run("se", "reduction 16", seed=1)], "se", SE, conditions(own, "se"))
