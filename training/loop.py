"""The story of a run: random weights, whitening, epochs of steps, the final evaluation.

    data set -> batches -> network -> loss -> gradients -> optimizer -> accuracy

What a step does is in step.py; what stays from run to run is in trainer.py.
"""

import torch
from torch import Tensor

from blink.errors import UserError
from blink.training.budget import Budget
from blink.training.clock import Stopwatch
from blink.training.evaluation import accuracy
from blink.training.listener import SILENT, Listener
from blink.training.precision import Precision
from blink.training.results import EpochRow, RunResult
from blink.training.trainer import Trainer


def train(trainer: Trainer, seed: int, listener: Listener = SILENT, validate: int | None = None) -> RunResult:
    """Train once from the seed's random weights. validate limits each epoch's untimed validation images.

    Timed: the whitening statistics, smaller copies of the images where the recipe has them, drawing batches, every
    training step, the final test-time-augmented logits. Raises UserError when the loss stops being finite.
    """
    result = None
    listener.on_start(seed)
    try:
        result = _train(trainer, seed, listener, validate)
        return result
    finally:
        listener.on_end(result)


def _train(trainer: Trainer, seed: int, listener: Listener, validate: int | None) -> RunResult:
    budget, dataset, device = trainer.budget, trainer.dataset, trainer.device
    generator = torch.Generator(device).manual_seed(seed)
    clock, steps_clock = Stopwatch(device), Stopwatch(device)
    rows: list[EpochRow] = []
    trainer.restart(seed)

    clock.start()
    trainer.whiten()
    for epoch in range(budget.epochs):
        steps_clock.start()
        train_epoch(trainer, epoch, generator, listener)
        steps_clock.stop()
        clock.stop()
        rows.append(epoch_row(trainer, epoch, clock, validate))
        listener.on_epoch(rows[-1])
        clock.start()
    with trainer.final_weights():
        logits = trainer.final_logits()
        clock.stop()
        weights = {name: value.detach().cpu().clone() for name, value in trainer.network.state_dict().items()}

    images_per_second = budget.batch_size * budget.total_steps / max(steps_clock.seconds, 1e-9)
    return RunResult(
        seed, accuracy(logits, dataset.test_labels), clock.seconds, images_per_second,
        trainer.progress.losses.tolist(), rows, weights, logits.cpu(),
    )  # fmt: skip


def train_epoch(trainer: Trainer, epoch: int, generator: torch.Generator, listener: Listener = SILENT) -> None:
    """All steps of epoch 0, 1, ... Nothing waits for the device."""
    trainer.start_epoch(epoch, generator)
    for step in trainer.budget.steps_of(epoch):
        trainer.do_step(trainer.phase_at(step))
        trainer.update_average(step + 1)
        listener.on_step(step + 1, trainer.progress.losses)


def epoch_row(trainer: Trainer, epoch: int, clock: Stopwatch, validate: int | None) -> EpochRow:
    """What the epoch that just ended came to. Raises UserError when a loss is not finite."""
    recipe, budget, progress = trainer.recipe, trainer.budget, trainer.progress
    steps = budget.steps_of(epoch)
    losses = progress.losses[steps.start : steps.stop]
    check_finite(losses, steps.start, budget, trainer.precision)
    return EpochRow(
        epoch + 1,
        steps.stop,
        losses.mean().item(),
        progress.correct.item() / (len(steps) * budget.batch_size),
        recipe.param_groups[-1].lr * recipe.schedule.factor(steps.stop - 1, budget.total_steps),
        *validated(trainer, validate),
        clock.seconds,
    )


def validated(trainer: Trainer, limit: int | None) -> tuple[float | None, float | None]:
    """Accuracy of the live weights and, once it exists, of their average, on the first `limit` test images."""
    if limit == 0:
        return None, None
    images, labels = trainer.dataset.test_images[:limit], trainer.dataset.test_labels[:limit]
    with trainer.precision.autocast(trainer.device):
        live = accuracy(trainer.logits(images), labels)
    if trainer.average is None or not trainer.average.started:
        return live, None
    with trainer.final_weights():
        return live, accuracy(trainer.logits(images), labels)


def check_finite(losses: Tensor, first_step: int, budget: Budget, precision: Precision) -> None:
    """Raises UserError naming the first step whose loss is not finite."""
    bad = (~losses.isfinite()).nonzero()
    if len(bad):
        step = first_step + int(bad[0])
        dtype = "" if precision.name == "fp32" else "--dtype fp32, "
        raise UserError(
            f"the loss became {losses[int(bad[0])].item()} at step {step + 1} of {budget.total_steps} (batch size "
            f"{budget.batch_size}); expected a finite loss: try {dtype}a larger --batch-size or more --steps"
        )
