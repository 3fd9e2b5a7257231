"""Time one training step by part instead of training: each convolution's three passes, each op, the loss, the
optimizer, idle; what each must compute and move; and the whole step against plain eager PyTorch.
"""

import argparse
from functools import partial
from pathlib import Path

from rich.console import Console

from blink.command import add_json_argument, positive
from blink.experiments.profile import measure, report
from blink.files import check_json, make_folder, write_json
from blink.model import backend as backends
from blink.training.job import add_job_arguments, prepare
from blink.training.report import Report
from blink.training.trainer import Trainer

EXAMPLES = (
    "blink profile",
    "blink profile --recipe hlb --kernels reference --json profile.json",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_job_arguments(parser)
    add = parser.add_argument_group("budget").add_argument
    add("--steps", type=positive(int), metavar="N", help="steps of the run that is profiled (default: the recipe's)")
    add = parser.add_argument_group("what is written").add_argument
    add("--traces", type=Path, default=Path("runs/profile"), metavar="DIR", help="chrome traces (default: %(default)s)")
    add_json_argument(add, "write every number as JSON")


def run(options: argparse.Namespace) -> int:
    make_folder(options.traces)
    check_json(options)
    console = Console()
    job = prepare("profile", options, console, steps=options.steps)
    Report(console, job.facts).header(job.recipe, job.dataset, job.budget, job.notes)
    setting, eager = job.setting, backends.eager()

    def make(backend: backends.Backend, instrumented: bool, graph: bool) -> Trainer:
        backend = measure.instrumented(backend) if instrumented else backend
        return Trainer(job.recipe, job.dataset, job.budget, backend, setting.compute, graph and setting.graph)

    make_trainer, layers = partial(make, setting.backend), not setting.backend.compile
    measured = measure.measure(make_trainer, layers, options.seed, options.traces)
    for lines in filter(None, (report.table(measured), report.convolution_table(measured))):
        print(*lines, "", sep="\n")
    against_eager = measure.compare(
        lambda: make_trainer(False, True), lambda traced: make(eager, traced, False), options.seed, options.traces
    )
    for line in report.comparison_lines(against_eager):
        console.print(line, highlight=False)
    console.print(f"chrome traces: {options.traces}", highlight=False)
    if options.json is not None:
        write_json(options.json, {**job.facts, "profile": report.as_dict(measured, against_eager)})
    return 0
