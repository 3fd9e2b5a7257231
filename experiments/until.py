"""The work of `blink until`, a search for the smallest budget; commands/until.py has its arguments."""

import argparse
from collections.abc import Callable
from dataclasses import asdict, dataclass

from rich.console import Console

from blink.errors import UserError
from blink.files import check_json, write_json
from blink.training.bars import RunBars
from blink.training.budget import plan_budget
from blink.training.job import count_flops, prepare
from blink.training.loop import train
from blink.training.results import spreads, with_spread

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


def run(options: argparse.Namespace) -> int:
    check_json(options)
    console = Console(highlight=False, markup=False, soft_wrap=True)
    job = prepare("until", options, console, options.epochs)
    tried: list[Trial] = []

    def train_all(epochs: float) -> Trial:
        budget = plan_budget(
            job.recipe, len(job.dataset.train_images), options.batch_size, epochs, None, options.micro_batch
        )
        trainer = job.trainer(budget)
        if trainer.compiles:
            trainer.warm_up(options.seed)
        with RunBars(console, options.runs, f"runs of {epochs:g} epochs", budget.total_steps) as bars:
            results = [train(trainer, options.seed + number, bars, validate=0) for number in range(options.runs)]
        pflop = count_flops(job.recipe, budget, job.dataset)["total"] / 1e15
        tried.append(Trial(epochs, budget.total_steps, **spreads(results), pflop=pflop))
        # after each, so that nothing that ends this process takes a finished one with it
        write(None)
        return tried[-1]

    def write(smallest: Trial | None) -> None:
        if options.json is not None:
            found = {"target": options.accuracy, "trials": [asdict(trial) for trial in tried]}
            found["smallest"] = None if smallest is None else asdict(smallest)
            write_json(options.json, {**job.facts, "until": found})

    for note in job.notes:
        console.print(f"note     {note}")
    console.print(f"the smallest budget whose mean of {options.runs} run(s) reaches {options.accuracy:.4f}")
    smallest = search(options.accuracy, options.epochs or job.recipe.epochs, train_all, console.print)
    write(smallest)
    if smallest is None:
        most = max(trial.epochs for trial in tried)
        raise UserError(
            f"no budget up to {most:g} epochs reached {options.accuracy:g}; lower it, or begin at more --epochs"
        )
    console.print(f"smallest: {smallest.epochs:g} epochs, {smallest.seconds['mean']:.2f} s, {smallest.pflop:.4f} PFLOP")
    return 0
