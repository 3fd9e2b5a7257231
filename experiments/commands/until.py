"""Find the smallest budget whose mean accuracy over --runs reaches a target. Each budget, in quarters of an epoch, is
trained anew, its whole schedule compressed to it.
"""

import argparse

from blink.command import add_json_argument, fraction, positive
from blink.training.arguments import add_job_arguments, check_job

EXAMPLES = (
    "blink until 0.94 --runs 5",
    "blink until 0.6 --recipe hlb --epochs 4 --data photographs/",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("budget").add_argument
    add("accuracy", type=fraction, metavar="ACCURACY", help="the target, as 0.94")
    add("--epochs", type=positive(float), metavar="E", help="where the search begins (default: the recipe's)")
    add("--runs", type=positive(int), default=1, metavar="N", help="train each budget N times (default: %(default)s)")
    add_job_arguments(parser)
    add = parser.add_argument_group("what is written").add_argument
    add_json_argument(add, "write every budget that was tried as JSON")


def run(options: argparse.Namespace) -> int:
    check_job(options)
    # only now: help and mistakes need no PyTorch
    from blink.experiments import until

    return until.run(options)
