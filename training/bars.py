"""Progress bars: on a terminal and in Jupyter, gone when they end; files and pipes get none."""

from importlib.util import find_spec

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from blink.training.listener import Listener
from blink.training.results import RunResult


def shows_bars(console: Console) -> bool:
    """Whether this console can draw over what it drew; Jupyter does so with ipywidgets, a quiet console never."""
    if console.quiet:
        return False
    # rich calls a notebook no terminal
    return console.is_terminal or (console.is_jupyter and find_spec("ipywidgets") is not None)


def bars(console: Console, *fields: str) -> Progress:
    """Bars of tasks that are counted; fields: formats of what else is shown of one, such as "{task.fields[loss]}"."""
    # a description may be a file's name, in which brackets are no markup
    shown = (TextColumn(field, markup=False) for field in ("{task.description}", *fields))
    columns = (next(shown), BarColumn(bar_width=None), MofNCompleteColumn(), *shown, TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True, disable=not shows_bars(console))


class RunBars(Listener):
    """Over several trainings, within a `with`: the runs that ended of `runs`, and the steps of the one that goes on."""

    def __init__(self, console: Console, runs: int, what: str = "runs", steps: int | None = None):
        """steps: of each run, where they have as many."""
        self._bars = bars(console)
        self._runs = self._bars.add_task(what, total=runs)
        self._steps = self._bars.add_task("steps", total=steps)

    def __enter__(self) -> "RunBars":
        self._bars.start()
        return self

    def __exit__(self, *error) -> None:
        self._bars.stop()

    def begin(self, number: int, what: str, steps: int) -> None:
        """Run 1, 2, ... of so many steps comes next; those before it have ended, here or in another process."""
        self._bars.update(self._runs, completed=number - 1)
        self._bars.update(self._steps, description=what, completed=0, total=steps)

    def on_step(self, done: int, losses: Tensor) -> None:
        self._bars.update(self._steps, completed=done)

    def on_end(self, result: RunResult | None) -> None:
        self._bars.advance(self._runs)
