"""Train a network from random weights, one or several times, and report its accuracy."""

import argparse
import time
import traceback
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from blink import __version__, ending
from blink.command import add_json_argument, natural, positive
from blink.errors import UserError
from blink.files import check_json, make_folder, replaceable, write_json
from blink.model import saved
from blink.training import duration, gallery, loggers, memory, resume
from blink.training.checkpoint import Checkpoints
from blink.training.data.dataset import Dataset
from blink.training.initial import initial_weights
from blink.training.job import Job, add_job_arguments, count_flops, prepare
from blink.training.listener import Listener, Listeners
from blink.training.loop import train
from blink.training.outputs import Outputs
from blink.training.recipes import RECIPES, Recipe
from blink.training.report import Report
from blink.training.results import RunResult
from blink.training.trainer import Trainer

EXAMPLES = (
    "blink train --data photographs/ --epochs 20 --out runs/photographs",
    "blink train --recipe hlb --kernels reference --runs 5 --json hlb.json",
)
# a CPU validates each epoch on part of the test set, or it would spend a fifth of the run on it
CPU_VALIDATION_IMAGES = 2000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("budget").add_argument
    add("--epochs", type=positive(float), metavar="E", help="passes over the data (default: the recipe's)")
    add("--steps", type=positive(int), metavar="N", help="compress the whole schedule to N steps")
    add("--runs", type=positive(int), default=1, metavar="N", help="train N times (default: %(default)s)")
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
    loggers.add_arguments(add)


def run(options: argparse.Namespace) -> int:
    return execute(options, Console())[0]


def execute(
    options: argparse.Namespace, console: Console, recipe: Recipe | None = None, dataset: Dataset | None = None,
    listeners: Iterable[Listener] = (), keep_weights: bool = False,
) -> tuple[int, Report, Job]:  # fmt: skip
    """(the exit code, not 0 after an interruption; the report with the runs that ended; the job).

    recipe, dataset: in place of those that the options name. keep_weights: the runs keep theirs in memory.
    """
    if options.resume is not None:
        options = resume.as_it_was(options)
    check(options)
    job = prepare("train", options, console, options.epochs, options.steps, recipe, dataset)
    training = Training(options, job, console, tuple(listeners), keep_weights)
    exit_code, failure = 0, None
    try:
        training.run_all()
    except KeyboardInterrupt as stop:
        console.print(ending.name(stop), style="yellow")
        exit_code = ending.exit_code(stop)
    except Exception as error:
        failure = error
    if failure is not None and memory.is_exhausted(failure):
        # its traceback holds the step's tensors
        traceback.clear_frames(failure.__traceback__)
        failure.__traceback__ = None
        failure = memory.refusal(job)
    try:
        training.save(last=True)
    except UserError as error:
        if failure is not None:
            ending.complain(f"blink: {error}")
        failure = failure or error
    if training.report.runs or exit_code:
        training.report.summary()
    if failure is not None:
        raise failure
    if exit_code and options.out is not None:
        named = "" if options.recipe in RECIPES else f" --recipe {options.recipe}"
        line = f"go on with: blink train --resume {options.out}{named}"
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    return exit_code, training.report, job


def check(options: argparse.Namespace) -> None:
    """What can be seen before the work. Raises UserError."""
    if options.steps is not None and options.epochs is not None:
        raise UserError("--steps and --epochs both set the budget; give one of them")
    if options.keep == "best" and options.validate == 0:
        raise UserError("--keep best chooses by validation, which --validate 0 leaves out; give one of them")
    if options.out is not None:
        make_folder(options.out)
        if (options.out / resume.SUMMARY).exists() and options.resume is None and not options.overwrite:
            raise UserError(
                f"{options.out} holds an earlier training; go on with it by --resume {options.out}, replace it by "
                "--overwrite, or name another folder"
            )
    check_json(options)
    loggers.check(options)


class Training:
    """The runs of one call, and what is written of them. Raises UserError for what cannot be begun or gone on with."""

    def __init__(
        self, options: argparse.Namespace, job: Job, console: Console, listeners: tuple[Listener, ...],
        keep_weights: bool,
    ):  # fmt: skip
        self._options, self._job, self._listeners, self._keep_weights = options, job, listeners, keep_weights
        self._initial = None
        if options.init is not None:
            self._initial, notes = initial_weights(options.init, job.recipe, job.dataset)
            job.notes += notes
        self._validate, tests = options.validate, len(job.dataset.test_images)
        if self._validate is None and job.setting.device.type == "cpu" and tests > CPU_VALIDATION_IMAGES:
            self._validate = CPU_VALIDATION_IMAGES
            job.notes.append(
                f"each epoch's accuracy is of the first {self._validate:,} test images, the final one of all"
            )
        long = duration.warning(job)
        job.notes += [] if long is None else [long]
        self._ended = resume.finished(options, job) if options.resume is not None else []
        for result in self._ended if keep_weights else ():
            _, result.state = saved.read(resume.network_file(options, job, result.seed))
        self.report = Report(console, job.facts, options.runs, self._ended)
        self.report.header(job.recipe, job.dataset, job.budget, job.notes)
        self._outputs, self._checkpoints = Outputs(self.report.note), None
        if options.out is not None:
            every, same = options.checkpoint_every, resume.identity(job.facts, options)
            self._checkpoints = Checkpoints(options.out, job.recipe.name, every, same, self.report.note)
            for result in self._ended:
                self._checkpoints.remove(result.seed)
            if options.resume is None:
                self._begin_anew()

    def _begin_anew(self) -> None:
        """Remove what an earlier training left of these runs, and write what --resume reads, should this process be
        killed before its first run has ended.
        """
        for seed in range(self._options.seed, self._options.seed + self._options.runs):
            self._checkpoints.remove(seed)
            network = resume.network_file(self._options, self._job, seed)
            for path in (network, resume.gallery_file(network)):
                path.unlink(missing_ok=True)
        self._write(self._options.out / resume.SUMMARY)

    def run_all(self) -> None:
        """Train the runs that have not ended yet."""
        options, job = self._options, self._job
        trainer = make_trainer(job, options.seed, self._initial)
        views = [] if options.out is None else [gallery.Views(trainer)]
        listener = Listeners([self.report, *loggers.loggers(options, job.facts), *views, *self._listeners])
        for result in self._ended:
            listener.on_earlier(result)
        best = options.keep == "best"
        for seed in range(options.seed + len(self._ended), options.seed + options.runs):
            result = train(trainer, seed, listener, self._validate, best, self._checkpoints)
            describe_cost(job, trainer)
            kept = all([self._keep(result, one.views) for one in views])
            self.save()
            if kept and not self._keep_weights:
                result.state, result.logits = {}, None
            if kept and self._checkpoints is not None:
                self._checkpoints.remove(seed)

    def _keep(self, result: RunResult, views: dict) -> bool:
        """Write the run's network and gallery; whether that could be done."""
        job, network = self._job, resume.network_file(self._options, self._job, result.seed)
        shown = resume.gallery_file(network)
        done = self._outputs.write(network, partial(keep, job, network, result))
        return done & self._outputs.write(
            shown, partial(gallery.save, shown, result, job.dataset, views, job.recipe.name)
        )

    def save(self, last: bool = False) -> None:
        """After each run, so that nothing that ends this process takes a finished one with it.

        Raises UserError, at last, where something could not be written.
        """
        options = self._options
        if self.report.runs and options.out is not None:
            self._write(options.out / resume.SUMMARY)
        # what is no file cannot be replaced: it gets all once
        if self.report.runs and options.json is not None and (last or replaceable(options.json)):
            self._write(options.json)
        if last:
            self._outputs.finish()

    def _write(self, path: Path) -> None:
        self._outputs.write(path, lambda: write_json(path, self.report.as_dict()))


def make_trainer(job: Job, seed: int, initial: dict[str, torch.Tensor] | None) -> Trainer:
    """Warmed up where something compiles; the seconds of both go to the job's facts."""
    began = time.perf_counter()
    trainer = job.trainer(initial=initial)
    job.facts["start_up"]["network"] = time.perf_counter() - began
    if trainer.compiles:
        job.facts["start_up"] |= trainer.warm_up(seed)
    return trainer


def describe_cost(job: Job, trainer: Trainer) -> None:
    """After a run, which need not wait for what only describes it."""
    if job.facts["flops"] is None:
        job.facts["flops"] = count_flops(job.recipe, job.budget, job.dataset)
    if trainer.device.type == "cuda":
        job.facts["peak_bytes"] = torch.cuda.max_memory_allocated(trainer.device)


def keep(job: Job, path: Path, result: RunResult) -> None:
    """The run's network as a file that is enough to use it."""
    about = ("command", "data", "recipe", "dtype", "budget", "environment")
    facts = {
        **{name: job.facts[name] for name in about},
        "seed": result.seed,
        "accuracy": result.accuracy if result.kept is None else result.kept.accuracy,
        "epoch": len(result.epochs) if result.kept is None else result.kept.epoch,
        "pixel_statistics": {"mean": job.dataset.mean.tolist(), "std": job.dataset.std.tolist()},
        "versions": {"blink": __version__, **{name: job.facts["environment"][name] for name in ("torch", "triton")}},
    }
    dataset = job.dataset
    saved.save(path, result.state, job.recipe.network, dataset.classes, dataset.image_shape, facts)
