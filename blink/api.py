"""`blink.train`: the command `blink train` as a function, and what it gives."""

from argparse import ArgumentParser
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from rich.console import Console

from blink.__main__ import parse
from blink.files import write_json
from blink.inference.classifier import Classifier
from blink.inference.classifier import load as load_network
from blink.reporting.command import write_report
from blink.training import command, gallery, resume
from blink.training.commands.train import add_arguments
from blink.training.data.in_memory import from_memory
from blink.training.listener import Listener
from blink.training.recipes import Recipe
from blink.training.report import Report
from blink.training.results import EpochRow, RunResult

_SETTINGS = {field.name for field in fields(Recipe)} - {"name", "summary", "network", "param_groups"}


def _option_names() -> set[str]:
    parser = ArgumentParser()
    add_arguments(parser)
    return set(vars(parser.parse_args([])))


class Result(Sequence[RunResult]):
    """What `blink.train` gives: its runs, in the order of their seeds, and what they come to.

    summary: what `blink train --json` writes, ready for JSON.
    """

    def __init__(self, report: Report, job: command.Job):
        self._runs, self._job = report.runs, job
        self.summary = report.as_dict()

    def __getitem__(self, index):
        return self._runs[index]

    def __len__(self) -> int:
        return len(self._runs)

    def __repr__(self) -> str:
        return f"Result(runs={len(self)}, accuracy={self.accuracy:.4f}, seconds={self.seconds:.2f})"

    @property
    def accuracy(self) -> float:
        """The mean over the runs."""
        return self.summary["summary"]["accuracy"]["mean"]

    @property
    def seconds(self) -> float:
        """The mean over the runs of what is timed."""
        return self.summary["summary"]["seconds"]["mean"]

    @property
    def classes(self) -> tuple[str, ...]:
        return self._job.dataset.classes

    @property
    def curves(self) -> dict[str, list[list]]:
        """Of each column of an epoch (`EpochRow`) a list a run."""
        return {f.name: [[getattr(row, f.name) for row in run.epochs] for run in self] for f in fields(EpochRow)}

    @property
    def model(self) -> Classifier:
        """The first run's network."""
        return self.network(0)

    def network(self, run: int) -> Classifier:
        """The network of run 0, 1, ..., as `blink.load` gives it."""
        with TemporaryDirectory() as folder:
            path = Path(folder) / "network.safetensors"
            self.save(path, run)
            return load_network(path)

    def report(self, path: str | Path) -> None:
        """Write the page that `blink report` makes of a training: curves, confusions, mistakes, the first layer."""
        with TemporaryDirectory() as folder:
            write_json(Path(folder) / resume.SUMMARY, self.summary)
            for number, run in enumerate(self):
                network = Path(folder) / f"{self._job.recipe.name}-seed{run.seed}.safetensors"
                self.save(network, number)
                if run.logits is not None:
                    gallery.save(resume.gallery_file(network), run, self._job.dataset, {}, self._job.recipe.name)
            write_report([Path(folder)], Path(path))

    def save(self, path: str | Path, run: int = 0) -> None:
        """Write the network of run 0, 1, ... as `blink train --out` does, for `blink.load` and `blink predict`."""
        command.keep(self._job, Path(path), self[run])


def train(
    data=None, recipe: str | Recipe = "blink", callbacks: Iterable[Listener | Callable] = (),
    settings: Mapping[str, object] | None = None, classes: Sequence[str] | None = None, verbose: bool = False,
    **options,
) -> Result:  # fmt: skip
    """Train as `blink train` does.

    data: what --data takes, or what is in memory: (images, labels), (train_images, train_labels, test_images,
    test_labels), a torch Dataset, or two of them (`training.data.in_memory.from_memory`), with the classes' names if
    they have any. callbacks: `Listener`s, or functions that each epoch's `EpochRow` is given to. settings: of the
    recipe, as --set takes them, by dotted name. verbose: with the command's output. options: the command's, with _ for
    -, and settings of the recipe that are no option: `blink.train("photographs/", epochs=20, translation=4)`.
    Raises UserError for what the command would refuse, and KeyboardInterrupt.
    """
    chosen = {name: value for name, value in options.items() if name in _SETTINGS - _option_names()}
    words = [f"--set={name}={value!r}" for name, value in {**chosen, **(settings or {})}.items()]
    # what is resumed knows its own
    if isinstance(recipe, str) and not (recipe == "blink" and "resume" in options):
        words.append(f"--recipe={recipe}")
    if data is None or isinstance(data, str | Path):
        dataset = None
        words += [] if data is None else [f"--data={data}"]
    else:
        dataset = from_memory(data, options.pop("size", None), options.pop("val_split", None), classes)
    for name, value in options.items():
        if name not in chosen and value is not None and value is not False:
            words.append(f"--{name.replace('_', '-')}" + ("" if value is True else f"={value}"))
    with _callers_settings_kept():
        code, report, job = command.execute(
            parse("train", words),
            Console() if verbose else Console(quiet=True),
            None if isinstance(recipe, str) else recipe,
            dataset,
            [one if isinstance(one, Listener) else Listener(on_epoch=one) for one in callbacks],
            keep_weights=True,
        )
    if code:
        raise KeyboardInterrupt
    return Result(report, job)


@contextmanager
def _callers_settings_kept() -> Iterator[None]:
    """A training seeds PyTorch's generators and sets how cuDNN computes: outside, both are as they were."""
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark
    with torch.random.fork_rng():
        try:
            yield
        finally:
            cudnn.deterministic, cudnn.benchmark = before
