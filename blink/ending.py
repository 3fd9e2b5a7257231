"""How a command ends before its time, and how its output is lost, without taking its work along."""

import io
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress


class Stopped(KeyboardInterrupt):
    """SIGTERM or SIGHUP, which end a command as Ctrl-C does."""

    def __init__(self, number: int):
        super().__init__()
        self.number = number


def exit_code(stop: KeyboardInterrupt) -> int:
    """What a shell expects of a process that this ended."""
    return 128 + (stop.number if isinstance(stop, Stopped) else signal.SIGINT)


def name(stop: KeyboardInterrupt) -> str:
    return f"ended by {signal.Signals(stop.number).name}" if isinstance(stop, Stopped) else "interrupted"


@contextmanager
def as_ctrl_c() -> Iterator[None]:
    """Inside, SIGTERM and SIGHUP raise `Stopped`, once; where one is ignored already (nohup), it stays so."""
    taken = {}

    def stop(number, frame):
        # what is being written now is finished in peace
        for other in taken:
            signal.signal(other, signal.SIG_IGN)
        raise Stopped(number)

    for number in (signal.SIGTERM, signal.SIGHUP):
        try:
            if signal.getsignal(number) == signal.SIG_DFL:
                taken[number] = signal.signal(number, stop)
        except ValueError:
            # not in the main thread, where signals are somebody else's
            break
    try:
        yield
    finally:
        for number, before in taken.items():
            signal.signal(number, before)


class Lasting(io.TextIOBase):
    """A stream whose failure (its reader has gone, its disk is full) is remembered, and raised by nobody."""

    def __init__(self, stream):
        self.stream, self.error = stream, None

    def write(self, text: str) -> int:
        if self.error is None:
            try:
                return self.stream.write(text)
            except (OSError, ValueError) as error:
                self.fail(error)
        return len(text)

    def flush(self) -> None:
        if self.error is None:
            try:
                self.stream.flush()
            except (OSError, ValueError) as error:
                self.fail(error)

    def fail(self, error: Exception) -> None:
        self.error = error
        with suppress(OSError, ValueError):
            # what the stream still holds goes nowhere, at exit too
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.stream.fileno())
            os.close(nowhere)

    def isatty(self) -> bool:
        return self.error is None and self.stream.isatty()

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self.stream.fileno()

    @property
    def encoding(self):
        return self.stream.encoding

    @property
    def errors(self):
        return self.stream.errors

    def __getattr__(self, attribute: str):
        return getattr(self.stream, attribute)


@contextmanager
def lasting_output() -> Iterator[Lasting]:
    """Inside, standard output is a `Lasting` one and shows what its encoding lacks as question marks."""
    before = sys.stdout
    if before is None:
        # closed by the caller; else the next file that is opened would take its number, and get what is printed
        before = open(os.devnull, "w")  # noqa: SIM115
    if isinstance(before, io.TextIOWrapper):
        before.reconfigure(errors="replace")
    sys.stdout = output = Lasting(before)
    try:
        yield output
    finally:
        output.flush()
        sys.stdout = before


@contextmanager
def only_json(output: Lasting) -> Iterator[None]:
    """Inside, what is printed goes to standard error; `files.write_json` finds `output` as sys.stdout.json."""
    sys.stdout = Lasting(sys.stderr)
    sys.stdout.json = output
    try:
        yield
    finally:
        sys.stdout = output


def complain(line: str) -> None:
    """One line on standard error, if anybody is there to read it."""
    with suppress(OSError, ValueError):
        print(line, file=sys.stderr, flush=True)
