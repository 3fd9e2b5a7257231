"""Time one training step by part instead of training: each convolution's three passes, each op, the loss, the
optimizer, idle; what each must compute and move; and the whole step against plain eager PyTorch.
"""

import argparse
from pathlib import Path

from blink.command import add_json_argument, positive
from blink.training.arguments import add_job_arguments, check_job

EXAMPLES = (
    "blink profile",
    "blink profile --recipe hlb --kernels reference --json profile.json",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_job_arguments(parser)
    add = parser.add_argument_group("budget").add_argument
    add("--steps", type=positive(int), metavar="N", help="steps of the run that is profiled (default: the recipe's)")
    add = parser.add_argument_group("what is written").add_argument
    add("--traces", type=Path, default=Path("runs/profile"), metavar="DIR", help="chrome traces (default: %(default)s)")
    add_json_argument(add, "write every number as JSON")


def run(options: argparse.Namespace) -> int:
    check_job(options)
    # only now: help and mistakes need no PyTorch
    from blink.experiments.profile import command

    return command.run(options)
