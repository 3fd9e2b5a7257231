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
from blink.training import memory, resume
from blink.training.checkpoint import Checkpoints
from blink.training.data.dataset import Dataset
from blink.training.initial import initial_weights
from blink.training.job import Job, add_job_arguments, count_flops, prepare
from blink.training.listener import Listener, Listeners
from blink.training.loop import train
from blink.training.outputs import Outputs
from blink.training.recipes import Recipe
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
    job = prepare("train", options, console, options.epochs, options.steps, recipe, dataset)
    initial = None
    if options.init is not None:
        initial, notes = initial_weights(options.init, job.recipe, job.dataset)
        job.notes += notes
    validate = options.validate
    if validate is None and job.setting.device.type == "cpu" and len(job.dataset.test_images) > CPU_VALIDATION_IMAGES:
        validate = CPU_VALIDATION_IMAGES
        job.notes.append(f"each epoch's accuracy is of the first {validate:,} test images, the final one of all")
    ended = resume.finished(options, job) if options.resume is not None else []
    for result in ended if keep_weights else ():
        _, result.state = saved.read(resume.network_file(options, job, result.seed))
    report = Report(console, job.facts, options.runs, ended)
    report.header(job.recipe, job.dataset, job.budget, job.notes)
    checkpoints, outputs = make_checkpoints(options, job, report), Outputs(report.note)
    exit_code, failure, trainer = 0, None, None
    try:
        if options.out is not None and options.resume is None:
            # what --resume reads, should this process be killed before its first run has ended
            write_summary(outputs, options.out / resume.SUMMARY, report)
        trainer = make_trainer(job, options.seed, initial)
        listener = Listeners([report, *listeners])
        for seed in range(options.seed + len(report.runs), options.seed + options.runs):
            result = train(trainer, seed, listener, validate, options.keep == "best", checkpoints)
            describe_cost(job, trainer)
            path = None if options.out is None else resume.network_file(options, job, seed)
            kept = path is None or outputs.write(path, partial(keep, job, path, result))
            save(outputs, options, report, last=False)
            if kept and not keep_weights:
                result.state, result.logits = {}, None
            if kept and checkpoints is not None:
                checkpoints.remove(seed)
    except KeyboardInterrupt as stop:
        console.print(ending.name(stop), style="yellow")
        exit_code = ending.exit_code(stop)
    except Exception as error:
        failure = error
    if failure is not None and memory.is_exhausted(failure):
        # its traceback holds the step's tensors
        traceback.clear_frames(failure.__traceback__)
        trainer, failure.__traceback__ = None, None
        failure = memory.refusal(job)
    try:
        if report.runs:
            save(outputs, options, report, last=True)
        outputs.finish()
    except UserError as error:
        if failure is not None:
            ending.complain(f"blink: {error}")
        failure = failure or error
    if report.runs or exit_code:
        report.summary()
    if failure is not None:
        raise failure
    if exit_code and options.out is not None:
        console.print(f"go on with: blink train --resume {options.out}", highlight=False, markup=False, soft_wrap=True)
    return exit_code, report, job


def make_checkpoints(options: argparse.Namespace, job: Job, report: Report) -> Checkpoints | None:
    """Those of --out; what an earlier training left there of these runs is removed unless it is continued."""
    if options.out is None:
        return None
    made = Checkpoints(
        options.out, job.recipe.name, options.checkpoint_every, resume.identity(job.facts, options), report.note
    )
    if options.resume is None:
        for seed in range(options.seed, options.seed + options.runs):
            made.remove(seed)
            resume.network_file(options, job, seed).unlink(missing_ok=True)
    return made


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


def save(outputs: Outputs, options: argparse.Namespace, report: Report, last: bool) -> None:
    """After each run, so that nothing that ends this process takes a finished one with it."""
    if options.out is not None:
        write_summary(outputs, options.out / resume.SUMMARY, report)
    # what is no file cannot be replaced: it gets all once
    if options.json is not None and (last or replaceable(options.json)):
        write_summary(outputs, options.json, report)


def write_summary(outputs: Outputs, path: Path, report: Report) -> None:
    outputs.write(path, lambda: write_json(path, report.as_dict()))
