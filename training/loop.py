"""The story of a run: random weights, whitening, epochs of steps, the final evaluation.

    data set -> batches -> network -> loss -> gradients -> optimizer -> accuracy

What a step does is in step.py; what stays from run to run is in trainer.py.
"""

from contextlib import nullcontext

import torch
from torch import Tensor

from blink.errors import UserError
from blink.training.budget import Budget
from blink.training.checkpoint import Best, Checkpoints, RunState
from blink.training.clock import Stopwatch
from blink.training.evaluation import accuracy
from blink.training.listener import SILENT, Listener
from blink.training.metrics import balanced_accuracy, confusion, held_out
from blink.training.precision import Precision
from blink.training.results import EpochRow, Kept, RunResult
from blink.training.trainer import Trainer


def train(
    trainer: Trainer, seed: int, listener: Listener = SILENT, validate: int | None = None, keep_best: bool = False,
    checkpoints: Checkpoints | None = None,
) -> RunResult:  # fmt: skip
    """Train once from the seed's random weights, or go on from the run's last checkpoint.

    validate limits each epoch's untimed validation images. keep_best: the result has the weights of the epoch that did
    best on them. Timed: the whitening statistics, smaller copies of the images where the recipe has them, drawing
    batches, every training step, the final test-time-augmented logits. Raises UserError when the loss stops being
    finite, and for checkpoints of another job.
    """
    result = None
    listener.on_start(seed)
    try:
        result = _train(trainer, seed, listener, validate, keep_best, checkpoints)
        return result
    finally:
        listener.on_end(result)


def _train(
    trainer: Trainer, seed: int, listener: Listener, validate: int | None, keep_best: bool,
    checkpoints: Checkpoints | None,
) -> RunResult:  # fmt: skip
    budget, labels = trainer.budget, trainer.dataset.test_labels
    run = RunState.at_start(seed, trainer.device)
    clock = run.clock
    trainer.restart(seed)

    clock.start()
    trainer.whiten()
    if checkpoints is not None:
        checkpoints.resume(trainer, run)
    if not trainer.ranks.alike(torch.tensor(len(run.rows), device=trainer.device)):
        raise UserError("the ranks found different checkpoints; expected one --out folder that all machines share")
    if run.rows:
        listener.on_resume(run.rows, run.losses)
    for epoch in range(len(run.rows), budget.epochs):
        run.steps_clock.start()
        train_epoch(trainer, epoch, run.generator, listener)
        run.steps_clock.stop()
        clock.stop()
        run.losses += trainer.progress.losses[: len(budget.steps_of(epoch))].tolist()
        run.rows.append(epoch_row(trainer, epoch, clock, validate))
        if keep_best:
            run.best = better(run.best, run.rows[-1], trainer)
        listener.on_epoch(run.rows[-1])
        if checkpoints is not None:
            checkpoints.save(trainer, run)
        clock.start()
    with trainer.final_weights():
        logits = trainer.final_logits()
        clock.stop()
        weights = copied(trainer.network)

    images_per_second = budget.batch_size * budget.total_steps / max(run.steps_clock.seconds, 1e-9)
    final = accuracy(logits, labels)
    result = RunResult(seed, final, clock.seconds, images_per_second, run.losses, run.rows, weights, logits.cpu())
    counts = confusion(logits.argmax(1), labels, logits.shape[1])
    result.balanced_accuracy, result.held_out = balanced_accuracy(counts), held_out(logits, labels)
    if run.best is not None and run.best.epoch < budget.epochs:
        trainer.network.load_state_dict(run.best.state)
        with trainer.precision.autocast(trainer.device):
            logits = trainer.final_logits()
        result.state, result.logits = run.best.state, logits.cpu()
        result.kept = Kept(run.best.epoch, accuracy(logits, labels))
    return result


def better(best: Best | None, row: EpochRow, trainer: Trainer) -> Best | None:
    """The better of the best epoch so far and the one that just ended, of two alike the later."""
    averaged = row.ema_accuracy is not None
    found = row.ema_accuracy if averaged else row.accuracy
    if found is None or (best is not None and found < best.accuracy):
        return best
    with trainer.final_weights() if averaged else nullcontext():
        return Best(row.epoch, found, copied(trainer.network))


def copied(network: torch.nn.Module) -> dict[str, Tensor]:
    """A network's state_dict on the CPU, in memory of its own."""
    return {name: value.detach().cpu().clone() for name, value in network.state_dict().items()}


def train_epoch(trainer: Trainer, epoch: int, generator: torch.Generator, listener: Listener = SILENT) -> None:
    """All steps of epoch 0, 1, ... Nothing waits for the device."""
    trainer.start_epoch(epoch, generator)
    for step in trainer.budget.steps_of(epoch):
        trainer.do_step(trainer.phase_at(step))
        trainer.update_average(step + 1)
        listener.on_step(step + 1, trainer.progress.losses)
    trainer.end_epoch(epoch)


def epoch_row(trainer: Trainer, epoch: int, clock: Stopwatch, validate: int | None) -> EpochRow:
    """What the epoch that just ended came to. Raises UserError when a loss is not finite."""
    recipe, budget, progress = trainer.recipe, trainer.budget, trainer.progress
    steps = budget.steps_of(epoch)
    losses = progress.losses[: len(steps)]
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
