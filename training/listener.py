"""Who watches runs: the terminal, loggers, callbacks of one's own."""

from collections.abc import Iterable

from torch import Tensor

from blink.training.results import EpochRow, RunResult


class Listener:
    """Called by `loop.train`; a subclass overrides what it wants to know, or `Listener(on_epoch=function)`.

    on_step comes within what is timed: it must not wait for the device. The others come outside of it.
    """

    def __init__(self, **methods):
        vars(self).update(methods)

    def on_earlier(self, result: RunResult) -> None:
        """Another process trained this run; what is resumed goes on after it."""

    def on_start(self, seed: int) -> None:
        """A run begins."""

    def on_resume(self, rows: list[EpochRow], losses: list[float]) -> None:
        """The run goes on from a checkpoint, after the epochs of these rows; losses: of their steps."""
        for row in rows:
            self.on_epoch(row)

    def on_step(self, done: int, losses: Tensor) -> None:
        """`done` steps of the run were issued; losses [steps an epoch] float32, on the device: those of this epoch, NaN
        where still to come.
        """

    def on_epoch(self, row: EpochRow) -> None:
        """An epoch has ended."""

    def on_end(self, result: RunResult | None) -> None:
        """The run has ended; None: it was cut off."""


class Listeners(Listener):
    """Several as one, in their order."""

    def __init__(self, listeners: Iterable[Listener]):
        self._all = tuple(listeners)

    def on_earlier(self, result: RunResult) -> None:
        for listener in self._all:
            listener.on_earlier(result)

    def on_start(self, seed: int) -> None:
        for listener in self._all:
            listener.on_start(seed)

    def on_resume(self, rows: list[EpochRow], losses: list[float]) -> None:
        for listener in self._all:
            listener.on_resume(rows, losses)

    def on_step(self, done: int, losses: Tensor) -> None:
        for listener in self._all:
            listener.on_step(done, losses)

    def on_epoch(self, row: EpochRow) -> None:
        for listener in self._all:
            listener.on_epoch(row)

    def on_end(self, result: RunResult | None) -> None:
        for listener in self._all:
            listener.on_end(result)


# nobody watches
SILENT = Listener()
