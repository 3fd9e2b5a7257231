"""One training step: batch -> forward -> loss -> gradients -> update, everything it reads and writes on the device."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from blink.kernels.gather import Gather
from blink.model.backend import Backend
from blink.model.network import Network
from blink.training.batches import Batches
from blink.training.distributed import ALONE, Ranks
from blink.training.optimizer import Optimizer
from blink.training.precision import Precision
from blink.training.recipes import Recipe


@dataclass(frozen=True)
class Phase:
    """What all steps that one graph can replay have in common: the groups that are trained, the images' size."""

    active: tuple[int, ...]
    size: tuple[int, int]


def phase_of(recipe: Recipe, optimizer: Optimizer, step: int, total_steps: int, size: tuple[int, int]) -> Phase:
    """The phase that step 0, 1, ... of total_steps belongs to, on images whose own size is `size`."""
    return Phase(optimizer.active(step), recipe.image_size(step, total_steps, size))


def phases_of(recipe: Recipe, optimizer: Optimizer, total_steps: int, size: tuple[int, int]) -> dict[Phase, int]:
    """All phases of a run, in order, and how many steps each has."""
    ends = (*optimizer.steps, *(round(resolution.until * total_steps) for resolution in recipe.resolutions))
    starts = sorted({0, *(end for end in ends if end < total_steps)})
    counts: dict[Phase, int] = {}
    for first, next_one in pairwise([*starts, total_steps]):
        phase = phase_of(recipe, optimizer, first, total_steps, size)
        counts[phase] = counts.get(phase, 0) + next_one - first
    return counts


class Progress:
    """Where an epoch is, in memory that stays.

    losses [steps an epoch] float32: mean loss of each step's batch, NaN before it; correct [] int64: right answers;
    batch [1] int64: the next one.
    """

    def __init__(self, steps_per_epoch: int, device: torch.device):
        self.losses = torch.full((steps_per_epoch,), float("nan"), device=device)
        self.correct = torch.zeros((), dtype=torch.int64, device=device)
        self.batch = torch.zeros(1, dtype=torch.int64, device=device)
        self._one = torch.ones_like(self.batch)

    @property
    def tensors(self) -> list[Tensor]:
        return [self.losses, self.correct, self.batch]

    def start_epoch(self) -> None:
        """Back to the first batch."""
        self.losses.fill_(float("nan"))
        self.batch.zero_()
        self.correct.zero_()

    def end_step(self, loss: Tensor, correct: Tensor) -> None:
        """After a batch with this mean loss [1] and so many right answers []."""
        self.losses.index_copy_(0, self.batch, loss)
        torch._foreach_add_([self.correct, self.batch], [correct, self._one])


def loss_function(network: Network, backend: Backend, label_smoothing: float) -> Callable[..., tuple[Tensor, ...]]:
    """(images, labels, *fields of a Gather) -> logits, summed loss, right answers; compiled if the backend is."""

    def loss_of(images: Tensor, labels: Tensor, *fields: Tensor | int | None):
        logits = network.raw_logits(images, Gather(*fields))
        scale = network.config.logit_scale
        return logits, *backend.cross_entropy(logits, labels, label_smoothing=label_smoothing, scale=scale)

    return torch.compile(loss_of, dynamic=False) if backend.compile else loss_of


def training_step(
    network: Network,
    optimizer: Optimizer,
    batches: Batches,
    progress: Progress,
    loss_of: Callable[..., tuple[Tensor, ...]],
    precision: Precision,
    phase: Phase,
    micro_batch: int,
    ranks: Ranks = ALONE,
) -> None:
    """The next step, on the next batch of the epoch that `batches` holds, a micro-batch of images at a time, whose
    gradients add up. Nothing in it waits for the device.

    Each of several ranks takes its share of the batch, and counts the mean loss and the right answers of that.
    """
    optimizer.freeze_all_but(phase.active)
    gather, labels = batches.take(progress.batch, phase.size)
    parameters = optimizer.parameters(phase.active)
    batch_size = len(labels)
    if ranks.size > 1:
        share = ranks.share(batch_size)
        gather, labels = gather.part(share), labels[share]
    slices = [slice(first, first + micro_batch) for first in range(0, len(labels), micro_batch)]
    parts = []
    for images in slices:
        own, own_labels = (gather, labels) if len(slices) == 1 else (gather.part(images), labels[images])
        with ranks.statistics(len(labels), batch_size):
            with precision.autocast(labels.device):
                # a compiled function takes tensors, not what holds them
                fields = (getattr(own, field.name) for field in dataclasses.fields(own))
                logits, loss, correct = loss_of(batches.images(phase.size), own_labels, *fields)
            found = torch.autograd.grad(loss, parameters)
        if not parts:
            grads = list(found)
        else:
            torch._foreach_add_(grads, found)
        parts.append((logits.detach(), loss.detach(), correct))
    optimizer.update(ranks.summed(grads), phase.active, progress.batch)
    with torch.no_grad():
        logits, loss, correct = parts[0] if len(parts) == 1 else summed(parts)
        if batches.hardness is not None:
            losses = F.cross_entropy(logits.float() * network.config.logit_scale, labels, reduction="none")
            batches.hardness.index_copy_(0, gather.index, losses)
        progress.end_step(loss[None] / len(labels), correct)


def summed(parts: list[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """(logits, loss, right answers) of a batch from those of its parts."""
    logits, losses, correct = zip(*parts)
    return torch.cat(logits), torch.stack(losses).sum(), torch.stack(correct).sum()
