"""What a command that trains was asked for: data, recipe, budget and setting, and how a result names them."""

import argparse
import time
from dataclasses import asdict, dataclass

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from blink.command import STARTED, fraction, natural, positive
from blink.training import data
from blink.training.budget import Budget, plan_budget
from blink.training.data.dataset import Dataset
from blink.training.overrides import with_settings
from blink.training.own import named
from blink.training.recipes import RECIPES, Recipe, with_flip, with_network
from blink.training.setting import Setting, add_setting_arguments, choose_setting
from blink.training.trainer import Trainer

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

    def trainer(self, budget: Budget | None = None, initial: dict[str, Tensor] | None = None) -> Trainer:
        """A trainer of this job, or of another budget of it, from random weights or from `initial` ones."""
        setting, budget = self.setting, budget or self.budget
        return Trainer(self.recipe, self.dataset, budget, setting.backend, setting.compute, setting.graph, initial)


def add_job_arguments(parser: argparse.ArgumentParser) -> None:
    """What is trained and how it computes; a command adds its own budget."""
    add = parser.add_argument_group("what is trained").add_argument
    add("--recipe", default="blink", help="see blink recipes, or FILE.py:NAME of your own (default: %(default)s)")
    add_data_arguments(add)
    add("--stem", choices=STEMS, help="whitening convolution: kernel and padding, or none (default: the recipe's)")
    add("--se", type=se_reduction, metavar="R|off", help="squeeze-and-excite reduction (default: the recipe's)")
    add("--flip", choices=("none", "random", "alternating"),
        help="mirroring of training images; none: of test images neither (default: the recipe's)")  # fmt: skip
    add("--set", action="append", default=[], metavar="NAME=VALUE",
        help="any setting of the recipe, as blink recipes RECIPE lists it; may be given again")  # fmt: skip
    add("--batch-size", type=positive(int), metavar="B", help="default: the recipe's, smaller for small data sets")
    add("--seed", type=natural, default=0, metavar="S", help="of the first run; the next one has the next (default: 0)")
    add_setting_arguments(parser)


def add_data_arguments(add) -> None:
    add("--data", metavar="PATH", help="an image or CIFAR folder, or cifar10, cifar100, synthetic (default: CIFAR-10 "
        "below data/, else downloaded, else synthetic)")  # fmt: skip
    add("--size", type=positive(int), metavar="N", help="scale and crop the images of a folder to NxN (default: their "
        "one size, else that of most, else 32)")  # fmt: skip
    add("--val-split", type=fraction, metavar="F", help="the part of each class that is held back for testing where a "
        "folder has no test images (default: 0.1)")  # fmt: skip
    add("--limit", type=positive(int), metavar="N", help="use the first N training and first N test images")


def se_reduction(text: str) -> int | str:
    return text if text == "off" else positive(int)(text)


def prepare(
    name: str, options: argparse.Namespace, console: Console, epochs: float | None = None, steps: int | None = None,
    recipe: Recipe | None = None, dataset: Dataset | None = None,
) -> Job:  # fmt: skip
    """The job of `blink NAME`, its data loaded. recipe, dataset: in place of those that the options name.

    Raises UserError.
    """
    recipe = customized(recipe or named(options.recipe, RECIPES, Recipe), options)
    setting = choose_setting(options)
    imported = time.perf_counter()
    dataset, notes = load_data(options, console) if dataset is None else (dataset.limited(options.limit), [])
    dataset = dataset.to(setting.device)
    budget = plan_budget(recipe, len(dataset.train_images), options.batch_size, epochs, steps)
    if not recipe.network.fused_stem:
        notes.append("this stem runs the plain convolution, whatever the kernels")
    facts = {
        "command": ["blink", name, *options.arguments],
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
    with image_bar(console) as bar:
        task = bar.add_task("decoding", total=None, visible=False)

        def progress(done: int, total: int) -> None:
            bar.update(task, description="decoding images", completed=done, total=total, visible=True)

        def note(line: str) -> None:
            notes.append(line)
            bar.update(task, description=line, visible=True)

        dataset = data.load(options.data, progress, note, options.size, options.val_split)
        return dataset.limited(options.limit), notes


def image_bar(console: Console) -> Progress:
    """A progress bar that counts images, on a terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=None), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


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
        "budget": asdict(budget),
        "environment": setting.environment,
    }


def count_flops(recipe: Recipe, budget: Budget, dataset: Dataset) -> dict:
    """FLOPs of a run by what they are spent on, and their total, ready for JSON."""
    # its imports take longer than most of what a start does
    from blink.training.flops import run_flops

    sizes = (len(dataset.train_images), len(dataset.test_images))
    return run_flops(recipe, budget, dataset.image_shape, len(dataset.classes), *sizes)
