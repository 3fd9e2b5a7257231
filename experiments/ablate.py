"""The work of `blink ablate`: every variant of a plan with the same seeds; commands/ablate.py has its arguments."""

import json
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from blink.errors import UserError
from blink.experiments import compare, deciding, pool, records, runs
from blink.experiments.claims import Claims
from blink.experiments.lending import lent
from blink.experiments.plans import PLANS, Plan, narrowed, stretched
from blink.files import check_output
from blink.training.bars import RunBars
from blink.training.budget import Budget, plan_budget
from blink.training.data.dataset import Dataset
from blink.training.job import count_flops, describe, load_data
from blink.training.listener import SILENT, Listener
from blink.training.loop import train
from blink.training.own import named
from blink.training.recipes import Recipe, with_flip
from blink.training.setting import Setting, choose_setting
from blink.training.trainer import Trainer

# seconds between two looks at what other processes have done, at most
_LOOK_EVERY = 5.0


def run(options: Namespace) -> int:
    console = Console(highlight=False, markup=False, soft_wrap=True)
    began = time.perf_counter()
    plan = named(options.plan, PLANS, Plan)
    chosen = choose_variants(plan, options.plan, options.only)
    part = "" if options.shard is None else ".{}-of-{}".format(*options.shard)
    path = options.json or Path("runs") / f"{options.plan.rpartition(':')[2]}{part}.jsonl"
    check_output(path, append=True)
    setting = choose_setting(options)
    dataset, notes = load_data(options, console)
    if options.tuning_split:
        dataset = dataset.tuning_split()
    if not dataset.mirror:
        chosen = {name: with_flip(recipe, "none") for name, recipe in chosen.items()}
        notes.append("mirror images are of other classes here: no variant mirrors any")
    told: set[str] = set()

    def note(line: str) -> None:
        if line not in told:
            told.add(line)
            console.print(f"note     {line}", style="yellow", soft_wrap=False)

    for line in notes:
        note(line)
    console.print(f"{options.plan}: {plan.summary}")
    runner = Runner(options, chosen, setting, dataset.to(setting.device), plan.stems is not None)
    queue = [
        runner.describe(name, seed) for seed in range(options.seed, options.seed + options.runs) for name in chosen
    ]
    if options.shard is not None:
        queue = part_of(queue, *options.shard)
        console.print(f"part {options.shard[0]} of {options.shard[1]}: {len(queue)} runs")
    with records.locked(path):
        # seen to be possible before hours are spent on what will need it
        pass
    asked = {runs.trial(run)[0] for run in queue}

    def read() -> list[dict]:
        written = runs.read(path, note, wait=True)
        return written + lent(written, options.plan, chosen, asked)

    train_missing(queue, path, read, runner, console, note, began)
    own = [run for run in read() if run["plan"] == options.plan]
    for each in pool.pooled([(path.name, own)], note):
        for line in compare.lines(each, plan):
            console.print(line)
    return 0


def train_missing(
    queue: list[dict], path: Path, read: Callable[[], list[dict]], runner: "Runner", console: Console,
    note: Callable[[str], None], began: float,
) -> None:  # fmt: skip
    """Until every run of the queue is on file, or what the options bound: train one that nobody trains, or wait.

    read: gives what is on file at `path`, and what of it other plans lend.
    """
    options, claims, longest, looks = runner.options, Claims(path), 0.0, 0
    with RunBars(console, len(queue)) as bars:
        while left := worth_training(queue, path, read(), options.decide, note):
            if options.minutes is not None and time.perf_counter() - began + longest > 60 * options.minutes:
                number, minutes = queue.index(left[0]) + 1, f"{options.minutes:g} minutes would not hold it"
                console.print(f"stopped before run {number} of {len(queue)}: {minutes}")
                break
            claim = next(filter(None, map(claims.take, left)), None)
            if claim is None:
                owners = claims.owners(left)
                if owners and (options.no_wait or not looks):
                    what = f"{len(left)} of {len(queue)} runs are {'left to' if options.no_wait else 'waited for:'}"
                    console.print(f"{what} {', '.join(owners)}", soft_wrap=False)
                    if options.no_wait:
                        break
                time.sleep(min(_LOOK_EVERY, 0.1 * 2**looks))
                looks += bool(owners)
                continue
            with claim:
                looks = 0
                if not missing([claim.run], read(), path):
                    # its last owner wrote it between the look and the claim
                    continue
                what, steps = f"seed {claim.run['seed']}  {claim.run['variant']}", claim.run["budget"]["total_steps"]
                bars.begin(len(queue) - len(left) + 1, what, steps)
                before = time.perf_counter()
                run = claim.run | runner.run(claim.run["variant"], claim.run["seed"], bars)
                longest = max(longest, time.perf_counter() - before)
                if not records.append(path, run, runs.identity):
                    note(f"another process wrote seed {run['seed']} of {run['variant']!r} meanwhile; that one counts")
            console.print(
                f"{queue.index(claim.run) + 1:4} of {len(queue)}  seed {run['seed']}  {run['accuracy']:.4f}  "
                f"{run['seconds']:8.2f} s  {run['flops']['total'] / 1e15:.4f} PFLOP  {run['variant']}"
            )
    claims.remove_void()


class Runner:
    """Trains one variant with one seed; on a GPU each variant is warmed up, untimed, the first time."""

    def __init__(self, options: Namespace, variants: dict[str, Recipe], setting: Setting, dataset: Dataset, stem: bool):
        self.options, self._setting, self._dataset, self._stem = options, setting, dataset, stem
        self._scaled = {name: self._scale(recipe) for name, recipe in variants.items()}
        self._trainers: dict[str, Trainer] = {}
        # what every run of a variant costs
        self._costs: dict[str, dict] = {}

    def _scale(self, recipe: Recipe) -> tuple[Recipe, Budget]:
        recipe = stretched(narrowed(recipe, self.options.width), self.options.epochs_factor)
        return recipe, plan_budget(recipe, len(self._dataset.train_images), self.options.batch_size)

    def describe(self, name: str, seed: int) -> dict:
        """All of the record that is known before the run."""
        record = {
            "plan": self.options.plan,
            "variant": name,
            "seed": seed,
            "width": self.options.width,
            "epochs_factor": self.options.epochs_factor,
            **describe(self._setting, *self._scaled[name], self._dataset),
        }
        # as it will be read back: tuples become lists
        return json.loads(json.dumps(record))

    def run(self, name: str, seed: int, listener: Listener = SILENT) -> dict:
        """Train it: what is known of the record only afterwards."""
        recipe, budget = self._scaled[name]
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
            "command": ["blink", "ablate", *self.options.arguments],
            "accuracy": result.accuracy,
            "seconds": result.seconds,
            "images_per_second": result.images_per_second,
            "held_out": result.held_out and asdict(result.held_out),
            "epoch_losses": [row.train_loss for row in result.epochs],
            **self._costs[name],
        }


def worth_training(
    queue: list[dict], path: Path, written: list[dict], decide: bool, note: Callable[[str], None]
) -> list[dict]:
    """The runs that are missing, but for those of variants that are stopped, which is noted."""
    stopped = deciding.stopped(queue, written) if decide else {}
    for name, why in stopped.items():
        note(f"{name}: no more runs ({why})")
    return [run for run in missing(queue, written, path) if run["variant"] not in stopped]


def missing(queue: list[dict], written: list[dict], path: Path) -> list[dict]:
    """The runs of the queue that are not on file. Raises UserError where a variant's recipe was another then."""
    trials, found = {runs.trial(run): run for run in written}, set(map(runs.identity, written))
    for run in queue:
        if not pool.same_recipe(trials.get(runs.trial(run), run), run):
            raise UserError(
                f"{path} holds runs of {run['variant']!r} with another recipe or budget; name another --json"
            )
    return [run for run in queue if runs.identity(run) not in found]


def part_of(queue: list[dict], i: int, n: int) -> list[dict]:
    """Part i of n, i from 1 on: neighbours, so that a seed's runs stay together; sizes differ by 1 at most."""
    return queue[(i - 1) * len(queue) // n : i * len(queue) // n]


def choose_variants(plan: Plan, name: str, only: list[str] | None) -> dict[str, Recipe]:
    """Those named, in the plan's order. Raises UserError for one that it does not have."""
    unknown = [variant for variant in only or () if variant not in plan.variants]
    if unknown:
        raise UserError(f"plan {name} has no variant {unknown[0]!r}; it has {', '.join(map(repr, plan.variants))}")
    return {variant: recipe for variant, recipe in plan.variants.items() if only is None or variant in only}
