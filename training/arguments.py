"""The arguments that commands which train share. Nothing here imports PyTorch: help and mistakes need none."""

import argparse
from pathlib import Path

from blink.command import fraction, natural, positive
from blink.errors import UserError
from blink.files import is_missing
from blink.model.config import CHOICES
from blink.training import own
from blink.training.recipes import RECIPES, Recipe

# of a side; more pixels than any of the networks here is for
_LARGEST_SIZE = 4096
STEMS = {"2x2": (2, 0), "3x3": (3, 0), "2x2-same": (2, "same"), "3x3-same": (3, "same"), "none": (None, "same")}
# of `precision`, by name
DTYPES = ("fp32", "fp16", "bf16")
# of `training.data`
DATA_SETS = ("cifar10", "cifar100", "mnist", "fashionmnist", "svhn", "synthetic")


def add_job_arguments(parser: argparse.ArgumentParser) -> None:
    """What is trained and how it computes; a command adds its own budget."""
    add = parser.add_argument_group("what is trained").add_argument
    add("--recipe", default="blink", help="see blink recipes, or FILE.py:NAME of your own (default: %(default)s)")
    add_data_arguments(add)
    add("--stem", choices=STEMS, help="whitening convolution: kernel and padding, or none (default: the recipe's)")
    add("--se", type=se_reduction, metavar="R|off", help="squeeze-and-excite reduction (default: the recipe's)")
    add("--flip", choices=("none", "random", "alternating"),
        help="mirroring of training images; none: of test images neither (default: the recipe's; digits: "
        "none)")  # fmt: skip
    add("--set", action="append", default=[], metavar="NAME=VALUE",
        help="any setting of the recipe, as blink recipes RECIPE lists it; may be given again")  # fmt: skip
    add("--batch-size", type=positive(int), metavar="B", help="default: the recipe's, smaller for small data sets")
    add("--micro-batch", type=positive(int), metavar="N", help="images of a batch on the device at a time, whose "
        "gradients add up; BatchNorm is by these (default: all)")  # fmt: skip
    add("--seed", type=natural, default=0, metavar="S", help="of the first run; the next one has the next (default: 0)")
    add_setting_arguments(parser)


def add_data_arguments(add) -> None:
    add("--data", metavar="PATH", help="a folder of images, of Parquet files or of a published data set, or cifar10, "
        "cifar100, mnist, fashionmnist, svhn, synthetic (default: cifar10, below data/ or downloaded, else "
        "synthetic)")  # fmt: skip
    add("--size", type=positive(int, _LARGEST_SIZE), metavar="N", help="scale and crop the images of a "
        "folder to NxN (default: their one size, else that of most, else 32)")  # fmt: skip
    add("--val-split", type=fraction, metavar="F", help="the part of each class that is held back for testing where a "
        "folder has no test images (default: 0.1)")  # fmt: skip
    add("--limit", type=positive(int), metavar="N", help="no more than N training and N test images, always the same")


def add_setting_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("how it computes").add_argument
    add("--kernels", choices=CHOICES, default="auto", help="auto: fused on a GPU, native on a CPU")
    add("--graph", choices=("auto", "on", "off"), default="auto",
        help="replay each step as a CUDA graph (auto: on a GPU)")  # fmt: skip
    add("--device", metavar="NAME", help="cpu or cuda (default: cuda if there is one)")
    add("--dtype", choices=DTYPES, help="compute dtype (default: fp16 on a GPU; bf16 or fp32 on a CPU)")
    add("--deterministic", action="store_true", help="bitwise repeatable runs (slower convolutions)")


def se_reduction(text: str) -> int | str:
    return text if text == "off" else positive(int)(text)


def check_job(options: argparse.Namespace) -> None:
    """What can be seen of --recipe and --data before the work. Raises UserError."""
    own.check(options.recipe, RECIPES, Recipe)
    check_data(options.data)


def check_data(source: str | None) -> None:
    """Raises UserError for what is neither the name of a data set nor there."""
    if source is not None and source not in DATA_SETS and is_missing(Path(source)):
        raise no_data(Path(source))


def no_data(path: Path) -> UserError:
    return UserError(f"there is no {path}; --data takes a folder, or {', '.join(DATA_SETS)}")
