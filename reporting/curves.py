"""The curves of trainings over each other: loss, accuracy and learning rate by epoch, with 95 % intervals over runs."""

import io
import re
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import cycle

from blink.optional import needed
from blink.reporting.trainings import Run, Training
from blink.training.results import EpochRow, spread

# Okabe and Ito's palette without yellow, distinguishable with any colour vision; markers repeat the distinction
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#555555")
MARKERS = {"o": "●", "s": "■", "^": "▲", "D": "◆", "v": "▼", "P": "✚", "X": "✖"}
# stand for what the page's style sheet colours
_INK, _GRID, _SERIES = "#00fe01", "#00fe02", 0x01FE00
_SIZE = (4.8, 3.3)


@dataclass(frozen=True)
class Curve:
    """Points over epochs; half: half of the 95 % t interval of the mean, None where one run tells none."""

    x: list[float]
    mean: list[float]
    half: list[float | None]


@dataclass(frozen=True)
class Panel:
    """name: what is drawn; value: of an epoch's row; percent: it is a fraction to be shown so."""

    name: str
    unit: str
    value: Callable[[EpochRow], float | None]
    percent: bool = False


PANELS = (
    Panel("training loss", "mean per image", lambda row: row.train_loss),
    Panel("test accuracy", "%", lambda row: row.accuracy, percent=True),
    Panel("learning rate", "at the end of an epoch", lambda row: row.lr),
)


def over_runs(points: Iterable[Iterable[tuple[float, float | None]]]) -> Curve:
    """The (x, y) of several runs as one curve: the mean at each x of those that have a y there."""
    values: dict[float, list[float]] = {}
    for run in points:
        for x, y in run:
            if y is not None:
                values.setdefault(x, []).append(y)
    spreads = [spread(values[x]) for x in sorted(values)]
    return Curve(sorted(values), [s["mean"] for s in spreads], [s["ci95"] for s in spreads])


def curve(training: Training, value: Callable[[EpochRow], float | None]) -> Curve:
    """Of each epoch's row, over the training's runs; x in epochs."""

    def points(run: Run) -> list[tuple[float, float | None]]:
        return [(row.step / training.steps_per_epoch, value(row)) for row in run.epochs]

    return over_runs(map(points, training.runs))


def draw(axes, panel: Panel, trainings: list[Training], ink: str, grid: str, colours: Iterable[str]) -> None:
    """One panel on matplotlib's axes."""
    scale = 100 if panel.percent else 1
    for training, colour, marker in zip(trainings, cycle(colours), cycle(MARKERS)):
        if panel.name == "training loss":
            batches = over_runs(
                [((step + 1) / training.steps_per_epoch, loss) for step, loss in zip(run.steps, run.losses)]
                for run in training.runs
            )
            axes.plot(batches.x, batches.mean, color=colour, linewidth=0.8, alpha=0.45)
        found = curve(training, panel.value)
        _line(axes, found, scale, colour, marker, linestyle="-")
        if panel.percent:
            averaged = curve(training, lambda row: row.ema_accuracy)
            _line(axes, averaged, scale, colour, marker, linestyle="--")
            final = training.spread("accuracy")
            at, half = training.total_steps / training.steps_per_epoch, final["ci95"]
            # an interval of few runs may leave what an accuracy can be
            mean, most = scale * final["mean"], 100 if panel.percent else float("inf")
            reach = None if half is None else [[min(scale * half, mean)], [min(scale * half, most - mean)]]
            axes.errorbar([at], [mean], reach, color=colour, marker="*", markersize=9, capsize=3, clip_on=False,
                zorder=3)  # fmt: skip
    if panel.percent:
        low, high = axes.get_ylim()
        axes.set_ylim(max(0, low), min(100, high))
    axes.set_title(panel.name, color=ink, fontsize=10, loc="left", fontweight="bold")
    axes.set_xlabel("epoch", color=ink)
    axes.set_ylabel(panel.unit, color=ink)
    axes.tick_params(colors=ink)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(True, color=grid, linewidth=0.7)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(ink)
    if panel.name == "training loss":
        axes.set_ylim(bottom=min(0, axes.get_ylim()[0]))


def _line(axes, found: Curve, scale: float, colour: str, marker: str, linestyle: str) -> None:
    if not found.x:
        return
    mean = [scale * y for y in found.mean]
    marked = marker if len(found.x) <= 30 else None
    axes.plot(found.x, mean, color=colour, marker=marked, markersize=4, linewidth=1.6, linestyle=linestyle)
    half = [0 if h is None else scale * h for h in found.half]
    if any(half):
        low, high = ([y + sign * h for y, h in zip(mean, half)] for sign in (-1, 1))
        axes.fill_between(found.x, low, high, color=colour, alpha=0.18, linewidth=0)


def svg(panel: Panel, trainings: list[Training]) -> str:
    """One panel as an <svg> element for a page, in the colours of its style sheet: currentColor, --grid, --s0, ..."""
    needed("matplotlib", "blink report")
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    key = panel.name.replace(" ", "-")
    colours = [f"#{_SERIES + i:06x}" for i in range(len(COLOURS))]
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": key, "font.size": 9}):
        figure = Figure(figsize=_SIZE, layout="constrained")
        draw(figure.subplots(), panel, trainings, _INK, _GRID, colours)
        out = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(out, format="svg", transparent=True, metadata=nothing)
    text = out.getvalue()
    text = text[text.index("<svg") :]
    names = {_INK: "currentColor", _GRID: "var(--grid)"}
    names |= {colour: f"var(--s{i})" for i, colour in enumerate(colours)}
    for colour, name in names.items():
        text = text.replace(colour, name)
    # names are the page's, not the figure's
    text = re.sub(r'\b(id="|href="#|url\(#)', rf"\g<1>{key}-", text)
    text = re.sub(r'\s(?:xmlns(?::\w+)?|version)="[^"]*"', "", text)
    # as wide as there is room
    text = re.sub(r'\swidth="[^"]*"\sheight="[^"]*"', "", text, count=1)
    return text.replace("<svg", f'<svg role="img" aria-labelledby="{key}-caption"', 1)


def picture(trainings: list[Training], file, form: str) -> None:
    """All panels side by side, written as "png", "svg" or "pdf"."""
    needed("matplotlib", "blink plot")
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    figure = Figure(figsize=(_SIZE[0] * len(PANELS), _SIZE[1] + 0.6), layout="constrained")
    figure.get_layout_engine().set(wspace=0.06)
    for axes, panel in zip(figure.subplots(1, len(PANELS)), PANELS):
        draw(axes, panel, trainings, "black", "#dddddd", COLOURS)
    drawn = list(zip(trainings, cycle(COLOURS), cycle(MARKERS)))
    lines = [Line2D([], [], color=colour, marker=marker) for _, colour, marker in drawn]
    legend = figure.legend(lines, [described(training) for training, *_ in drawn], loc="outside lower center",
        ncols=min(3, len(drawn)), frameon=False, fontsize=9)  # fmt: skip
    for text in legend.get_texts():
        # a folder's name is no formula
        text.set_parse_math(False)
    with warnings.catch_warnings():
        # of names in letters that the font lacks
        warnings.simplefilter("ignore", UserWarning)
        figure.savefig(file, format=form, dpi=150)


def described(training: Training) -> str:
    """A training in a few words, printable whatever its names are."""
    runs = f"{len(training.runs)} run{'s' if len(training.runs) > 1 else ''}"
    text = f"{training.label} ({training.data.name}, {runs})"
    return text.encode(errors="replace").decode()
