"""What ops share: products and sums that round alike every time, channels_last results, sizes of blocks."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launching import launch


@triton.jit
def rounded_product(a, b):
    """a * b, rounded before anything is done with it: how a product goes into a sum over lanes.

    A bare product is fused with the addition behind it. Where lanes exchange values to add them up, each would fuse its
    own product and take the others' rounded, and copies of one sum would differ in the last bit.
    """
    return tl.fma(a, b, 0.0)


@triton.jit
def load_fp32(ptr, offsets, mask):
    return tl.load(ptr + offsets, mask=mask, other=0.0).to(tl.float32)


_FEW_ROWS = 16


@triton.jit
def _sum_partials_kernel(
    partial_ptr, out_ptr, n_partials, D: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr
):
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    acc = tl.zeros([BLOCK_P, BLOCK_D], dtype=out_ptr.dtype.element_ty)
    for start in range(0, n_partials, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        mask = (p[:, None] < n_partials) & (d[None, :] < D)
        acc += tl.load(partial_ptr + p[:, None] * D + d[None, :], mask=mask, other=0.0)
    tl.store(out_ptr + d, tl.sum(acc, 0), mask=d < D)


def sum_partials(partials: Tensor) -> Tensor:
    """[P, D] float32 or float64 -> [D] of the same, summed in a fixed order, so that a run repeats bit for bit."""
    n, width = partials.shape
    out = partials.new_empty(width)
    # few columns a program: its loads are one behind the other, and mostly there are many more rows than columns
    rows, columns = (256, 8) if n > _FEW_ROWS else (_FEW_ROWS, 32)
    launch(
        _sum_partials_kernel, (triton.cdiv(width, columns),), partials, out, n, D=width, BLOCK_P=rows, BLOCK_D=columns
    )
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


@triton.jit
def add_product(total, a, b):
    """total + a b in float32, each block's product summed by itself: a single chain of additions would round more."""
    # an addition would be taken into the product's accumulator
    return tl.fma(tl.dot(a, b, input_precision="ieee"), 1.0, total)
