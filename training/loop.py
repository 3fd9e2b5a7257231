"""One training run, from random weights to accuracy."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from blink.errors import UserError
from blink.model.backend import Backend
from blink.model.network import Network
from blink.model.whitening import initialize_stem
from blink.training.batches import Batches
from blink.training.clock import Stopwatch
from blink.training.data.dataset import Dataset
from blink.training.evaluation import accuracy, images_at_once, logits_of
from blink.training.optimizer import Optimizer, WeightAverage
from blink.training.precision import Precision
from blink.training.recipes import Recipe
from blink.training.step import TrainingStep

# fewer steps than this an epoch leave the schedule too coarse to learn from a small data set
MIN_STEPS_PER_EPOCH = 16


@dataclass(frozen=True)
class Budget:
    """How a data set is cut into steps."""

    batch_size: int
    steps_per_epoch: int
    total_steps: int

    @property
    def epochs(self) -> int:
        return math.ceil(self.total_steps / self.steps_per_epoch)


def plan_budget(
    recipe: Recipe, images: int, batch_size: int | None = None, epochs: float | None = None, steps: int | None = None
) -> Budget:
    """The batch size is clamped to the images that an epoch takes: a stated one to their number, the recipe's own to 16
    steps an epoch.
    """
    images = max(1, round(recipe.keep * images))
    if batch_size is None:
        roomy = 2 ** int(math.log2(max(1, images // MIN_STEPS_PER_EPOCH)))
        batch_size = min(recipe.batch_size, max(roomy, min(images, 2)))
    batch_size = min(batch_size, images)
    per_epoch = images // batch_size
    total = steps if steps is not None else max(1, round((epochs or recipe.epochs) * per_epoch))
    return Budget(batch_size, per_epoch, total)


@dataclass
class EpochRow:
    """What one line of the log shows. train_loss: mean per image; accuracies are fractions, ema None before it runs.

    lr: of the recipe's last group; where that is a mean's, of the mean.
    """

    epoch: int
    step: int
    train_loss: float
    train_accuracy: float
    lr: float
    accuracy: float | None
    ema_accuracy: float | None
    seconds: float


@dataclass
class RunResult:
    """accuracy: test-time augmented, of the weight average if there is one; seconds: the timed segments;
    losses: per image, every step.
    """

    seed: int
    accuracy: float
    seconds: float
    images_per_second: float
    losses: list[float]
    epochs: list[EpochRow] = field(default_factory=list)
    state: dict[str, Tensor] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class Listener:
    """Who watches a run: called after each step (with the count done) and each epoch. Neither may synchronize."""

    on_step: Callable[[int, Tensor], None] = lambda done, losses: None
    on_epoch: Callable[[EpochRow], None] = lambda row: None


def build_network(recipe: Recipe, dataset: Dataset, backend: Backend, precision: Precision, seed: int) -> Network:
    """A randomly initialized network on the data set's device; the same seed gives the same weights on any backend."""
    torch.manual_seed(seed)
    try:
        network = Network(recipe.network, len(dataset.classes), dataset.image_shape, backend)
    except ValueError as error:
        raise UserError(str(error)) from error
    return network.to(dataset.device).to_compute_dtype(precision.weights)


class Trainer:
    """Everything a training needs, in memory that stays: one object trains any number of runs, one seed after another.

    `dataset` is on its device; graph: whether each step is a captured CUDA graph. Raises UserError for a data set that
    the network cannot be trained on.
    """

    def __init__(
        self, recipe: Recipe, dataset: Dataset, budget: Budget, backend: Backend, precision: Precision, graph: bool
    ):
        check_batch(recipe, dataset, budget)
        self._recipe, self._dataset, self._backend, self.precision = recipe, dataset, backend, precision
        self.budget, self.graph = budget, graph
        self.device, self.image_shape = dataset.device, dataset.image_shape
        self.network = build_network(recipe, dataset, backend, precision, seed=0)
        self._at_once = images_at_once(self.network, self.image_shape, precision.compute, self.device)
        self._average = WeightAverage(self.network, recipe.ema_decay**recipe.ema_every) if recipe.ema_fraction else None
        self._batches = Batches(
            dataset.train_images, dataset.train_labels, budget.batch_size, recipe.shift, recipe.flip, recipe.cutout,
            recipe.jitter, recipe.image_sizes(dataset.image_shape[1:]), recipe.keep,
        )  # fmt: skip
        self._optimizer = Optimizer(
            self.network, recipe, budget.batch_size, budget.steps_per_epoch, budget.total_steps, backend
        )
        self.step = TrainingStep(
            self.network, self._optimizer, self._batches, backend, precision, recipe, budget.total_steps, graph,
        )  # fmt: skip

    def run(self, seed: int, listener: Listener = Listener(), validate: int | None = None) -> RunResult:
        """Train once from the seed's random weights. validate limits each epoch's untimed validation images.

        Timed: the whitening statistics, every training step, the final test-time-augmented logits. Raises UserError
        when the loss stops being finite.
        """
        recipe, dataset, budget, network, device = self._recipe, self._dataset, self.budget, self.network, self.device
        self._restart(seed, dataset.train_labels)
        generator = torch.Generator(device).manual_seed(seed)
        rows: list[EpochRow] = []
        watch, training_watch = Stopwatch(device), Stopwatch(device)

        watch.start()
        self._whiten()
        self._batches.resize()
        network.train()
        for epoch in range(budget.epochs):
            training_watch.start()
            first, last = self.train_epoch(epoch, generator, listener)
            training_watch.stop()
            watch.stop()
            losses = self.step.losses[first:last]
            check_finite(losses, first, budget, self.precision)
            row = EpochRow(
                epoch + 1,
                last,
                losses.mean().item(),
                self.step.correct.item() / ((last - first) * budget.batch_size),
                recipe.groups[-1].lr * recipe.schedule.factor(last - 1, budget.total_steps),
                *self._validate(validate),
                watch.seconds,
            )
            rows.append(row)
            listener.on_epoch(row)
            watch.start()

        with self._evaluated():
            logits = self._final_logits()
            watch.stop()
            state = {name: value.detach().cpu().clone() for name, value in network.state_dict().items()}
        images_per_second = budget.batch_size * budget.total_steps / max(training_watch.seconds, 1e-9)
        return RunResult(
            seed,
            accuracy(logits, dataset.test_labels),
            watch.seconds,
            images_per_second,
            self.step.losses.tolist(),
            rows,
            state,
        )

    @property
    def compiles(self) -> bool:
        """Whether first uses take longer than later ones, which a warm-up is for."""
        return self.device.type == "cuda" or self._backend.compile

    @property
    def compiles_ahead(self) -> bool:
        """Whether there are kernels that `compile_ahead` compiles."""
        return self.device.type == "cuda" and self._backend.name == "fused"

    def warm_up(self, seed: int) -> dict[str, float]:
        """Each part of a run once, on random labels, and nobody counts it: what compiles, captures or picks algorithms
        does so here. A later run is not changed by it.

        Returns seconds: "kernels", compiling Triton's ahead where there are any; "warm-up", the rest.
        """
        labels, classes = self._dataset.train_labels, len(self._dataset.classes)
        generator = torch.Generator(self.device).manual_seed(0)
        seconds, began = {}, time.perf_counter()
        if self.compiles_ahead:
            self.compile_ahead(seed)
            # what compiling takes is not what training takes
            torch.cuda.reset_peak_memory_stats(self.device)
            seconds["kernels"], began = time.perf_counter() - began, time.perf_counter()
        self.prepare(seed, torch.randint(classes, labels.shape, generator=generator, device=self.device))
        # all later epochs are drawn as the second is
        for epoch in range(min(2, self.budget.epochs)):
            self._batches.draw(generator, epoch)
        for phase in self.step.phases():
            self.step.start_epoch()
            self.step.replay(phase)
        if self._average is not None:
            self._average.update()
        with self._evaluated():
            self._final_logits()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return {**seconds, "warm-up": time.perf_counter() - began}

    def compile_ahead(self, seed: int) -> None:
        """Compile every kernel that a run launches, in parallel, where a run would compile them one after another."""
        from blink.kernels.compile_ahead import compiled_ahead

        self.prepare(seed)
        self._batches.draw(torch.Generator(self.device).manual_seed(seed), 0)
        with compiled_ahead():
            for phase in self.step.phases():
                self.step.rehearse(phase)
            # an average's kernels are those of the live weights
            with self.precision.autocast(self.device):
                self._final_logits()

    def prepare(self, seed: int, labels: Tensor | None = None) -> None:
        """Ready for the first step of a run that somebody else drives. labels: in place of the data set's."""
        self._restart(seed, self._dataset.train_labels if labels is None else labels)
        self._whiten()
        self._batches.resize()
        self.network.train()

    def _whiten(self) -> None:
        recipe, dataset = self._recipe, self._dataset
        varying = initialize_stem(
            self.network.stem,
            dataset.train_images[: recipe.whiten_images],
            dataset.mean,
            dataset.std,
            recipe.network.whiten_eps,
            recipe.centered_whitening,
        )
        self.network.copy_only(varying)

    def _restart(self, seed: int, labels: Tensor) -> None:
        """Everything as before the first step of a run; the tensors stay where captured graphs know them."""
        fresh = build_network(self._recipe, self._dataset, self._backend, self.precision, seed)
        self.network.load_state_dict(fresh.state_dict())
        self._batches.labels.copy_(labels)
        self.step.start_run()
        if self._average is not None:
            self._average.reset()

    def train_epoch(self, epoch: int, generator: torch.Generator, listener: Listener = Listener()) -> tuple[int, int]:
        """All steps of epoch 0, 1, ...: returns the first and the one after the last. Nothing waits for the device."""
        recipe, budget, average = self._recipe, self.budget, self._average
        first = epoch * budget.steps_per_epoch
        last = min(first + budget.steps_per_epoch, budget.total_steps)
        average_from = budget.total_steps - round(recipe.ema_fraction * budget.total_steps)
        self._batches.draw(generator, epoch)
        self.step.start_epoch()
        for step in range(first, last):
            self.step(step)
            done = step + 1
            final = done == budget.total_steps
            if average is not None and (
                (done > average_from and done % recipe.ema_every == 0) or (final and not average.started)
            ):
                average.update()
            listener.on_step(done, self.step.losses)
        return first, last

    def _final_logits(self) -> Tensor:
        """Of the test images, test-time augmented."""
        recipe, images = self._recipe, self._dataset.test_images
        return logits_of(self.network, images, recipe.tta, recipe.tta_fraction, self._at_once)

    @contextmanager
    def _evaluated(self) -> Iterator[None]:
        """Inside, the network is what a run ends with: the weight average where the recipe keeps one."""
        averaged = nullcontext() if self._average is None else self._average.applied()
        with averaged, self.precision.autocast(self.device):
            yield

    def _validate(self, limit: int | None) -> tuple[float | None, float | None]:
        """Accuracy of the live weights and, once it exists, of their average, on the first `limit` test images."""
        if limit == 0:
            return None, None
        images, labels = self._dataset.test_images[:limit], self._dataset.test_labels[:limit]

        def measured() -> float:
            return accuracy(logits_of(self.network, images, None, at_once=self._at_once), labels)

        with self.precision.autocast(self.device):
            live = measured()
        if self._average is None or not self._average.started:
            return live, None
        with self._evaluated():
            return live, measured()


def check_batch(recipe: Recipe, dataset: Dataset, budget: Budget) -> None:
    """Batch normalization needs two values per channel after the last pooling."""
    poolings = 2 ** len(recipe.network.groups)
    _, *whole = dataset.image_shape
    height, width = min(recipe.image_sizes(tuple(whole)))
    lost = recipe.network.minimum_image_size - poolings
    if budget.batch_size == 1 and ((height - lost) // poolings) * ((width - lost) // poolings) == 1:
        raise UserError(
            f"batches of 1 image of {height}x{width} leave 1 value per channel, which has no variance to normalize "
            "with; expected at least 2: use --batch-size 2 and at least 2 training images, or larger images"
        )


def check_finite(losses: Tensor, first_step: int, budget: Budget, precision: Precision) -> None:
    bad = (~losses.isfinite()).nonzero()
    if len(bad):
        step = first_step + int(bad[0])
        dtype = "" if precision.name == "fp32" else "--dtype fp32, "
        raise UserError(
            f"the loss became {losses[int(bad[0])].item()} at step {step + 1} of {budget.total_steps} (batch size "
            f"{budget.batch_size}); expected a finite loss: try {dtype}a larger --batch-size or more --steps"
        )
