"""Time one training step by part instead of training: each convolution's three passes, each op, the loss, the
optimizer, idle; what each must compute and move; and the whole step against plain eager PyTorch.
"""

import argparse
from pathlib import Path

from rich.console import Console

from blink.command import positive
from blink.experiments.profile import measure, report
from blink.files import check_output, make_folder, write_json
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
    add("--json", type=Path, metavar="FILE", help="write every number as JSON")


def run(options: argparse.Namespace) -> int:
    make_folder(options.traces)
    check_output(options.json)
    console = Console()
    job = prepare("profile", options, console, steps=options.steps)
    Report(console, job.facts).header(job.recipe, job.dataset, job.budget, job.notes)
    backend, compute = job.setting.backend, job.setting.compute

    def make(which: backends.Backend, instrumented: bool, graph: bool) -> Trainer:
        which = measure.instrumented(which) if instrumented else which
        return Trainer(job.recipe, job.dataset, job.budget, which, compute, graph)

    def make_trainer(instrumented: bool, allow_graph: bool) -> Trainer:
        return make(backend, instrumented, job.setting.graph and allow_graph)

    def make_eager(instrumented: bool) -> Trainer:
        return make(backends.eager(), instrumented, False)

    measured = measure.measure(make_trainer, not backend.compile, options.seed, options.traces)
    for lines in filter(None, (report.table(measured), report.convolution_table(measured))):
        print(*lines, "", sep="\n")
    against_eager = measure.compare(lambda: make_trainer(False, True), make_eager, options.seed, options.traces)
    for line in report.comparison_lines(against_eager):
        console.print(line, highlight=False)
    console.print(f"chrome traces: {options.traces}", highlight=False)
    if options.json is not None:
        write_json(options.json, {**job.facts, "profile": report.as_dict(measured, against_eager)})
    return 0
