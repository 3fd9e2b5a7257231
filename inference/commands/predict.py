"""Say what images show, by a network that `blink train --out` kept."""

import argparse

from blink.command import positive
from blink.inference.shared import add_device_argument, add_model_argument, check_model

EXAMPLES = (
    "blink predict runs/photographs/blink-seed0.safetensors photograph.jpg",
    "blink predict model.safetensors photographs/ --top 5 --csv",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_argument(parser.add_argument)
    parser.add_argument("images", nargs="+", metavar="IMAGE",
        help="files, folders and all images below them, or - for a list of files on standard input")  # fmt: skip
    parser.add_argument("--top", type=positive(int), default=3, metavar="K", help="how many classes (default: 3)")
    add_device_argument(parser.add_argument)
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="an object a line: image, classes, probabilities")
    form.add_argument("--csv", action="store_true", help="a row an image: image, class 1, probability 1, ...")


def run(options: argparse.Namespace) -> int:
    check_model(options.model)
    # only now: help and mistakes need no PyTorch
    from blink.inference import predict

    return predict.run(options)
