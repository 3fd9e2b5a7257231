"""The runs of plans on file, each once, and what makes two of them the same."""

import json
from collections.abc import Callable
from pathlib import Path

from blink.errors import UserError
from blink.experiments import records
from blink.experiments.pool import conditions, same_recipe

# what each has at least
_KEYS = (
    "plan", "variant", "seed", "width", "epochs_factor", "data", "recipe", "kernels", "dtype", "graph", "deterministic",
    "budget", "environment", "accuracy", "seconds", "flops",
)  # fmt: skip


def trial(run: dict) -> tuple[str, str]:
    """(conditions, variant): what runs share that should differ in their seed only."""
    return json.dumps(conditions(run)), str(run["variant"])


def identity(run: dict) -> tuple[str, int, str]:
    """(conditions, seed, variant): two runs of which all three are alike are the same run, whatever the commit."""
    shared, variant = trial(run)
    return shared, int(run["seed"]), variant


def read(path: Path, note: Callable[[str], None] = records.tell, wait: bool = False) -> list[dict]:
    """As `distinct` leaves them; note, wait: as for `records.read`. Raises UserError."""
    return distinct(records.read(path, _KEYS, note, wait), path, note)


def distinct(written: list[dict], path: Path, note: Callable[[str], None] = records.tell) -> list[dict]:
    """Of a run that is there twice the first, which `note` is told.

    Raises UserError for what is no run, and when a variant's runs are of different recipes.
    """
    found: dict[tuple, dict] = {}
    first: dict[tuple, dict] = {}
    for run in written:
        try:
            if identity(run) in found:
                note(f"{path} holds seed {run['seed']} of {run['variant']!r} twice; the first counts")
            found.setdefault(identity(run), run)
            alike = same_recipe(first.setdefault(trial(run), run), run)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{path} holds what is no run ({error!r}); remove it or name another file") from error
        if not alike:
            raise UserError(f"{path} holds runs of {run['variant']!r} of two recipes or budgets; keep those of one")
    return list(found.values())
