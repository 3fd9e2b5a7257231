"""Measure a network that `blink train --out` kept on labelled images: accuracy, by class, confusions and mistakes."""

import argparse
from pathlib import Path

from blink.command import add_json_argument, fraction, positive
from blink.inference.shared import HALVES, add_device_argument, add_model_argument, check_model
from blink.training.arguments import check_data

EXAMPLES = (
    "blink evaluate runs/photographs/blink-seed0.safetensors --data photographs/",
    "blink evaluate model.safetensors --data new/ --tta --csv new.csv",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_argument(parser.add_argument)
    add = parser.add_argument_group("on what").add_argument
    add("--data", required=True, metavar="PATH",
        help="an image or CIFAR folder, or cifar10, cifar100, synthetic; classes are matched by name")  # fmt: skip
    add("--half", choices=HALVES, help="which of its images (default: test; all of a folder without halves)")
    add("--val-split", type=fraction, metavar="F", help="for --half train or test of a folder without test images: the "
        "part held back for testing (default: as the network's training did)")  # fmt: skip
    add("--limit", type=positive(int), metavar="N", help="use the first N images, in the order of blink train --limit")
    add = parser.add_argument_group("how").add_argument
    add("--tta", action="store_true", help="average the views of an image that the recipe does, as a training reports")
    add_device_argument(add)
    add = parser.add_argument_group("what is shown and written").add_argument
    add("--top", type=positive(int), default=10, metavar="K", help="how many mistakes (default: %(default)s)")
    add_json_argument(add, "all figures, the confusion matrix included")
    add("--csv", type=Path, metavar="FILE", help="a row an image: image, label, predicted, probability")


def run(options: argparse.Namespace) -> int:
    check_model(options.model)
    check_data(options.data)
    # only now: help and mistakes need no PyTorch
    from blink.inference import evaluate

    return evaluate.run(options)
