"""Softmax cross entropy with label smoothing, summed over the batch, and the count of correct rows, fused.

    l = scale * logits     p = softmax(l)     w = (1 - e) onehot(label) + e / K
    loss = sum over rows of -sum_k w_k log p_k          dlogits = scale * (p - w)

Forward reads the logits once and keeps a maximum and a sum of exponentials a row; from these and the logits backward
computes the gradient in one pass. Saving the gradient instead would cost one more pass over the logits' bytes, would
round it twice, and in float16 would lose what a loss scale is there to keep.
Sources: label smoothing, Szegedy et al. 2016; merging softmax sums of blocks, Milakov and Gimelshein 2018.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _checks, _options
from ._common import block_of
from .differentiation import differentiable_once
from .launching import launch, opaque_op
from .registry import Argument, Arguments, Cost, data, op

# logits that a program holds at a time
_TILE = 2048
_PROGRAMS = 1024


class _Sizes(NamedTuple):
    K: int
    SMOOTHED: bool
    BLOCK_B: int
    BLOCK_K: int


@triton.jit
def _finite(best):
    """A maximum that can be subtracted: of -inf alone, the lowest number."""
    return tl.maximum(best, -3.4028234e38)


@triton.jit
def _block_sums(logits_ptr, label, offsets, start, scale, S: tl.constexpr):
    """Of each row's columns from `start` on: the maximum m and the first column that has it, the sums of
    exp(scale (l - m)) and of m - l, the label's logit (0 if it is not here), and whether any is NaN.
    """
    k = start + tl.arange(0, S.BLOCK_K)
    mask = (k < S.K)[None, :]
    l = tl.load(logits_ptr + offsets[:, None] + k[None, :], mask=mask, other=float("-inf")).to(tl.float32)
    # without NaN, which a maximum keeps on one machine and drops on another
    known = tl.where(l == l, l, float("-inf"))
    best = tl.max(known, 1)
    first = tl.min(tl.where(known == best[:, None], k[None, :], S.K), 1)
    below = l - _finite(best)[:, None]
    total = tl.sum(tl.exp(scale * below), 1)
    spread = tl.zeros_like(total)
    if S.SMOOTHED:
        spread = tl.sum(tl.where(mask, -below, 0.0), 1)
    picked = tl.sum(tl.where(k[None, :] == label[:, None], l, 0.0), 1)
    nan = tl.max((l != l).to(tl.int32), 1)
    return best, first, total, spread, picked, nan


@triton.jit
def _fwd_kernel(
    logits_ptr, label_ptr, max_ptr, total_ptr, loss_ptr, correct_ptr, n_rows, n_blocks, scale, on, off, S: tl.constexpr
):
    """Per row the maximum logit m and the sum of exp(scale (l - m)); per program the sums of losses and of hits.

    The label's weight is on + off, every other's is off.
    """
    program, programs = tl.program_id(0), tl.num_programs(0)
    losses = tl.zeros([S.BLOCK_B], dtype=tl.float32)
    hits = tl.zeros([S.BLOCK_B], dtype=tl.int32)
    for block in range(program, n_blocks, programs):
        row = tl.cast(block, tl.int64) * S.BLOCK_B + tl.arange(0, S.BLOCK_B)
        in_row = row < n_rows
        # past the end the last row is read again: of no row at all the sums would be undefined
        source = tl.minimum(row, n_rows - 1)
        label = tl.load(label_ptr + source)
        offsets = source * S.K
        best, first, total, spread, picked, nan = _block_sums(logits_ptr, label, offsets, 0, scale, S)
        for start in range(S.BLOCK_K, S.K, S.BLOCK_K):
            best2, first2, total2, spread2, picked2, nan2 = _block_sums(logits_ptr, label, offsets, start, scale, S)
            first = tl.where(best2 > best, first2, first)
            higher = tl.maximum(best, best2)
            up, up2 = _finite(higher) - _finite(best), _finite(higher) - _finite(best2)
            total = total * tl.exp(-scale * up) + total2 * tl.exp(-scale * up2)
            if S.SMOOTHED:
                spread += up * start + spread2 + up2 * tl.minimum(S.K - start, S.BLOCK_K)
            best = higher
            picked += picked2
            nan = tl.maximum(nan, nan2)
        m = _finite(best)
        loss = tl.log(total) + on * scale * (m - picked)
        if S.SMOOTHED:
            loss += off * scale * spread
        loss = tl.where((label >= 0) & (label < S.K), loss, float("nan"))
        losses += tl.where(in_row, loss, 0.0)
        hits += (in_row & (first == label) & (nan == 0)).to(tl.int32)
        tl.store(max_ptr + row, m, mask=in_row)
        tl.store(total_ptr + row, total, mask=in_row)
    tl.store(loss_ptr + program, tl.sum(losses, 0))
    tl.store(correct_ptr + program, tl.sum(hits, 0))


@triton.jit
def _total_kernel(partial_loss_ptr, partial_correct_ptr, loss_ptr, correct_ptr, n_partials, BLOCK_P: tl.constexpr):
    """One program sums what every program left, in a fixed order."""
    loss = tl.zeros([BLOCK_P], dtype=tl.float32)
    correct = tl.zeros([BLOCK_P], dtype=tl.int64)
    for start in range(0, n_partials, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        loss += tl.load(partial_loss_ptr + p, mask=p < n_partials, other=0.0)
        correct += tl.load(partial_correct_ptr + p, mask=p < n_partials, other=0).to(tl.int64)
    tl.store(loss_ptr, tl.sum(loss, 0))
    tl.store(correct_ptr, tl.sum(correct, 0))


@triton.jit
def _bwd_kernel(
    dloss_ptr, logits_ptr, label_ptr, max_ptr, total_ptr, dlogits_ptr, n_rows, n_blocks, scale, on, off, S: tl.constexpr
):
    """dlogits = dloss * scale * (exp(scale (l - m)) / total - w), rounded once."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    upstream = tl.load(dloss_ptr).to(tl.float32) * scale
    for block in range(program, n_blocks, programs):
        row = tl.cast(block, tl.int64) * S.BLOCK_B + tl.arange(0, S.BLOCK_B)
        in_row = row < n_rows
        label = tl.load(label_ptr + row, mask=in_row, other=0)
        m = tl.load(max_ptr + row, mask=in_row, other=0.0)
        total = tl.load(total_ptr + row, mask=in_row, other=1.0)
        # a label that is no class leaves no finite gradient behind
        factor = tl.where((label >= 0) & (label < S.K), upstream, float("nan"))
        for start in range(0, S.K, S.BLOCK_K):
            k = start + tl.arange(0, S.BLOCK_K)
            mask = in_row[:, None] & (k < S.K)[None, :]
            at = (row * S.K)[:, None] + k[None, :]
            l = tl.load(logits_ptr + at, mask=mask, other=0.0).to(tl.float32)
            p = tl.exp(scale * (l - m[:, None])) / total[:, None]
            w = off + tl.where(k[None, :] == label[:, None], on, 0.0)
            d = factor[:, None] * (p - w)
            tl.store(dlogits_ptr + at, d.to(dlogits_ptr.dtype.element_ty), mask=mask)


class _Tiling:
    """Whole rows: as many as fill a tile, or one of many blocks."""

    def __init__(self, rows: int, classes: int, smoothed: bool):
        block_k = block_of(classes, _TILE)
        block_b = block_of(rows, _TILE // block_k)
        self.blocks = triton.cdiv(rows, block_b)
        self.programs = min(self.blocks, _PROGRAMS)
        self.sizes = _Sizes(classes, smoothed, block_b, block_k)


def _weights(label_smoothing: float, classes: int) -> tuple[float, float]:
    """What the label's class weighs above the others, and what every class weighs."""
    return 1 - label_smoothing, label_smoothing / classes


@opaque_op("cross_entropy_fwd")
def _fwd(logits: Tensor, labels: Tensor, label_smoothing: float, scale: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss [] float32, correct [] int64, each row's maximum [B] float32, its sum of exponentials [B] float32)"""
    rows, classes = logits.shape
    tiling = _Tiling(rows, classes, label_smoothing > 0)
    maximum = torch.empty(rows, dtype=torch.float32, device=logits.device)
    total = torch.empty_like(maximum)
    partial_loss = torch.empty(tiling.programs, dtype=torch.float32, device=logits.device)
    partial_correct = torch.empty(tiling.programs, dtype=torch.int32, device=logits.device)
    loss = torch.empty((), dtype=torch.float32, device=logits.device)
    correct = torch.empty((), dtype=torch.int64, device=logits.device)
    weights = _weights(label_smoothing, classes)
    arguments = (logits, labels, maximum, total, partial_loss, partial_correct, rows, tiling.blocks)
    launch(_fwd_kernel, (tiling.programs,), *arguments, scale, *weights, S=tiling.sizes)
    arguments = (partial_loss, partial_correct, loss, correct, tiling.programs)
    launch(_total_kernel, (1,), *arguments, BLOCK_P=block_of(tiling.programs, 1024))
    return loss, correct, maximum, total


@_fwd.register_fake
def _(logits, labels, label_smoothing, scale):
    maximum = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
    loss = torch.empty((), dtype=torch.float32, device=logits.device)
    correct = torch.empty((), dtype=torch.int64, device=logits.device)
    return loss, correct, maximum, torch.empty_like(maximum)


@opaque_op("cross_entropy_bwd")
def _bwd(
    dloss: Tensor, logits: Tensor, labels: Tensor, maximum: Tensor, total: Tensor, label_smoothing: float, scale: float
) -> Tensor:
    rows, classes = logits.shape
    dlogits = torch.empty_like(logits)
    tiling = _Tiling(rows, classes, label_smoothing > 0)
    weights = _weights(label_smoothing, classes)
    arguments = (dloss, logits, labels, maximum, total, dlogits, rows, tiling.blocks)
    launch(_bwd_kernel, (tiling.programs,), *arguments, scale, *weights, S=tiling.sizes)
    return dlogits


@_bwd.register_fake
def _(dloss, logits, labels, maximum, total, label_smoothing, scale):
    return torch.empty_like(logits)


class CrossEntropy(torch.autograd.Function):
    """Saved for backward: logits, labels, and each row's maximum and sum of exponentials; not the gradient."""

    @staticmethod
    def forward(ctx, logits, labels, label_smoothing, scale):
        loss, correct, maximum, total = _fwd(logits, labels, label_smoothing, scale)
        ctx.save_for_backward(logits, labels, maximum, total)
        ctx.label_smoothing, ctx.scale = label_smoothing, scale
        ctx.mark_non_differentiable(correct)
        return loss, correct

    @staticmethod
    @differentiable_once("cross_entropy")
    def backward(ctx, dloss, _):
        return _bwd(dloss, *ctx.saved_tensors, ctx.label_smoothing, ctx.scale), None, None, None


def _arguments(batch: int, classes: int) -> Arguments:
    return {"logits": data(batch, classes), "labels": Argument((batch,), torch.int64)}


def _cost(arguments: Arguments, options: dict, itemsize: int) -> dict[str, Cost]:
    logits, labels = (arguments[name].bytes(itemsize) for name in ("logits", "labels"))
    # two float32 a row
    statistics = labels
    # backward reads all of these, and writes dlogits
    return {"fwd": Cost(logits + labels + statistics), "bwd": Cost(2 * logits + labels + statistics)}


@op(
    arguments=_arguments,
    cost=_cost,
    differentiable=("logits",),
    options={"label_smoothing": 0.2, "scale": 0.1},
    small=[dict(batch=5, classes=7)],
    further=[dict(classes=1000)],
)
def cross_entropy(
    logits: Tensor, labels: Tensor, *, label_smoothing: float = 0.0, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """(softmax cross entropy of scale * logits, summed over the batch; how many rows are classified correctly).

    logits: [B, K] float32, float16 or bfloat16, contiguous, any K.
    labels: [B] int64, 0 to K - 1. The host does not look at them: a label outside makes the loss and its row's gradient
        NaN. No label is ignored.
    label_smoothing: e in 0..1, the share of every label that is spread over all K classes.
    scale: above 0, multiplies the logits.
    Returns loss [] float32 and correct [] int64, not differentiable: the rows whose first largest logit is the label's
    (a row that holds a NaN counts as wrong). Arithmetic is float32; the logits are not rounded after scaling.

    With l = scale * logits, m = max l, Z = sum_k exp(l_k - m) and w = (1 - e) onehot(label) + e / K,
        loss = sum over rows of log Z + sum_k w_k (m - l_k)      dlogits = dloss * scale * (exp(l - m) / Z - w)
    A NaN or an infinite logit gives what PyTorch gives. The sum, unlike the mean, keeps |dlogits| <= scale * |dloss|
    whatever the batch, so that float16 gradients do not underflow.
    Saved: logits, labels, m and Z (2 B float32). Deterministic. Differentiable once.

    Raises ValueError for a wrong shape or layout, an empty batch, or options out of range; TypeError for a wrong type
    or dtype; RuntimeError where the kernels cannot run.
    """
    op = "cross_entropy"
    _checks.tensor(op, "logits", logits)
    if logits.dim() != 2:
        raise ValueError(f"{op}: logits must be [B, K], found {logits.dim()} dimensions {tuple(logits.shape)}")
    if logits.numel() == 0:
        raise ValueError(f"{op}: logits is empty: {tuple(logits.shape)}")
    _checks.dtype(op, "logits", logits, _checks.FLOATS)
    if not logits.is_contiguous():
        raise ValueError(f"{op}: logits must be contiguous; call logits.contiguous()")
    labels = _checks.operand(op, "labels", labels, logits.shape[:1], (torch.int64,))
    _options.fraction(op, "label_smoothing", label_smoothing)
    _options.positive(op, "scale", scale)
    _checks.device(op, logits, labels)
    return CrossEntropy.apply(logits, labels, float(label_smoothing), float(scale))
