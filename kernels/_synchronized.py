"""Batch statistics of all that several processes hold of a batch, merged exactly, inside of `synchronized`; no triton.

Outside of it, which is how everything but `blink train --ddp` runs, the normalizing ops find None here and do what they
always do. Every rank calls the same ops in the same order. Sources: merging, Chan et al. 1979; the gradient through
shared statistics, Ioffe and Szegedy 2015, its two sums taken over all ranks.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .differentiation import differentiable_once

# PyTorch's newer name for it, where it has one
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Lost(RuntimeError):
    """A collective failed: another rank is gone, or was never there."""


@contextmanager
def collective() -> Iterator[None]:
    """Around a collective: raises Lost where it fails."""
    try:
        yield
    except RuntimeError as error:
        raise Lost(str(error)) from error


class Sharing(NamedTuple):
    """The ranks that share a batch, how many of its images are here, and how many it has."""

    group: "dist.ProcessGroup"
    local: int
    total: int

    def of_all(self, rows: int) -> int:
        """How many values a channel has on all ranks, where it has `rows` here."""
        return rows // self.local * self.total

    def gathered(self, mean: Tensor, m2: Tensor, rows: int) -> tuple[Tensor, Tensor, Tensor]:
        """Every rank's mean and squared deviations [ranks, C] and count [ranks]: one collective."""
        mine = torch.cat([mean, m2, mean.new_full((1,), rows)])
        every = mine.new_empty(self.group.size() * len(mine))
        with collective():
            all_gather(every, mine, self.group)
        every = every.view(-1, len(mine))
        means, m2s, counts = every.split([len(mean), len(mean), 1], 1)
        return means.contiguous(), m2s.contiguous(), counts.flatten().contiguous()

    def summed(self, values: Tensor) -> Tensor:
        """The sum over all ranks."""
        every = values.clone()
        with collective():
            dist.all_reduce(every, group=self.group)
        return every

    def for_means(self, sums: Tensor) -> Tensor:
        """Sums over this rank's values -> what, divided by their number, is the mean over all ranks'."""
        return self.summed(sums).mul_(self.local / self.total)


_sharing: Sharing | None = None


@contextmanager
def synchronized(group: "dist.ProcessGroup", local: int, total: int) -> Iterator[None]:
    """Inside, forward and backward, a batch has `total` images, of which this process holds `local`."""
    global _sharing
    before, _sharing = _sharing, Sharing(group, local, total)
    try:
        yield
    finally:
        _sharing = before


def sharing() -> Sharing | None:
    """What `synchronized` says here."""
    return _sharing


class _BatchNorm(torch.autograd.Function):
    """What nn.SyncBatchNorm is for GPUs alone. Saved for backward: x, scale, bias and the statistics."""

    @staticmethod
    def forward(ctx, x, running_mean, running_var, scale, bias, momentum, eps, shared):
        v, rows = _wide(x), x.numel() // x.shape[1]
        var, mean = torch.var_mean(v, (0, 2, 3), correction=0)
        means, m2s, counts = shared.gathered(mean, var * rows, rows)
        n, counts = shared.of_all(rows), counts[:, None]
        # from one of them on: the mean of equal means is none other
        mean = means[0] + (counts * (means - means[0])).sum(0) / n
        m2 = (m2s + counts * (means - mean) ** 2).sum(0)
        if running_mean is not None:
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_((m2 / (n - 1)).to(running_var.dtype), momentum)
        rstd = (m2 / n + eps).rsqrt()
        ctx.shared = shared
        ctx.save_for_backward(x, scale, bias, mean, rstd)
        y = (v - _per_channel(mean)) * _per_channel(rstd * scale) + _per_channel(bias)
        return y.to(x.dtype)

    @staticmethod
    @differentiable_once("batch normalization over several processes", instead="one process")
    def backward(ctx, dy):
        x, scale, bias, mean, rstd = ctx.saved_tensors
        g, rows = _wide(dy), x.numel() // x.shape[1]
        xhat = (_wide(x) - _per_channel(mean)) * _per_channel(rstd)
        # of this rank's values: the gradients of parameters are summed over ranks by who updates them
        dbias, dscale = g.sum((0, 2, 3)), (g * xhat).sum((0, 2, 3))
        dx = None
        if ctx.needs_input_grad[0]:
            mean_g, mean_gx = (ctx.shared.for_means(torch.cat([dbias, dscale])) / rows).chunk(2)
            dx = _per_channel(rstd * scale) * (g - _per_channel(mean_g) - xhat * _per_channel(mean_gx))
            dx = dx.to(x.dtype)
        return dx, None, None, dscale.to(scale.dtype), dbias.to(bias.dtype), None, None, None


def batch_norm(
    x: Tensor, running_mean: Tensor | None, running_var: Tensor | None, scale: Tensor, bias: Tensor, momentum: float,
    eps: float, shared: Sharing,
) -> Tensor:  # fmt: skip
    """F.batch_norm in training, in float32 at least, of the values [B, C, H, W] that all ranks hold. Differentiable
    once.
    """
    return _BatchNorm.apply(x, running_mean, running_var, scale, bias, momentum, eps, shared)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _per_channel(values: Tensor) -> Tensor:
    return values[:, None, None]
