"""Which variants of a plan still may win: `blink ablate --decide` trains no others.

Successive halving (Jamieson and Talwalkar 2016) with a bar: when all that are left have 2, 4, 8, ... seeds, those of
the worse half go that are better than the best with a probability below 5 %. The first variant always stays, as all are
compared with it. The last two are trained until their difference is told from 0. Of what was stopped when it looked
decided, differences look a little larger than they are.
"""

from blink.experiments import runs
from blink.experiments.compare import probability_above_zero

# a variant that may still be the best with less than this is given up
SURE = 0.05
_FIRST_RUNG = 2
# from so few seeds no last difference is decided
_FEWEST = 4


def stopped(queue: list[dict], written: list[dict]) -> dict[str, str]:
    """Of each variant of the queue that needs no further run, why: computed from what is on file alone."""
    accuracies = _by_variant(queue, written)
    first, *_ = left = list(accuracies)
    out: dict[str, str] = {}
    rung, seeds = _FIRST_RUNG, sorted({run["seed"] for run in queue})
    while rung <= len(seeds):
        known = {name: [accuracies[name].get(seed) for seed in seeds[:rung]] for name in left}
        if any(None in values for values in known.values()):
            break
        order = sorted(left, key=lambda name: -sum(known[name]))
        best = order[0]
        for name in order[(len(order) + 1) // 2 :]:
            above = probability_above_zero([a - b for a, b in zip(known[name], known[best])])
            if name != first and above < SURE:
                out[name] = f"after {rung} seeds better than {best!r} with a probability of {above:.1%}"
        left = [name for name in left if name not in out]
        if len(left) <= 2 and rung >= _FEWEST and (len(left) == 1 or _told(known[left[1]], known[first])):
            reason = f"decided after {rung} seeds"
            return {**dict.fromkeys(left, reason), **out}
        rung *= 2
    return out


def _told(values: list[float], others: list[float]) -> bool:
    """Whether a 95 % interval of the mean difference leaves 0 out."""
    above = probability_above_zero([a - b for a, b in zip(values, others)])
    return not SURE / 2 <= above <= 1 - SURE / 2


def _by_variant(queue: list[dict], written: list[dict]) -> dict[str, dict[int, float]]:
    """variant -> seed -> accuracy, in the queue's order, of its own runs on file."""
    asked = set(map(runs.identity, queue))
    out: dict[str, dict[int, float]] = {run["variant"]: {} for run in queue}
    for run in written:
        if runs.identity(run) in asked:
            out[run["variant"]][run["seed"]] = run["accuracy"]
    return out
