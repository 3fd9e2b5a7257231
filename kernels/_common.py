"""Jitted helpers that ops share: activations and their derivatives, exact-times-float products, fixed-order sums."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launching import launch


@triton.jit
def gelu_parts(z):
    """(Phi(z), exp(-z^2 / 2)) with one exp.

    erfc(x) = exp(-x^2) P(t), t = 1 / (1 + 0.55 x): the form of Abramowitz and Stegun 7.1.26 with a minimax fit of one
    more term, whose error of 1.7e-8 is below float32's rounding (7.1.26's own 1.5e-7 is not).
    """
    x = tl.abs(z) * 0.7071067811865476
    t = 1.0 / (1.0 + 0.55 * x)
    e = tl.exp(-0.5 * z * z)
    p = -0.5180399994692597 + t * 0.10732492792407114
    p = -0.04142813932576145 + t * (0.759717067850476 + t * p)
    p = t * (0.30158333193811787 + t * (0.3908428280208458 + t * p))
    h = 0.5 * e * p
    return tl.where(z >= 0, 1.0 - h, h), e


@triton.jit
def rounded_product(a, b):
    """a * b, rounded before anything is done with it: how a product goes into a sum over lanes.

    A bare product is fused with the addition behind it. Where lanes exchange values to add them up, each would fuse its
    own product and take the others' rounded, and copies of one sum would differ in the last bit.
    """
    return tl.fma(a, b, 0.0)


@triton.jit
def sigmoid(z):
    return 1.0 / (1.0 + tl.exp(-z))


@triton.jit
def activate(z, ACT: tl.constexpr):
    """act(z); a NaN stays a NaN."""
    if ACT == "gelu":
        cdf, _ = gelu_parts(z)
        return z * cdf
    elif ACT == "silu":
        return z * sigmoid(z)
    elif ACT == "relu":
        return tl.where(z < 0, 0.0, z)
    else:
        tl.static_assert(ACT == "identity", "unknown activation")
        return z


@triton.jit
def activation_backward(dy, z, ACT: tl.constexpr):
    """dy * d act(z) / dz; for infinite and NaN dy or z what PyTorch gives."""
    if ACT == "gelu":
        cdf, e = gelu_parts(z)
        return dy * (cdf + 0.3989422804014327 * z * e)
    elif ACT == "silu":
        s = sigmoid(z)
        return dy * (s * (1.0 + z * (1.0 - s)))
    elif ACT == "relu":
        # a choice, not a product: an infinite dy times 0 would be NaN; a NaN z lets dy through
        return tl.where(z <= 0, 0.0, dy)
    else:
        tl.static_assert(ACT == "identity", "unknown activation")
        return dy


@triton.jit
def split_fp16(x):
    """x = scale * (hi + lo / 2048) to about 2^-22 of each column's max |x|, with hi, lo float16, one scale a column.

    Two tensor-core products with an operand that is exact in float16 then replace a float32 one.
    """
    # a power of two: what was 16 bits long stays exact
    scale = (tl.max(tl.abs(x), 0).to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    scale = tl.where(scale > 0, scale, 1.0)
    unit = x * (1.0 / scale)[None, :]
    hi = unit.to(tl.float16)
    lo = ((unit - hi.to(tl.float32)) * 2048.0).to(tl.float16)
    return hi, lo, scale


@triton.jit
def _sum_partials_kernel(
    partial_ptr, out_ptr, n_partials, D: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr
):
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    acc = tl.zeros([BLOCK_P, BLOCK_D], dtype=tl.float32)
    for start in range(0, n_partials, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        mask = (p[:, None] < n_partials) & (d[None, :] < D)
        acc += tl.load(partial_ptr + p[:, None] * D + d[None, :], mask=mask, other=0.0)
    tl.store(out_ptr + d, tl.sum(acc, 0), mask=d < D)


def sum_partials(partials: Tensor) -> Tensor:
    """[P, D] float32 -> [D] float32, summed in a fixed order, so that a run repeats bit for bit."""
    n, width = partials.shape
    out = torch.empty(width, dtype=torch.float32, device=partials.device)
    # few columns a program: its loads are one behind the other, and there are many more rows than columns
    launch(_sum_partials_kernel, (triton.cdiv(width, 8),), partials, out, n, D=width, BLOCK_P=256, BLOCK_D=8)
    return out


def channels_last_like(
    x: Tensor, channels: int, height: int, width: int, dtype: torch.dtype, batch: int | None = None
) -> Tensor:
    """An uninitialized [batch, channels, height, width] in channels_last memory, on x's device; batch: default x's."""
    shape = (x.shape[0] if batch is None else batch, height, width, channels)
    return torch.empty(shape, dtype=dtype, device=x.device).permute(0, 3, 1, 2)


def block_of(size: int, most: int) -> int:
    """The power of two that covers `size`, at most `most`."""
    return min(triton.next_power_of_2(size), most)
