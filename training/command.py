"""Train a network from random weights, one or several times, and report its accuracy."""

import argparse
import time
from pathlib import Path

import torch
from rich.console import Console

from blink import __version__
from blink.command import natural, parse, positive
from blink.errors import UserError
from blink.files import check_output, make_folder, write_json
from blink.model import saved
from blink.training import gallery, loggers
from blink.training.job import Job, add_job_arguments, count_flops, prepare
from blink.training.listener import Listener, Listeners
from blink.training.loop import train
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
    add_job_arguments(parser)
    add = parser.add_argument_group("what is written").add_argument
    add("--out", type=Path, metavar="DIR", help="save each run's weights and the summary here")
    add("--json", type=Path, metavar="FILE", help="write the summary and all runs as JSON")
    loggers.add_arguments(add)


def run(options: argparse.Namespace) -> int:
    return execute(options, Console())[0]


def train_quietly(**options) -> list[RunResult]:
    """What `blink.train` is: `blink train` without its output. Raises UserError where that says what is wrong."""
    words = [f"--{name.replace('_', '-')}" + ("" if value is True else f"={value}") for name, value in options.items()]
    code, report = execute(parse("train", __name__, words)[0], Console(quiet=True))
    if code:
        raise KeyboardInterrupt
    return report.runs


def execute(options: argparse.Namespace, console: Console) -> tuple[int, Report]:
    """(the exit code, 130 after an interruption, and the report with the runs that ended)."""
    if options.steps is not None and options.epochs is not None:
        raise UserError("--steps and --epochs both set the budget; give one of them")
    if options.out is not None:
        make_folder(options.out)
    check_output(options.json)
    loggers.check(options)
    job = prepare("train", options, console, options.epochs, options.steps)
    validate = options.validate
    if validate is None and job.setting.device.type == "cpu" and len(job.dataset.test_images) > CPU_VALIDATION_IMAGES:
        validate = CPU_VALIDATION_IMAGES
        job.notes.append(f"each epoch's accuracy is of the first {validate:,} test images, the final one of all")
    report = Report(console, job.facts, options.runs)
    listener = Listeners([report, *loggers.loggers(options, job.facts)])
    report.header(job.recipe, job.dataset, job.budget, job.notes)
    exit_code = 0
    try:
        trainer = make_trainer(job, options.seed)
        for number in range(options.runs):
            train_one(job, trainer, number, options, validate, listener)
            save(options, report, last=False)
    except KeyboardInterrupt:
        console.print("interrupted", style="yellow")
        exit_code = 130
    finally:
        try:
            if report.runs:
                save(options, report, last=True)
        finally:
            if report.runs or exit_code:
                report.summary()
    return exit_code, report


def make_trainer(job: Job, seed: int) -> Trainer:
    """Warmed up where something compiles; the seconds of both go to the job's facts."""
    began = time.perf_counter()
    trainer = job.trainer()
    job.facts["start_up"]["network"] = time.perf_counter() - began
    if trainer.compiles:
        job.facts["start_up"] |= trainer.warm_up(seed)
    return trainer


def train_one(
    job: Job, trainer: Trainer, number: int, options: argparse.Namespace, validate: int | None, listener: Listener
) -> None:
    """Run 0, 1, ... of the job, watched by the listener; its weights go to --out."""
    seed = options.seed + number
    views = gallery.Views(trainer)
    result = train(trainer, seed, Listeners([listener, views]) if options.out is not None else listener, validate)
    if job.facts["flops"] is None:
        # after a run, which need not wait for what only describes it
        job.facts["flops"] = count_flops(job.recipe, job.budget, job.dataset)
    if trainer.device.type == "cuda":
        job.facts["peak_bytes"] = torch.cuda.max_memory_allocated(trainer.device)
    if options.out is not None:
        name = f"{job.recipe.name}-seed{seed}"
        keep(job, options.out / f"{name}.safetensors", result)
        gallery.save(options.out / f"{name}.gallery.safetensors", result, job.dataset, views, job.recipe.name)


def keep(job: Job, path: Path, result: RunResult) -> None:
    """The run's network as a file that is enough to use it."""
    about = ("command", "data", "recipe", "dtype", "budget", "environment")
    facts = {
        **{name: job.facts[name] for name in about},
        "seed": result.seed,
        "accuracy": result.accuracy,
        "pixel_statistics": {"mean": job.dataset.mean.tolist(), "std": job.dataset.std.tolist()},
        "versions": {"blink": __version__, **{name: job.facts["environment"][name] for name in ("torch", "triton")}},
    }
    dataset = job.dataset
    saved.save(path, result.state, job.recipe.network, dataset.classes, dataset.image_shape, facts)


def save(options: argparse.Namespace, report: Report, last: bool) -> None:
    """After each run, so that nothing that ends this process takes a finished one with it."""
    if options.out is not None:
        write_json(options.out / "summary.json", report.as_dict())
    # what is no file cannot be replaced: it gets all once
    if options.json is not None and (last or options.json.is_file() or not options.json.exists()):
        write_json(options.json, report.as_dict())
