"""Processes that can be killed, which start with what a training imports: one server forks them for every test."""

import multiprocessing
from multiprocessing.process import BaseProcess

_IMPORTED = (
    "blink.training.command",
    "blink.experiments.ablate",
    "blink.training.flops",
    "torch._dynamo",
    "scipy.stats",
)


def started(function, *arguments) -> BaseProcess:
    """A process that calls a function of a module of tests/."""
    context = multiprocessing.get_context("forkserver")
    # the server, which is started once, does
    context.set_forkserver_preload([*_IMPORTED, "tests.processes", "tests.test_share"])
    process = context.Process(target=function, args=arguments)
    process.start()
    return process
