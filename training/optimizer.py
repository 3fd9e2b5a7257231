"""SGD with separate weight and bias groups, its learning-rate schedule, and the weight average (EMA)."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from training.recipes import Recipe


def make_optimizer(network: nn.Module, recipe: Recipe, batch_size: int) -> torch.optim.SGD:
    """Nesterov SGD for a loss summed over `batch_size` images; each group keeps its peak rate as `peak_lr`."""
    trained = [(name, p) for name, p in network.named_parameters() if p.requires_grad]
    biases = [p for name, p in trained if name.endswith("bias")]
    weights = [p for name, p in trained if not name.endswith("bias")]
    lr, decay = recipe.lr / batch_size, recipe.decay * batch_size
    groups = [
        dict(params=weights, peak_lr=lr, weight_decay=decay),
        dict(params=biases, peak_lr=lr * recipe.bias_lr_scale, weight_decay=decay * recipe.bias_decay_scale),
    ]
    return torch.optim.SGD(groups, lr=lr, momentum=recipe.momentum, nesterov=True, foreach=True)


def lr_factor(step: int, total_steps: int, recipe: Recipe) -> float:
    """The learning rate at `step` as a fraction of the peak: up from 0, down to the final fraction, then constant.

    The peak is at `peak_fraction` of all steps; the constant part is the last `ema_fraction`.
    """
    peak = max(recipe.peak_fraction * total_steps - 1, 0.0)
    end = max(total_steps - round(recipe.ema_fraction * total_steps) - 1, peak)
    if step < peak:
        return step / peak
    if step >= end:
        return recipe.final_lr_fraction if end > peak else 1.0
    return 1 + (recipe.final_lr_fraction - 1) * (step - peak) / (end - peak)


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor


class WeightAverage:
    """Exponential moving average of a network's floating-point parameters and buffers, kept in float32.

    It starts as a copy of the network at its first update. Source: hlb-CIFAR10.
    """

    def __init__(self, network: nn.Module, decay: float):
        self._live = [t for t in network.state_dict().values() if t.is_floating_point()]
        self._decay = decay
        self._average: list[Tensor] | None = None

    @property
    def started(self) -> bool:
        return self._average is not None

    @torch.no_grad()
    def update(self) -> None:
        live = [t.detach().float() for t in self._live]
        if self._average is None:
            self._average = [t.clone() for t in live]
        torch._foreach_lerp_(self._average, live, 1 - self._decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the network holds the average; outside, its own values again."""
        if self._average is None:
            raise RuntimeError("the weight average was never updated")
        kept = [t.detach().clone() for t in self._live]
        try:
            self._copy(self._average)
            yield
        finally:
            self._copy(kept)

    @torch.no_grad()
    def _copy(self, values: list[Tensor]) -> None:
        for live, value in zip(self._live, values):
            live.copy_(value)
