"""The work of `blink train`, one or several runs from random weights; commands/train.py has its arguments."""

import argparse
import time
import traceback
from collections.abc import Iterable
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from blink import __version__, ending
from blink.errors import UserError, is_exhausted
from blink.files import check_json, make_folder, replaceable, write_json
from blink.model import saved
from blink.training import distributed, duration, gallery, loggers, memory, peers, resume
from blink.training.budget import check_batch
from blink.training.checkpoint import Checkpoints
from blink.training.data.dataset import Dataset
from blink.training.initial import initial_weights
from blink.training.job import Job, count_flops, prepare
from blink.training.listener import Listener, Listeners
from blink.training.loop import train
from blink.training.outputs import Outputs
from blink.training.recipes import RECIPES, Recipe
from blink.training.report import Report
from blink.training.results import RunResult, run_as_dict
from blink.training.shared_runs import SharedRuns, named_seeds
from blink.training.trainer import Trainer

# a CPU validates each epoch on part of the test set, or it would spend a fifth of the run on it
CPU_VALIDATION_IMAGES = 2000


def run(options: argparse.Namespace) -> int:
    others = peers.peers()
    console = Console() if others.place.rank == 0 else Console(quiet=True, force_terminal=False)
    return execute(options, console, others=others)[0]


def execute(
    options: argparse.Namespace, console: Console, recipe: Recipe | None = None, dataset: Dataset | None = None,
    listeners: Iterable[Listener] = (), keep_weights: bool = False, others: peers.Alone = peers.ALONE,
) -> tuple[int, Report, Job]:  # fmt: skip
    """(the exit code, not 0 after an interruption; the report with the runs that ended; the job).

    recipe, dataset: in place of those that the options name. keep_weights: the runs keep theirs in memory. others: who
    shares the work; the report of their rank 0 has all runs.
    """
    mine = others.place
    if options.resume is not None:
        options = resume.as_it_was(options)
    elif mine.restarts and options.out is not None and (options.out / resume.SUMMARY).exists():
        # torchrun has started all processes again, by the same command
        options.resume = None if options.overwrite else options.out
    check(options, mine)
    options.device = mine.device(options.device)
    mine.divide_threads()
    with others.in_turn():
        job = prepare("train", options, console, options.epochs, options.steps, recipe, dataset)
    training = Training(options, job, console, tuple(listeners), keep_weights, others)
    exit_code, failure = 0, None
    try:
        training.run_all()
    except KeyboardInterrupt as stop:
        console.print(ending.name(stop), style="yellow")
        exit_code = ending.exit_code(stop)
        training.look()
    except Exception as error:
        failure = error
    if failure is not None and is_exhausted(failure):
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
    if exit_code and others.place.size > 1:
        training.report.note(f"not finished: {named_seeds(training.report.seeds_left())}")
    if exit_code and options.out is not None:
        named = "" if options.recipe in RECIPES else f" --recipe {options.recipe}"
        line = f"go on with: blink train --resume {options.out}{named}"
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    training.leave()
    return exit_code, training.report, job


def check(options: argparse.Namespace, mine: peers.Place) -> None:
    """What can be seen before the work; what is one for all ranks is rank 0's. Raises UserError."""
    if options.ddp and not mine.launched and options.resume is None:
        raise UserError(
            "--ddp is for several processes, which torchrun starts: torchrun --nproc-per-node=2 -m blink train --ddp"
        )
    if options.ddp and mine.size > 1 and options.micro_batch is not None:
        raise UserError("--ddp and --micro-batch both part a batch; start more processes, or give one of them")
    if mine.rank:
        options.json = options.csv = None
        if options.ddp:
            options.tensorboard = options.wandb = None
    if options.steps is not None and options.epochs is not None:
        raise UserError("--steps and --epochs both set the budget; give one of them")
    if options.keep == "best" and options.validate == 0:
        raise UserError("--keep best chooses by validation, which --validate 0 leaves out; give one of them")
    if options.out is not None:
        make_folder(options.out)
        earlier = mine.rank == 0 and (options.out / resume.SUMMARY).exists()
        if earlier and options.resume is None and not options.overwrite:
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
        keep_weights: bool, others: peers.Alone,
    ):  # fmt: skip
        self._options, self._job, self._listeners, self._keep_weights = options, job, listeners, keep_weights
        self._others, self._first = others, others.place.rank == 0
        # the files of a run are its rank's, or rank 0's where all train it
        self._writes = self._first or not options.ddp
        job.facts |= {"ranks": others.place.size, "ddp": options.ddp}
        check_shareable(job, options, others.place)
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
        long = duration.warning(job) if self._first else None
        job.notes += [] if long is None else [long]
        if others.place.size > 1:
            does = "each trains its share of every batch" if options.ddp else "each takes the next run when it is free"
            job.notes.append(f"{others.place.size} processes: {does}")
        self._ended = resume.finished(options, job) if self._first and options.resume is not None else []
        for result in self._ended if keep_weights else ():
            _, result.state = saved.read(resume.network_file(options, job, result.seed))
        self.report = Report(console, job.facts, range(options.seed, options.seed + options.runs), self._ended)
        self.report.header(job.recipe, job.dataset, job.budget, job.notes)
        self._shared, self._ranks = None, distributed.ALONE
        if isinstance(others, peers.Peers) and not options.ddp:
            self._shared = SharedRuns(others, self.report, self.save)
        note = self.report.note if self._shared is None else self._shared.note
        self._outputs, self._checkpoints = Outputs(note), None
        if options.out is not None:
            every, same = options.checkpoint_every, resume.identity(job.facts, options)
            self._checkpoints = Checkpoints(options.out, job.recipe.name, every, same, note, self._writes)
            for result in self._ended:
                self._checkpoints.remove(result.seed)
            if options.resume is None and self._first:
                self._begin_anew()
        self._left = others.settled(self.report.seeds_left())
        check_seen(options, others.place)
        # who is stopped by a mistake of its own is so before the others rely on it
        others.settled(None)
        if isinstance(others, peers.Peers) and options.ddp:
            self._ranks = distributed.join(others, job.setting.device)

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
        trainer = make_trainer(job, options.seed, self._initial, self._ranks)
        views = [gallery.Views(trainer)] if options.out is not None and self._writes else []
        shared = [] if self._shared is None else [self._shared]
        listener = Listeners([self.report, *shared, *loggers.loggers(options, job.facts), *views, *self._listeners])
        for result in self._ended:
            listener.on_earlier(result)
        best = options.keep == "best"
        for seed in self._left if self._shared is None else self._shared.taken_from(self._left, listener.on_earlier):
            result = train(trainer, seed, listener, self._validate, best, self._checkpoints)
            describe_cost(job, trainer)
            kept = all([self._keep(result, one.views) for one in views])
            self.save()
            if kept and not self._keep_weights:
                result.state, result.logits = {}, None
            if kept and self._checkpoints is not None:
                self._checkpoints.remove(seed)
        describe_cost(job, trainer)

    def _keep(self, result: RunResult, views: dict) -> bool:
        """Write the run's network and gallery; whether that could be done."""
        job, network = self._job, resume.network_file(self._options, self._job, result.seed)
        shown = resume.gallery_file(network)
        own = {"training": resume.digest(job.facts, self._options), "run": run_as_dict(result, self.report.every)}
        # the network comes last: where it is, the run has ended
        done = self._outputs.write(shown, partial(gallery.save, shown, result, job.dataset, views, job.recipe.name))
        return done & self._outputs.write(network, partial(keep, job, network, result, own))

    def save(self, last: bool = False) -> None:
        """After each run, so that nothing that ends this process takes a finished one with it.

        Raises UserError, at last, where something could not be written.
        """
        options = self._options
        if self.report.runs and options.out is not None and self._first:
            self._write(options.out / resume.SUMMARY)
        # what is no file cannot be replaced: it gets all once
        if self.report.runs and options.json is not None and (last or replaceable(options.json)):
            self._write(options.json)
        if last:
            self._outputs.finish()

    def look(self) -> None:
        """Collect what other ranks have finished, as far as they can still be heard."""
        if self._shared is not None:
            with suppress(UserError):
                self._shared.look()

    def leave(self) -> None:
        """The others are needed no more."""
        self._ranks.leave()
        self._others.leave()

    def _write(self, path: Path) -> None:
        self._outputs.write(path, lambda: write_json(path, self.report.as_dict()))


def check_shareable(job: Job, options: argparse.Namespace, mine: peers.Place) -> None:
    """Raises UserError for a run that several ranks cannot train together."""
    if options.ddp and mine.size > 1:
        check_batch(job.recipe, job.dataset, job.budget, mine.size)
        if job.setting.backend.compile:
            raise UserError(
                "--ddp exchanges batch statistics, which torch.compile does not see; use --kernels fused or reference "
                "with it"
            )


def check_seen(options: argparse.Namespace, mine: peers.Place) -> None:
    """Raises UserError where this rank's --out is not rank 0's."""
    if mine.rank and options.out is not None and not (options.out / resume.SUMMARY).exists():
        raise UserError(
            f"--out {options.out} of rank {mine.rank} is not the folder that rank 0 writes to; name one on a file "
            "system that all machines share"
        )


def make_trainer(job: Job, seed: int, initial: dict[str, torch.Tensor] | None, ranks: distributed.Ranks) -> Trainer:
    """Warmed up where something compiles; the seconds of both go to the job's facts."""
    began = time.perf_counter()
    trainer = job.trainer(initial=initial, ranks=ranks)
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


def keep(job: Job, path: Path, result: RunResult, own: dict | None = None) -> None:
    """The run's network as a file that is enough to use it; own: more facts, ready for JSON."""
    about = ("command", "data", "recipe", "dtype", "budget", "environment")
    facts = {
        **{name: job.facts[name] for name in about},
        "seed": result.seed,
        "accuracy": result.accuracy if result.kept is None else result.kept.accuracy,
        "epoch": len(result.epochs) if result.kept is None else result.kept.epoch,
        "pixel_statistics": {"mean": job.dataset.mean.tolist(), "std": job.dataset.std.tolist()},
        "versions": {"blink": __version__, **{name: job.facts["environment"][name] for name in ("torch", "triton")}},
        **(own or {}),
    }
    dataset = job.dataset
    saved.save(path, result.state, job.recipe.network, dataset.classes, dataset.image_shape, facts)
