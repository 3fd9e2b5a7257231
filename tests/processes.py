"""Commands as processes of their own that start quickly: what they import, torch included, is imported once."""

import multiprocessing
import os
import resource
import sys
from pathlib import Path

import torch

from blink.__main__ import main

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["blink.training.command", "tests.processes"])


def _run(arguments: list[str], output: Path | None, stdout: str | None, encoding: str, room: int | None) -> None:
    # sums are cut up by the number of threads
    torch.set_num_threads(1)
    os.environ.pop("TRITON_INTERPRET", None)
    if output is not None:
        sys.stdout = None if stdout is None else _onto(stdout or f"{output}.out", 1, encoding)
        sys.stderr = _onto(f"{output}.err", 2, encoding)
    if room is not None:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + room, resource.RLIM_INFINITY))
    os._exit(main(arguments))


def _onto(path: str, number: int, encoding: str):
    os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    return open(number, "w", encoding=encoding)


def started(
    arguments: list, output: Path | None = None, stdout: str | None = "", encoding: str = "utf-8",
    room: int | None = None,
) -> multiprocessing.Process:  # fmt: skip
    """`blink ARGUMENTS`, with one thread; what it prints goes to the files `output`.out and .err.

    stdout: in place of the former; None: there is no standard output. encoding: the terminal's.
    room: bytes of address space that it may take for itself.
    """
    process = _CONTEXT.Process(target=_run, args=(list(map(str, arguments)), output, stdout, encoding, room))
    process.start()
    return process
