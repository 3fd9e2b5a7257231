"""Mean and variance of each channel of a batch, from what programs found in their parts of it.

Every lane keeps a running mean and squared deviations (Welford), lanes and programs are merged in a fixed order (Chan
et al. 1979): no sum of squares that could cancel, no atomics, the same bits every time.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import load_fp32, rounded_product
from ._synchronized import sharing
from .launching import launch


class Running(NamedTuple):
    """Running statistics [C] float32 and what they and a batch's weigh in their update."""

    mean: Tensor
    var: Tensor
    keep: float
    momentum: float

    @classmethod
    def of(cls, mean: Tensor | None, var: Tensor | None, momentum: float) -> "Running | None":
        return None if mean is None else cls(mean, var, 1 - momentum, momentum)


@triton.jit
def update_running(running, c, mean, var, mask=None):
    """As PyTorch updates them, by a batch's mean and unbiased variance."""
    old_mean, old_var = tl.load(running.mean + c, mask=mask), tl.load(running.var + c, mask=mask)
    # all warps read before one of them overwrites
    tl.debug_barrier()
    tl.store(running.mean + c, running.keep * old_mean + running.momentum * mean, mask=mask)
    tl.store(running.var + c, running.keep * old_var + running.momentum * var, mask=mask)


@triton.jit
def welford(mean, m2, count, v, inside, mask):
    """Every lane's running mean and squared deviations [lanes, C] and count [lanes], one value later where inside."""
    count += inside.to(tl.float32)
    delta = tl.where(mask, v - mean, 0.0)
    mean += delta / tl.maximum(count, 1.0)[:, None]
    m2 += delta * tl.where(mask, v - mean, 0.0)
    return mean, m2, count


@triton.jit
def deviations_from(center, mean, m2, count):
    """Squared deviations from `center` [C] of groups of values with these means, deviations from them and counts."""
    away = mean - center[None, :]
    return m2 + count[:, None] * away * away


@triton.jit
def store_partials(partials, program, c, in_c, mean, m2, count, C: tl.constexpr):
    """A program's lanes, merged."""
    # a program always has values, so total > 0
    total = tl.sum(count, 0)
    merged = tl.sum(rounded_product(mean, count[:, None]), 0) / total
    tl.store(partials.mean + program * C + c, merged, mask=in_c)
    tl.store(partials.m2 + program * C + c, tl.sum(deviations_from(merged, mean, m2, count), 0), mask=in_c)
    # every channel block of this program stores the same count
    tl.store(partials.count + program, total)


@triton.jit
def _merge_stats_kernel(
    partials, programs, rows, mean_ptr, var_ptr, running, C: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Merges all programs: batch mean and biased variance; running statistics as PyTorch updates them."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = c < C
    n = rows.to(tl.float32)
    acc = tl.zeros([BLOCK_P, BLOCK_C], dtype=tl.float32)
    for start in range(0, programs, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        mask = (p[:, None] < programs) & in_c[None, :]
        count = tl.load(partials.count + p, mask=p < programs, other=0.0)
        acc += count[:, None] * load_fp32(partials.mean, p[:, None] * C + c[None, :], mask)
    mean = tl.sum(acc, 0) / n
    acc = tl.zeros([BLOCK_P, BLOCK_C], dtype=tl.float32)
    for start in range(0, programs, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        mask = (p[:, None] < programs) & in_c[None, :]
        at = p[:, None] * C + c[None, :]
        count = tl.load(partials.count + p, mask=p < programs, other=0.0)
        acc += deviations_from(mean, load_fp32(partials.mean, at, mask), load_fp32(partials.m2, at, mask), count)
    m2 = tl.sum(acc, 0)
    tl.store(mean_ptr + c, mean, mask=in_c)
    tl.store(var_ptr + c, m2 / n, mask=in_c)
    if running is not None:
        update_running(running, c, mean, m2 / (n - 1.0), in_c)


class Partials(NamedTuple):
    """Per-program mean and squared deviations [programs, C] and count [programs], to be merged into statistics."""

    mean: Tensor
    m2: Tensor
    count: Tensor

    @classmethod
    def empty(cls, programs: int, channels: int, device: torch.device) -> "Partials":
        mean = torch.empty(programs, channels, dtype=torch.float32, device=device)
        return cls(mean, torch.empty_like(mean), mean.new_empty(programs))

    def merge(
        self, rows: int, running_mean: Tensor | None, running_var: Tensor | None, momentum: float
    ) -> tuple[Tensor, Tensor]:
        """Mean and biased variance [C] float32 of `rows` values, or of those of all that `synchronized` names; updates
        the running statistics in place.
        """
        running, shared = Running.of(running_mean, running_var, momentum), sharing()
        if shared is None:
            return self._merged(rows, running)
        mean, var = self._merged(rows, None)
        return Partials(*shared.gathered(mean, var * rows, rows))._merged(shared.of_all(rows), running)

    def _merged(self, rows: int, running: Running | None) -> tuple[Tensor, Tensor]:
        programs, channels = self.mean.shape
        mean = self.mean.new_empty(channels)
        var = torch.empty_like(mean)
        grid, sizes = (triton.cdiv(channels, 8),), dict(C=channels, BLOCK_P=256, BLOCK_C=8)
        launch(_merge_stats_kernel, grid, self, programs, rows, mean, var, running, **sizes)
        return mean, var
