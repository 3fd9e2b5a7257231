"""What a command that trains was asked for: data, recipe, budget and setting, and how a result names them."""

import argparse
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime

from rich.console import Console
from torch import Tensor

from blink.command import STARTED
from blink.training import data
from blink.training.arguments import STEMS
from blink.training.bars import bars
from blink.training.budget import Budget, plan_budget
from blink.training.data.dataset import Dataset
from blink.training.distributed import ALONE, Ranks
from blink.training.overrides import with_settings
from blink.training.own import named
from blink.training.recipes import RECIPES, Recipe, with_flip, with_network
from blink.training.setting import Setting, choose_setting
from blink.training.trainer import Trainer


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
