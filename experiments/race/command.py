"""The work of `blink race`: blocks of runs, in processes of their own, that alternate; ../commands/race.py has its
arguments.
"""

import os
import statistics
import sys
from argparse import Namespace
from pathlib import Path

from rich.console import Console

from blink.errors import UserError
from blink.experiments import records
from blink.experiments.pool import machine_of
from blink.experiments.race import data, table
from blink.experiments.race.contest import OURS, Block, Contestant, run_block
from blink.experiments.race.peers import PEERS, find_script
from blink.files import check_output, make_folder
from blink.training.bars import bars
from blink.training.budget import plan_budget
from blink.training.data.dataset import Dataset
from blink.training.job import count_flops, load_data
from blink.training.recipes import RECIPES, Recipe, with_flip
from blink.training.setting import Setting, choose_setting

_ON_CPU = "on a CPU: CUDA turned to the CPU, float16 to bfloat16, nothing compiled"


def run(options: Namespace) -> int:
    console = Console(highlight=False, markup=False, soft_wrap=True)
    setting = choose_setting(options)
    named, failed = [], False
    for name, script in map(find, options.peers):
        if setting.device.type == "cuda" or PEERS[name].on_cpu:
            named.append((name, script))
        else:
            print(f"blink: {name} needs a GPU, and the device is {setting.device.type}; left out", file=sys.stderr)
            failed = True
    if not named:
        raise UserError("no peer is left to race; name one that can run here")
    path = options.json or options.scratch / "race.jsonl"
    make_folder(options.scratch)
    check_output(path, append=True)
    dataset, notes = load_data(options, console)
    for note in notes:
        console.print(f"note     {note}")
    contestants = [Contestant(OURS, Path.cwd(), options=own_options(options))]
    for name, script in named:
        identity = f"{dataset.fingerprint}-{len(dataset.train_images)}-{len(dataset.test_images)}"
        folder = options.scratch.resolve() / f"{name}-{identity}"
        data.write(PEERS[name].data, dataset, folder, setting.device)
        contestants.append(Contestant(name, folder, PEERS[name], script.resolve()))
    facts = {c.name: describe(c, setting, dataset, options) for c in contestants}
    first = first_block(path, facts[OURS])

    caches = options.scratch.resolve() / "caches" / str(os.getpid())
    jobs = [("cold", first), ("again", first)] if options.cold else []
    jobs += [("block", number) for number in range(first, first + options.blocks)]
    with bars(console) as bar:
        blocks, within = bar.add_task("blocks", total=len(jobs) * len(contestants)), bar.add_task("runs", total=None)
        show = None if bar.disable else lambda ended: bar.update(within, completed=ended)
        for kind, number in jobs:
            # who goes first changes from block to block
            turn = number % len(contestants)
            for contestant in contestants[turn:] + contestants[:turn]:
                asked = options.runs if kind == "block" else 1
                seed = options.seed + number * options.runs
                bar.update(within, description=f"runs of {contestant.name}", completed=0, total=asked)
                block = run_block(contestant, asked, seed, setting.device, caches / contestant.name, show)
                ours = contestant.peer is None
                known = {"kind": kind, "block": number, "seed": seed if ours else None}
                records.append(path, facts[contestant.name] | known | vars(block))
                console.print(f"{kind:<5} {number + 1:3}  {contestant.name:<20} {summary(block)}")
                if block.error is not None:
                    print(f"blink: {contestant.name} {block.error}", file=sys.stderr)
                    failed = True
                bar.advance(blocks)
    found = records.read(path)
    for line in table.text(found) if table.rows(found) else ():
        console.print(line)
    return 2 if failed else 0


def first_block(path: Path, ours: dict) -> int:
    """The number of the next block in this file. Raises UserError when its blocks were run under other conditions."""
    old = records.read(path, ("contestant", "shared", "block"))
    if any(record["shared"] != ours["shared"] for record in old):
        raise UserError(f"{path} holds blocks of other images, another machine or recipe; name another --json")
    return 1 + max((record["block"] for record in old), default=-1)


def summary(block: Block) -> str:
    """A block in a few words."""
    if not block.runs:
        return f"no run in {block.process_seconds:.1f} s"
    accuracy, seconds = (statistics.fmean(run[key] for run in block.runs) for key in ("accuracy", "our_seconds"))
    return f"{len(block.runs)} runs: {accuracy:.4f}, {seconds:.3f} s; {block.process_seconds:.1f} s in all"


def find(text: str) -> tuple[str, Path]:
    """(name, script) of PEER=PATH. Raises UserError."""
    name, mark, path = text.partition("=")
    if not mark or name not in PEERS:
        raise UserError(f"{text!r} is no peer; expected NAME=CHECKOUT with a name of {', '.join(PEERS)}")
    return name, find_script(PEERS[name], Path(path).expanduser())


def own_options(options: Namespace) -> tuple[str, ...]:
    """The options of `blink train` that this project's blocks run with."""
    given = ["--recipe", options.recipe, "--kernels", options.kernels, "--graph", options.graph]
    for name in ("data", "size", "val_split", "limit", "dtype"):
        value = getattr(options, name)
        if value is not None:
            given += [f"--{name.replace('_', '-')}", str(value)]
    return tuple(given + ["--deterministic"] * options.deterministic)


def describe(contestant: Contestant, setting: Setting, dataset: Dataset, options: Namespace) -> dict:
    """What every record of a contestant says besides its runs."""
    recipe: Recipe | None = RECIPES[options.recipe] if contestant.peer is None else contestant.peer.recipe
    if contestant.peer is None and not dataset.mirror:
        # as `blink train` does
        recipe = with_flip(recipe, "none")
    flops = images = None
    if recipe is not None:
        budget = plan_budget(recipe, len(dataset.train_images))
        flops = count_flops(recipe, budget, dataset)["total"] / 1e15
        images = budget.batch_size * budget.total_steps
    environment, adapted = setting.environment, contestant.peer is not None and setting.device.type != "cuda"
    sizes = f"{len(dataset.train_images):,} training and {len(dataset.test_images):,} test images"
    return {
        "contestant": contestant.name,
        "command": ["blink", "race", *options.arguments],
        "shared": {
            "data": f"{dataset.name} {dataset.fingerprint}, {sizes}",
            "kernels": f"{OURS}: {options.recipe}, {setting.backend.name}",
            "dtype": setting.compute.name,
            **machine_of(environment),
        },
        "environment": environment,
        "pflop": flops,
        "images": images,
        "note": f"{contestant.name} {_ON_CPU}" if adapted else None,
    }
