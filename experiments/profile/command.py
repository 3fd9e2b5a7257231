"""The work of `blink profile`; ../commands/profile.py has its arguments."""

import argparse
from functools import partial

from rich.console import Console

from blink.experiments.profile import measure, report
from blink.files import check_json, make_folder, write_json
from blink.model import backend as backends
from blink.training.job import prepare
from blink.training.report import Report
from blink.training.trainer import Trainer


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
