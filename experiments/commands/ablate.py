"""Train every variant of a plan with the same seeds, interleaved, and compare them with the first. Each run is written
when it ends; a later call with the same file goes on where one stopped, and calls at the same time share the runs.
Without a plan, the plans are listed.
"""

import re
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from pathlib import Path

from rich.console import Console

from blink.command import natural, positive
from blink.errors import UserError
from blink.experiments.plans import PLANS, Plan
from blink.training import own
from blink.training.arguments import add_data_arguments, add_setting_arguments, check_data

EXAMPLES = (
    "blink ablate recipes --runs 10",
    "blink ablate search --tuning-split --runs 32 --decide",
)


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
    add("--decide", action="store_true", help="stop variants that cannot win; --runs is how many seeds one has at most")
    add("--minutes", type=positive(float), metavar="M", help="begin no run that would end later")
    add("--shard", type=shard, metavar="I/N",
        help="only part 1 <= I <= N of the runs, for machines without a common disk; see blink merge")  # fmt: skip
    add("--no-wait", action="store_true", help="end when other processes train all that is left")
    add_setting_arguments(parser)
    add = parser.add_argument_group("what is written").add_argument
    add("--json", type=Path, metavar="FILE", help="JSON lines to append to (default: runs/PLAN.jsonl)")


def shard(text: str) -> tuple[int, int]:
    """Of an argument: I/N, 1 <= I <= N."""
    match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise ArgumentTypeError(f"expected I/N with 1 <= I <= N, such as 2/8, not {text!r}")
    return int(match[1]), int(match[2])


def run(options: Namespace) -> int:
    if options.plan is None:
        console = Console(highlight=False, markup=False)
        for name, plan in PLANS.items():
            console.print(f"{name}: {plan.summary}\n  {', '.join(map(repr, plan.variants))}")
        return 0
    if options.decide and options.shard is not None:
        raise UserError("--decide looks at all runs, of which --shard trains a part; give one of them")
    own.check(options.plan, PLANS, Plan)
    check_data(options.data)
    # only now: help and mistakes need no PyTorch
    from blink.experiments import ablate

    return ablate.run(options)
