"""Commands as processes of their own, which start quickly."""

import os
import resource
import signal
import sys
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from blink.__main__ import main
from tests import forked


def _run(arguments: list[str], output: Path | None, stdout: str | None, encoding: str, room: int | None) -> None:
    # sums are cut up by the number of threads
    torch.set_num_threads(1)
    # what begins in the background of a shell ignores it
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # and what nohup begins this one
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
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
) -> BaseProcess:  # fmt: skip
    """`blink ARGUMENTS`, with one thread; what it prints goes to the files `output`.out and .err.

    stdout: in place of the former; None: there is no standard output. encoding: the terminal's.
    room: bytes of address space that it may take for itself.
    """
    return forked.started(_run, list(map(str, arguments)), output, stdout, encoding, room)
