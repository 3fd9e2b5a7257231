"""One training run, from random weights to accuracy."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.backend import Backend
from model.network import Network
from model.whitening import initialize_stem
from training.batches import training_batches
from training.clock import Stopwatch
from training.data.dataset import Dataset
from training.errors import UserError
from training.evaluation import accuracy, logits_of
from training.optimizer import WeightAverage, lr_factor, make_optimizer, set_lr
from training.precision import Precision
from training.recipes import Recipe

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
    """The batch size is clamped to the data set: a stated one to its size, the recipe's own to 16 steps an epoch."""
    if batch_size is None:
        roomy = 2 ** int(math.log2(max(1, images // MIN_STEPS_PER_EPOCH)))
        batch_size = min(recipe.batch_size, max(roomy, min(images, 2)))
    batch_size = min(batch_size, images)
    per_epoch = images // batch_size
    total = steps if steps is not None else max(1, round((epochs or recipe.epochs) * per_epoch))
    return Budget(batch_size, per_epoch, total)


@dataclass
class EpochRow:
    """What one line of the log shows. train_loss: mean per image; accuracies are fractions, ema None before it runs."""

    epoch: int
    step: int
    train_loss: float
    lr: float
    accuracy: float | None
    ema_accuracy: float | None
    seconds: float


@dataclass
class RunResult:
    """accuracy: of the weight average, mirror-averaged; seconds: the timed segments; losses: per image, every step."""

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


def train(
    recipe: Recipe,
    dataset: Dataset,
    budget: Budget,
    backend: Backend,
    precision: Precision,
    seed: int,
    listener: Listener = Listener(),
    validate: int | None = None,
) -> RunResult:
    """Train one network. `dataset` is on its device; `validate` limits each epoch's untimed validation images.

    Timed: the whitening statistics, every training step, the final test-time-augmented logits. Raises UserError when
    the loss stops being finite.
    """
    device = dataset.device
    check_batch(recipe, dataset, budget)
    network = build_network(recipe, dataset, backend, precision, seed)
    optimizer = make_optimizer(network, recipe, budget.batch_size)
    average = WeightAverage(network, recipe.ema_decay**recipe.ema_every)
    average_from = budget.total_steps - round(recipe.ema_fraction * budget.total_steps)
    generator = torch.Generator(device).manual_seed(seed)
    losses = torch.full((budget.total_steps,), float("nan"), device=device)
    rows: list[EpochRow] = []
    watch, training_watch = Stopwatch(device), Stopwatch(device)

    watch.start()
    stem = network.stem
    initialize_stem(
        stem,
        dataset.train_images,
        dataset.mean,
        dataset.std,
        recipe.network.whiten_eps,
        recipe.centered_whitening,
    )
    network.train()
    step = 0
    for epoch in range(budget.epochs):
        training_watch.start()
        first = step
        for images, labels in training_batches(
            dataset.train_images, dataset.train_labels, budget.batch_size, recipe.shift, recipe.flip, generator
        ):
            set_lr(optimizer, lr_factor(step, budget.total_steps, recipe))
            with precision.autocast(device):
                logits = network(images)
            loss = F.cross_entropy(logits, labels, label_smoothing=recipe.label_smoothing, reduction="sum")
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses[step] = loss.detach() / budget.batch_size
            step += 1
            last = step == budget.total_steps
            if (step > average_from and step % recipe.ema_every == 0) or (last and not average.started):
                average.update()
            listener.on_step(step, losses)
            if last:
                break
        training_watch.stop()
        watch.stop()
        check_finite(losses[first:step], first, budget)
        row = EpochRow(
            epoch + 1,
            step,
            losses[first:step].mean().item(),
            optimizer.param_groups[0]["lr"] * budget.batch_size,
            *_validate(network, average, dataset, precision, validate),
            watch.seconds,
        )
        rows.append(row)
        listener.on_epoch(row)
        watch.start()

    with average.applied(), precision.autocast(device):
        logits = logits_of(network, dataset.test_images, mirror=True)
    watch.stop()
    with average.applied():
        state = {name: value.detach().cpu().clone() for name, value in network.state_dict().items()}
    images_per_second = budget.batch_size * budget.total_steps / max(training_watch.seconds, 1e-9)
    return RunResult(
        seed,
        accuracy(logits, dataset.test_labels),
        watch.seconds,
        images_per_second,
        losses.tolist(),
        rows,
        state,
    )


def _validate(
    network: nn.Module, average: WeightAverage, dataset: Dataset, precision: Precision, limit: int | None
) -> tuple[float | None, float | None]:
    """Accuracy of the live weights and, once it exists, of their average, on the first `limit` test images."""
    if limit == 0:
        return None, None
    images, labels = dataset.test_images[:limit], dataset.test_labels[:limit]
    with precision.autocast(dataset.device):
        live = accuracy(logits_of(network, images, mirror=False), labels)
        if not average.started:
            return live, None
        with average.applied():
            return live, accuracy(logits_of(network, images, mirror=False), labels)


def check_batch(recipe: Recipe, dataset: Dataset, budget: Budget) -> None:
    """Batch normalization needs two values per channel after the last pooling."""
    poolings = 2 ** len(recipe.network.groups)
    _, height, width = dataset.image_shape
    lost = recipe.network.minimum_image_size - poolings
    if budget.batch_size == 1 and ((height - lost) // poolings) * ((width - lost) // poolings) == 1:
        raise UserError(
            f"batches of 1 image of {height}x{width} leave 1 value per channel, which has no variance to normalize "
            "with; expected at least 2: use --batch-size 2 and at least 2 training images, or larger images"
        )


def check_finite(losses: Tensor, first_step: int, budget: Budget) -> None:
    bad = (~losses.isfinite()).nonzero()
    if len(bad):
        step = first_step + int(bad[0])
        raise UserError(
            f"the loss became {losses[int(bad[0])].item()} at step {step + 1} of {budget.total_steps} (batch size "
            f"{budget.batch_size}); expected a finite loss: try --dtype fp32, a larger --batch-size or more --steps"
        )
