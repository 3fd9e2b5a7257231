"""What a person sees of a run: header, progress bar, epoch rows, summary; and the same as JSON."""

from collections.abc import Sequence
from statistics import fmean

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from blink.training.bars import bars
from blink.training.budget import Budget
from blink.training.data.dataset import Dataset
from blink.training.listener import Listener
from blink.training.recipes import Recipe
from blink.training.results import EpochRow, RunResult, run_as_dict, spread, spreads, with_spread

GENERATED_WARNING = "NOT CIFAR-10: a generated set; its accuracy means nothing elsewhere"
_LOGGED_STEPS = 100


class Report(Listener):
    """Prints as the runs go, then `summary()`; `as_dict()` is the same as data."""

    def __init__(self, console: Console, facts: dict, seeds: range = range(1), runs: Sequence[RunResult] = ()):
        """facts: everything known before the first run, ready for JSON (see job.py); seeds: of all runs that there will
        be; runs: those that ended before.
        """
        self.console = console
        self.facts = facts
        self._seeds = seeds
        self.runs = list(runs)
        self._progress: Progress | None = None

    def header(self, recipe: Recipe, dataset: Dataset, budget: Budget, notes: list[str]) -> None:
        say = self._say
        if dataset.generated:
            say(GENERATED_WARNING, style="bold red")
        _, height, width = dataset.image_shape
        environment, kernels = self.facts["environment"], self.facts["kernels"]
        say(f"Blink: {recipe.name} on {dataset.name}", style="bold")
        say(
            f"data     {len(dataset.train_images):,} training and {len(dataset.test_images):,} test images, "
            f"{height}x{width}, {len(dataset.classes)} classes"
        )
        say(f"         fingerprint {dataset.fingerprint}")
        say(f"device   {environment['device']}, {self.facts['dtype']}")
        say(f"kernels  {kernels['name']}: {kernels['stem']}")
        share = "" if recipe.keep == 1 else f" of {recipe.keep:.0%} of them"
        epochs = f"{budget.epochs} epoch{'s' if budget.epochs > 1 else ''}"
        say(f"budget   {budget.total_steps} steps of {budget.batch_size} images ({epochs}{share})")
        for note in notes:
            self.note(note)

    def note(self, line: str) -> None:
        """What a person should know."""
        self._say(f"note     {line}", style="yellow")

    def on_start(self, seed: int) -> None:
        if len(self._seeds) > 1:
            self._say(f"run {self._seeds.index(seed) + 1} of {len(self._seeds)}, seed {seed}", style="bold")
        ema = f"{'EMA acc':>9} " if self.facts["recipe"]["ema_fraction"] else ""
        self._say(f"{'epoch':>5} {'step':>6} {'loss':>8} {'acc':>7} {'lr':>8} {'test acc':>9} {ema}{'seconds':>9}")
        # on a GPU the loss is read at the epoch's end only, so that showing it costs no synchronization
        self._live_loss = "-"
        self._progress = bars(self.console, "loss {task.fields[loss]}")
        self._task = self._progress.add_task("training", total=self.facts["budget"]["total_steps"], loss="-")
        self._progress.start()

    def on_step(self, done: int, losses: Tensor) -> None:
        if self._progress.disable:
            return
        if losses.device.type == "cpu":
            self._live_loss = f"{losses[(done - 1) % len(losses)].item():.3f}"
        last = done == self.facts["budget"]["total_steps"]
        self._progress.update(
            self._task, completed=done, loss=self._live_loss, description="evaluating" if last else "training"
        )

    def on_epoch(self, row: EpochRow) -> None:
        self._live_loss = f"{row.train_loss:.3f}"
        shown = [row.accuracy, *([row.ema_accuracy] if self.facts["recipe"]["ema_fraction"] else [])]
        accuracies = " ".join(f"{x:9.4f}" if x is not None else f"{'-':>9}" for x in shown)
        self._say(
            f"{row.epoch:5} {row.step:6} {row.train_loss:8.4f} {row.train_accuracy:7.4f} {row.lr:8.4f} {accuracies} "
            f"{row.seconds:9.1f}"
        )

    def on_end(self, result: RunResult | None) -> None:
        """Stop the bar and, unless the run was cut off, count its result."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
        if result is not None:
            self._insert(result)

    def add(self, run: RunResult, where: str) -> None:
        """A run that ended elsewhere."""
        self._insert(run)
        self._say(f"seed {run.seed} on {where}: accuracy {run.accuracy:.4f}, {run.seconds:.1f} seconds")

    def _insert(self, run: RunResult) -> None:
        self.runs.append(run)
        self.runs.sort(key=lambda run: run.seed)

    def summary(self) -> None:
        facts = self.facts
        if not self.runs:
            self._say("no run finished", style="bold")
            return
        accuracy, seconds = spreads(self.runs).values()
        rate = fmean(r.images_per_second for r in self.runs)
        table = Table(show_header=False, box=None, padding=(0, 2, 0, 0), title_justify="left", title="summary")
        data = facts["data"]
        if data["generated"]:
            table.add_row("warning", f"[bold red]{GENERATED_WARNING}[/]")
        table.add_row("accuracy", f"{with_spread(accuracy, 4)}  ({self._evaluated_as()}, {data['test']:,} images)")
        balanced = [r.balanced_accuracy for r in self.runs if r.balanced_accuracy is not None]
        if any(abs(r.accuracy - value) > 1e-6 for r, value in zip(self.runs, balanced)):
            table.add_row("balanced", f"{with_spread(spread(balanced), 4)}  (accuracy, the mean over the classes)")
        kept = [f"epoch {r.kept.epoch}: {r.kept.accuracy:.4f}" for r in self.runs if r.kept is not None]
        if kept:
            table.add_row("best kept", ", ".join(kept[:3]) + (f" and {len(kept) - 3} more" if len(kept) > 3 else ""))
        table.add_row("seconds", f"{with_spread(seconds, 2)}  (whitening, training, evaluation)")
        table.add_row("training", f"{rate:,.0f} images/s")
        if facts["flops"] is not None:
            total = facts["flops"]["total"] / 1e15
            table.add_row("FLOPs", f"{total:.4g} PFLOP a run (whitening, training, evaluation)")
        parts = facts["start_up"]
        named = ", ".join(f"{name} {value:.1f}" for name, value in parts.items())
        table.add_row("start-up", f"{sum(parts.values()):.1f} s  ({named})")
        table.add_row("kernels", f"{facts['kernels']['name']}: {facts['kernels']['stem']}")
        table.add_row("data", f"{escape(data['name'])}, fingerprint {data['fingerprint']}")
        self.console.print(table)

    def _evaluated_as(self) -> str:
        recipe = self.facts["recipe"]
        views = {None: "not augmented", "mirror": "mirrored", "translate": "translated"}
        views = views.get(recipe["tta"], "mirrored and translated")
        if recipe["tta_fraction"] < 1:
            views += " where least sure"
        return f"EMA, {views}" if recipe["ema_fraction"] else views

    def seeds_left(self) -> list[int]:
        """Of the runs that have not ended."""
        ended = {run.seed for run in self.runs}
        return [seed for seed in self._seeds if seed not in ended]

    @property
    def every(self) -> int:
        """Steps from one loss that is written to the next."""
        return 1 if self.facts["steps_given"] else max(1, self.facts["budget"]["total_steps"] // _LOGGED_STEPS)

    def as_dict(self) -> dict:
        runs = [run_as_dict(run, self.every) for run in self.runs]
        return {**self.facts, "runs": runs, "summary": spreads(self.runs) if self.runs else None}

    def _say(self, text: str, style: str | None = None) -> None:
        self.console.print(text, style=style, highlight=False, markup=False, soft_wrap=False)
