"""Train a network from random weights, one or several times, and report its accuracy."""

import argparse
from pathlib import Path

from blink.command import add_json_argument, natural, positive
from blink.training import peers
from blink.training.arguments import add_job_arguments, check_job

EXAMPLES = (
    "blink train --data photographs/ --epochs 20 --out runs/photographs",
    "blink train --recipe hlb --kernels reference --runs 5 --json hlb.json",
)
DISTRIBUTED = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("budget").add_argument
    add("--epochs", type=positive(float), metavar="E", help="passes over the data (default: the recipe's)")
    add("--steps", type=positive(int), metavar="N", help="compress the whole schedule to N steps")
    add("--runs", type=positive(int), default=1, metavar="N", help="train N times (default: %(default)s)")
    add("--ddp", action="store_true", help="of torchrun's processes: train each run together, not each its own")
    add("--validate", type=natural, metavar="N", help="test images for each epoch's accuracy (0: none)")
    add = parser.add_argument_group("where it begins").add_argument
    add("--init", type=Path, metavar="FILE", help="with the weights of an earlier run, in place of random ones")
    add("--resume", type=Path, metavar="DIR", help="go on with what was interrupted, as its command said")
    add_job_arguments(parser)
    add = parser.add_argument_group("what is written").add_argument
    add("--out", type=Path, metavar="DIR", help="save each run's network, checkpoints and the summary here")
    add("--keep", choices=("last", "best"), default="last",
        help="which weights: the last epoch's, or those that did best in validation (default: last)")  # fmt: skip
    add("--checkpoint-every", type=natural, default=1, metavar="E",
        help="epochs from one checkpoint in --out to the next (default: %(default)s; 0: none)")  # fmt: skip
    add_json_argument(add, "write the summary and all runs as JSON", overwritten="--out and --json")
    add("--csv", type=Path, metavar="FILE", help="write a row an epoch")
    add("--tensorboard", type=Path, metavar="DIR", help="write a run of TensorBoard's a seed here")
    add("--wandb", metavar="PROJECT", help="follow each seed as a run of this project of Weights & Biases")


def run(options: argparse.Namespace) -> int:
    # one of several processes tells the others of its mistakes; --resume has a recipe and data of its own
    if options.resume is None and peers.place().size == 1:
        check_job(options)
    # only now: help and mistakes need no PyTorch
    from blink.training import command

    return command.run(options)
