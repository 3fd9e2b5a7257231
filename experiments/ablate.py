"""Train every variant of a plan with the same seeds, interleaved, and compare them with the first. Each run is written
when it ends; a later call with the same file goes on where one stopped. Without a plan, the plans are listed.
"""

import json
import time
from argparse import ArgumentParser, Namespace
from pathlib import Path

from rich.console import Console

from blink.command import natural, positive
from blink.errors import UserError
from blink.experiments import compare, records
from blink.experiments.plans import PLANS, Plan, narrowed, stretched
from blink.files import check_output
from blink.training.bars import RunBars
from blink.training.budget import Budget, plan_budget
from blink.training.data.dataset import Dataset
from blink.training.job import add_data_arguments, count_flops, describe, load_data
from blink.training.listener import SILENT, Listener
from blink.training.loop import train
from blink.training.own import named
from blink.training.recipes import Recipe
from blink.training.setting import Setting, add_setting_arguments, choose_setting
from blink.training.trainer import Trainer

EXAMPLES = (
    "blink ablate recipes --runs 10",
    "blink ablate se --width 0.25 --epochs-factor 0.5 --runs 3 --json se.jsonl",
)
# what a run on file has at least
_KEYS = ("plan", "variant", "seed", "recipe", "budget", "environment", "data")


def add_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument_group("what is trained").add_argument
    add("plan", nargs="?", metavar="PLAN", help="a plan, or FILE.py:NAME of your own; without one, plans are listed")
    add("--only", action="append", metavar="VARIANT", help="this variant; may be given more than once")
    add_data_arguments(add)
    add("--tuning-split", action="store_true", help="test on 500 training images a class, held out from training")
    add("--batch-size", type=positive(int), metavar="B", help="default: each recipe's")
    add("--seed", type=natural, default=0, metavar="S", help="the first seed")
    add = parser.add_argument_group("budget").add_argument
    add("--runs", type=positive(int), default=1, metavar="N", help="seeds a variant (default: %(default)s)")
    add("--width", type=positive(float), default=1.0, metavar="W", help="times the channels (default: %(default)g)")
    add("--epochs-factor", type=positive(float), default=1.0, metavar="F",
        help="times the recipe's epochs (default: %(default)g)")  # fmt: skip
    add("--minutes", type=positive(float), metavar="M", help="begin no run that would end later")
    add_setting_arguments(parser)
    add = parser.add_argument_group("what is written").add_argument
    add("--json", type=Path, metavar="FILE", help="JSON lines to append to (default: runs/PLAN.jsonl)")


def run(options: Namespace) -> int:
    console = Console(highlight=False, markup=False, soft_wrap=True)
    if options.plan is None:
        for name, plan in PLANS.items():
            console.print(f"{name}: {plan.summary}\n  {', '.join(map(repr, plan.variants))}", soft_wrap=False)
        return 0
    began = time.perf_counter()
    plan = named(options.plan, PLANS, Plan)
    chosen = choose_variants(plan, options.plan, options.only)
    path = options.json or Path("runs") / f"{options.plan.rpartition(':')[2]}.jsonl"
    check_output(path, append=True)
    setting = choose_setting(options)
    dataset, notes = load_data(options, console)
    if options.tuning_split:
        dataset = dataset.tuning_split()
    for note in notes:
        console.print(f"note     {note}", style="yellow", soft_wrap=False)
    console.print(f"{options.plan}: {plan.summary}")
    runner = Runner(options, setting, dataset.to(setting.device), plan.stems is not None)
    queue = [(seed, name) for seed in range(options.seed, options.seed + options.runs) for name in chosen]
    longest = 0.0
    with RunBars(console, len(queue)) as bars:
        for number, (seed, name) in enumerate(queue, 1):
            record = runner.describe(name, chosen[name], seed)
            if any(same_run(record, old, path) for old in records.read(path, _KEYS)):
                continue
            spent = time.perf_counter() - began
            if options.minutes is not None and spent + longest > 60 * options.minutes:
                minutes = f"{options.minutes:g} minutes would not hold it"
                console.print(f"stopped before run {number} of {len(queue)}: {minutes}")
                break
            bars.begin(number, f"seed {seed}  {name}")
            record |= runner.run(name, chosen[name], seed, bars)
            longest = max(longest, time.perf_counter() - began - spent)
            records.append(path, record)
            console.print(
                f"{number:4} of {len(queue)}  seed {seed}  {record['accuracy']:.4f}  {record['seconds']:8.2f} s  "
                f"{record['flops']['total'] / 1e15:.4f} PFLOP  {name}"
            )
    written = [r for r in records.read(path, _KEYS) if r["plan"] == options.plan]
    for shared, group in compare.comparable(written):
        for line in compare.lines(shared, group, plan):
            console.print(line)
    return 0


class Runner:
    """Trains one variant with one seed; on a GPU each variant is warmed up, untimed, the first time."""

    def __init__(self, options: Namespace, setting: Setting, dataset: Dataset, stem: bool):
        self._options, self._setting, self._dataset, self._stem = options, setting, dataset, stem
        self._trainers: dict[str, Trainer] = {}
        # what every run of a variant costs
        self._costs: dict[str, dict] = {}

    def scaled(self, recipe: Recipe) -> tuple[Recipe, Budget]:
        recipe = stretched(narrowed(recipe, self._options.width), self._options.epochs_factor)
        return recipe, plan_budget(recipe, len(self._dataset.train_images), self._options.batch_size)

    def describe(self, name: str, recipe: Recipe, seed: int) -> dict:
        """All of the record that is known before the run."""
        record = {
            "plan": self._options.plan,
            "variant": name,
            "seed": seed,
            "width": self._options.width,
            "epochs_factor": self._options.epochs_factor,
            **describe(self._setting, *self.scaled(recipe), self._dataset),
        }
        # as it will be read back: tuples become lists
        return json.loads(json.dumps(record))

    def run(self, name: str, recipe: Recipe, seed: int, listener: Listener = SILENT) -> dict:
        """Train it: what is known of the record only afterwards."""
        recipe, budget = self.scaled(recipe)
        setting, dataset = self._setting, self._dataset
        trainer = self._trainers.get(name)
        if trainer is None:
            trainer = Trainer(recipe, dataset, budget, setting.backend, setting.compute, setting.graph)
            if trainer.compiles:
                # captured graphs and compiled code are worth keeping; else only memory would be kept
                self._trainers[name] = trainer
                trainer.warm_up(seed)
        if name not in self._costs:
            self._costs[name] = {"flops": count_flops(recipe, budget, dataset)}
            if self._stem:
                from blink.experiments.stem import cost_of

                self._costs[name]["stem"] = cost_of(trainer)
        result = train(trainer, seed, listener, validate=0)
        return {
            "accuracy": result.accuracy,
            "seconds": result.seconds,
            "images_per_second": result.images_per_second,
            "epoch_losses": [row.train_loss for row in result.epochs],
            **self._costs[name],
        }


def same_run(record: dict, old: dict, path: Path) -> bool:
    """Whether a run on file is this one: variant, seed, data and machine alike, whatever the commit.

    Raises UserError when the variant's recipe was another then.
    """
    if record["variant"] != old["variant"] or compare.conditions(record) != compare.conditions(old):
        return False
    if not compare.same_recipe(record, old):
        raise UserError(
            f"{path} holds runs of {record['variant']!r} with another recipe or budget; name another --json"
        )
    return record["seed"] == old["seed"]


def choose_variants(plan: Plan, name: str, only: list[str] | None) -> dict[str, Recipe]:
    """Those named, in the plan's order. Raises UserError for one that it does not have."""
    unknown = [variant for variant in only or () if variant not in plan.variants]
    if unknown:
        raise UserError(f"plan {name} has no variant {unknown[0]!r}; it has {', '.join(map(repr, plan.variants))}")
    return {variant: recipe for variant, recipe in plan.variants.items() if only is None or variant in only}
