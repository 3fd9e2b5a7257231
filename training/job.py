"""What a command that trains was asked for: data, recipe, budget and setting, and how a result names them."""

import argparse
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime

from rich.console import Console
from torch import Tensor

from blink.command import STARTED, fraction, natural, positive
from blink.training import data
from blink.training.bars import bars
from blink.training.budget import Budget, plan_budget
from blink.training.data.dataset import Dataset
from blink.training.distributed import ALONE, Ranks
from blink.training.overrides import with_settings
from blink.training.own import named
from blink.training.recipes import RECIPES, Recipe, with_flip, with_network
from blink.training.setting import Setting, add_setting_arguments, choose_setting
from blink.training.trainer import Trainer

# of a side; more pixels than any of the networks here is for
_LARGEST_SIZE = 4096
STEMS = {"2x2": (2, 0), "3x3": (3, 0), "2x2-same": (2, "same"), "3x3-same": (3, "same"), "none": (None, "same")}


@dataclass
class Job:
    """dataset: on the setting's device; notes: what a person should know of it, in lines; facts: all that a result
    must name besides its runs, ready for JSON.
    """

    recipe: Recipe
    dataset: Dataset
    budget: Budget
    setting: Setting
    notes: list[str]
    facts: dict

    def trainer(
        self, budget: Budget | None = None, initial: dict[str, Tensor] | None = None, ranks: Ranks = ALONE
    ) -> Trainer:
        """A trainer of this job, or of another budget of it, from random weights or from `initial` ones."""
        setting, budget = self.setting, budget or self.budget
        how = (setting.backend, setting.compute, setting.graph)
        return Trainer(self.recipe, self.dataset, budget, *how, initial, ranks)


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


def se_reduction(text: str) -> int | str:
    return text if text == "off" else positive(int)(text)


def prepare(
    name: str, options: argparse.Namespace, console: Console, epochs: float | None = None, steps: int | None = None,
    recipe: Recipe | None = None, dataset: Dataset | None = None,
) -> Job:  # fmt: skip
    """The job of `blink NAME`, its data loaded. recipe, dataset: in place of those that the options name.

    Raises UserError.
    """
    whole = recipe or named(options.recipe, RECIPES, Recipe)
    recipe = customized(whole, options)
    setting = choose_setting(options)
    imported = time.perf_counter()
    dataset, notes = load_data(options, console) if dataset is None else (dataset.limited(options.limit), [])
    if options.limit is None:
        notes += unequal_classes(dataset)
    if not dataset.mirror and options.flip is None:
        upright = customized(with_flip(whole, "none"), options)
        if upright != recipe:
            notes.append("mirror images are of other classes here: the recipe's mirroring is off (--flip)")
        recipe = upright
    dataset = dataset.to(setting.device)
    budget = plan_budget(recipe, len(dataset.train_images), options.batch_size, epochs, steps, options.micro_batch)
    if not recipe.network.fused_stem:
        notes.append("this stem runs the plain convolution, whatever the kernels")
    facts = {
        "command": ["blink", name, *options.arguments],
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        **describe(setting, recipe, budget, dataset),
        "steps_given": steps is not None,
        "start_up": {"imports": imported - STARTED, "data": time.perf_counter() - imported},
        "peak_bytes": None,
        "flops": None,
    }
    return Job(recipe, dataset, budget, setting, notes, facts)


def customized(recipe: Recipe, options: argparse.Namespace) -> Recipe:
    """The recipe with what the command line changes in it. Raises UserError."""
    if options.stem is not None:
        kernel, padding = STEMS[options.stem]
        recipe = with_network(recipe, whiten_kernel=kernel, whiten_padding=padding)
    if options.se is not None:
        recipe = with_network(recipe, se_reduction=None if options.se == "off" else options.se)
    if options.flip is not None:
        recipe = with_flip(recipe, options.flip)
    return with_settings(recipe, options.set)


def load_data(options: argparse.Namespace, console: Console) -> tuple[Dataset, list[str]]:
    """--data, cut to --limit, with a progress bar on a terminal; and what a person should know of it, in lines.

    Raises UserError.
    """
    notes: list[str] = []
    with bars(console) as bar:
        task = bar.add_task("decoding", total=None, visible=False)

        def progress(done: int, total: int) -> None:
            bar.update(task, description="decoding images", completed=done, total=total, visible=True)

        def note(line: str) -> None:
            notes.append(line)
            bar.update(task, description=line, visible=True)

        dataset = data.load(options.data, progress, note, options.size, options.val_split, options.limit)
        return dataset, notes


def unequal_classes(dataset: Dataset) -> list[str]:
    """A line where the largest class has more than three times the training images of the smallest."""
    counts = dataset.train_labels.bincount(minlength=len(dataset.classes))
    (least, smallest), (most, largest) = (tuple(map(int, found)) for found in (counts.min(0), counts.max(0)))
    if most <= 3 * least:
        return []
    return [
        f"unequal classes: {dataset.classes[largest]!r} has {most:,} training images, {dataset.classes[smallest]!r} "
        f"{least:,}"
    ]


def describe_stem(recipe: Recipe, backend: str) -> str:
    """The stem and squeeze-and-excite in a few words."""
    network = recipe.network
    size = f"{network.whiten_kernel}x{network.whiten_kernel}"
    if network.whiten_kernel is None:
        stem = "stem without whitening"
    elif not network.fused_stem:
        stem = f"{size} 'same' stem as plain convolution"
    else:
        stem = f"{size} unpadded stem {'fused' if backend == 'fused' else 'in PyTorch'}"
    return f"{stem}, SE {'off' if network.se_reduction is None else f'/{network.se_reduction}'}"


def describe(setting: Setting, recipe: Recipe, budget: Budget, dataset: Dataset) -> dict:
    """What a result must name besides its command and its seed, ready for JSON."""
    return {
        "data": {
            "name": dataset.name,
            "fingerprint": dataset.fingerprint,
            "generated": dataset.generated,
            "train": len(dataset.train_images),
            "test": len(dataset.test_images),
            "image_shape": dataset.image_shape,
            "classes": len(dataset.classes),
        },
        "recipe": asdict(recipe),
        "kernels": {
            "name": setting.backend.name,
            "interpreted": setting.interpreted,
            "stem": describe_stem(recipe, setting.backend.name),
        },
        "dtype": setting.compute.name,
        "graph": setting.graph,
        "deterministic": setting.deterministic,
        "budget": {name: value for name, value in asdict(budget).items() if value is not None},
        "environment": setting.environment,
    }


def count_flops(recipe: Recipe, budget: Budget, dataset: Dataset) -> dict:
    """FLOPs of a run by what they are spent on, and their total, ready for JSON."""
    # its imports take longer than most of what a start does
    from blink.training.flops import run_flops

    sizes = (len(dataset.train_images), len(dataset.test_images))
    return run_flops(recipe, budget, dataset.image_shape, len(dataset.classes), *sizes)
