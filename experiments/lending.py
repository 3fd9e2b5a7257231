"""Runs that count in several plans: a recipe that two plans name needs to be trained once."""

import json
from dataclasses import asdict

from blink.experiments import runs
from blink.experiments.plans import narrowed, stretched
from blink.training.recipes import Recipe


def lent(written: list[dict], plan: str, variants: dict[str, Recipe], among: set[str]) -> list[dict]:
    """Runs of other plans as runs of this one: of its variant of the same recipe, unless that has the run itself.

    among: the conditions (`runs.trial`) that a run may have to be taken. Runs with another batch size than their
    recipe's are left to their own plan.
    """
    known = {runs.identity(run) for run in written if run["plan"] == plan}
    recipes: dict[tuple[float, float], dict[str, dict]] = {}
    out = []
    for run in written:
        copy = run | {"plan": plan}
        if run["plan"] == plan or runs.trial(copy)[0] not in among:
            continue
        scale = run["width"], run["epochs_factor"]
        if scale not in recipes:
            recipes[scale] = {name: _as_written(recipe, *scale) for name, recipe in variants.items()}
        for name, recipe in recipes[scale].items():
            copy = copy | {"variant": name}
            alike = recipe == run["recipe"] and recipe["batch_size"] == run["budget"]["batch_size"]
            if alike and runs.identity(copy) not in known:
                known.add(runs.identity(copy))
                out.append(copy)
    return out


def _as_written(recipe: Recipe, width: float, epochs_factor: float) -> dict:
    """The recipe at this scale as a run has it on file."""
    return json.loads(json.dumps(asdict(stretched(narrowed(recipe, width), epochs_factor))))
