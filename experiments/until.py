"""The smallest budget at which the mean accuracy reaches a target: the whole schedule is re-run for each budget."""

from collections.abc import Callable
from dataclasses import dataclass

from blink.training.report import with_spread

QUARTERS = 4
_MOST = 4


@dataclass(frozen=True)
class Trial:
    """All runs of one budget. accuracy, seconds: as `report.spread` gives them."""

    epochs: float
    steps: int
    accuracy: dict
    seconds: dict
    pflop: float


def smallest_budget(reaches: Callable[[int], bool], start: int, most: int) -> int | None:
    """The least of 1, 2, ..., most that reaches the target, if more never reaches less; None if not even `most` does.

    From `start` on it goes up or down by a quarter until the target lies between two budgets, then halves what is
    between them. Accuracy is noisy: next to the answer another call may find another neighbour.
    """
    low, high, at = 0, most + 1, start
    while high - low > 1:
        if reaches(at):
            high = at
            at = max(low + 1, min(at - 1, at * 4 // 5)) if low == 0 else (low + high) // 2
        else:
            low = at
            at = min(high - 1, max(at + 1, at * 5 // 4)) if high > most else (low + high) // 2
    return high if high <= most else None


def search(target: float, epochs: float, train: Callable[[float], Trial], say: Callable[[str], None]) -> Trial | None:
    """The trial of the smallest budget, in quarters of an epoch, that reaches `target`; None if none does.

    train(epochs) trains all runs of one budget. Budgets go up to four times `epochs`, where the search starts.
    """
    trials: dict[int, Trial] = {}

    def reaches(quarters: int) -> bool:
        trial = train(quarters / QUARTERS)
        trials[quarters] = trial
        reached = trial.accuracy["mean"] >= target
        say(line(trial, "reached" if reached else "missed"))
        return reached

    start = max(1, round(QUARTERS * epochs))
    found = smallest_budget(reaches, start, _MOST * start)
    return None if found is None else trials[found]


def line(trial: Trial, verdict: str) -> str:
    """A trial in at most 80 columns."""
    return (
        f"{trial.epochs:6.2f} epochs {trial.seconds['mean']:9.2f} s {trial.pflop:.4f} PFLOP  {verdict:<7}  "
        f"{with_spread(trial.accuracy, 4)}"
    )
