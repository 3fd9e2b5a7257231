"""The one BatchNorm of this package: act(batch_norm(x * gate)) + residual and its gradients; gate, residual optional.

A kernel sees x as [segments, SEGMENT, C]: with a gate or a squeeze a segment is one image (SEGMENT = H * W), so that
a gate value is read once per image and sums over an image stay inside one program; without, any run of rows.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._batch_statistics import Partials, store_partials, welford
from ._common import block_of, load_fp32, sum_partials
from ._synchronized import sharing
from .activations import ACTIVATIONS
from .launching import launch, resident
from .registry import Arguments, fp32

# warps that share a processor, of at most 128 registers a thread
RESIDENT_WARPS = 16
# bytes of x that a program holds at a time: more would spill registers (see tests/test_ahead_of_time.py)
_TILE_BYTES = 8192
# the backward passes also hold dy
_BWD_TILE_BYTES = 4096
_UNGATED_SEGMENT = 128
# channels that a program takes at least, where there are too few segments: 64 bytes of a row in 16 bits
_FEW_CHANNELS = 32

# of the normalizing ops' cases
OPTIONS = {"training": True, "momentum": 0.8, "eps": 1e-12, "activation": "gelu"}


def statistics(channels: int, weight: bool = False) -> Arguments:
    """Running ones, and a scale where a case has one."""
    scale = {"weight": fp32(channels)} if weight else {}
    return {"running_mean": fp32(channels), "running_var": fp32(channels), **scale}


class Sizes(NamedTuple):
    """What a kernel is compiled for: x as [segments, SEGMENT, C], in tiles of BLOCK_ROWS by BLOCK_C."""

    C: int
    SEGMENT: int
    BLOCK_ROWS: int
    BLOCK_C: int


class Norm(NamedTuple):
    """What normalizes: mean and biased variance [C] float32, bias [C], and the scale [C] if there is one."""

    mean: Tensor
    var: Tensor
    bias: Tensor
    eps: float
    weight: Tensor | None = None


class Upstream(NamedTuple):
    """The gradients that come in: of y, of y again if it has two users, and of its squeeze [B, C] if there is one."""

    dy: Tensor
    dy2: Tensor | None = None
    dsqueeze: Tensor | None = None


@triton.jit
def load_norm(norm, c, in_c):
    """Channels' mean, 1 / standard deviation, bias, and slope of z = (v - mean) * slope + bias, float32."""
    mean = tl.load(norm.mean + c, mask=in_c, other=0.0)
    rstd = tl.div_rn(1.0, tl.sqrt_rn(tl.load(norm.var + c, mask=in_c, other=1.0) + norm.eps))
    slope = rstd
    if norm.weight is not None:
        slope = rstd * load_fp32(norm.weight, c, in_c)
    return mean, rstd, load_fp32(norm.bias, c, in_c), slope


@triton.jit
def _stats_kernel(x_ptr, gate_ptr, partials, n_rows, n_segments, S: tl.constexpr):
    """Per program and channel: count, mean and sum of squared deviations of v = x * gate."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    c = tl.program_id(1) * S.BLOCK_C + tl.arange(0, S.BLOCK_C)
    in_c = c < S.C
    lane = tl.arange(0, S.BLOCK_ROWS)
    mean = tl.zeros([S.BLOCK_ROWS, S.BLOCK_C], dtype=tl.float32)
    m2 = tl.zeros([S.BLOCK_ROWS, S.BLOCK_C], dtype=tl.float32)
    count = tl.zeros([S.BLOCK_ROWS], dtype=tl.float32)
    for segment in range(program, n_segments, programs):
        base = tl.cast(segment, tl.int64) * S.SEGMENT
        rows = tl.minimum(n_rows - base, S.SEGMENT).to(tl.int32)
        if gate_ptr is not None:
            gate = tl.load(gate_ptr + segment * S.C + c, mask=in_c, other=0.0)
        for start in range(0, S.SEGMENT, S.BLOCK_ROWS):
            row = start + lane
            inside = row < rows
            mask = inside[:, None] & in_c[None, :]
            v = load_fp32(x_ptr + base * S.C, row[:, None] * S.C + c[None, :], mask)
            if gate_ptr is not None:
                v = v * gate[None, :]
            mean, m2, count = welford(mean, m2, count, v, inside, mask)
    store_partials(partials, program, c, in_c, mean, m2, count, S.C)


@triton.jit
def _fwd_kernel(
    x_ptr, gate_ptr, norm, residual_ptr, y_ptr, squeeze_ptr, n_rows, n_segments, S: tl.constexpr, ACT: tl.constexpr
):
    """y = act((x * gate - mean) * slope + bias) + residual; squeeze = mean of y over a segment, which is an image."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    c = tl.program_id(1) * S.BLOCK_C + tl.arange(0, S.BLOCK_C)
    in_c = c < S.C
    mean, _, bias, slope = load_norm(norm, c, in_c)
    for segment in range(program, n_segments, programs):
        base = tl.cast(segment, tl.int64) * S.SEGMENT
        rows = tl.minimum(n_rows - base, S.SEGMENT).to(tl.int32)
        if gate_ptr is not None:
            gate = tl.load(gate_ptr + segment * S.C + c, mask=in_c, other=0.0)
        if squeeze_ptr is not None:
            total = tl.zeros([S.BLOCK_ROWS, S.BLOCK_C], dtype=tl.float32)
        for start in range(0, S.SEGMENT, S.BLOCK_ROWS):
            row = start + tl.arange(0, S.BLOCK_ROWS)
            mask = (row < rows)[:, None] & in_c[None, :]
            offsets = row[:, None] * S.C + c[None, :]
            v = load_fp32(x_ptr + base * S.C, offsets, mask)
            if gate_ptr is not None:
                v = v * gate[None, :]
            y = ACT((v - mean[None, :]) * slope[None, :] + bias[None, :])
            if residual_ptr is not None:
                y += load_fp32(residual_ptr + base * S.C, offsets, mask)
            if squeeze_ptr is not None:
                total += tl.where(mask, y, 0.0)
            tl.store(y_ptr + base * S.C + offsets, y.to(y_ptr.dtype.element_ty), mask=mask)
        if squeeze_ptr is not None:
            tl.store(squeeze_ptr + segment * S.C + c, tl.sum(total, 0) / S.SEGMENT, mask=in_c)


@triton.jit
def _bwd_reduce_kernel(
    upstream, x_ptr, gate_ptr, norm, sum_ptr, n_rows, n_segments, S: tl.constexpr, DACT: tl.constexpr
):
    """Per program and channel: sum of g = t * act'(z) and of g * xhat, as sum_ptr [programs, 2, C].

    t = dy, plus dy2 where y has two gradients, plus dsqueeze / SEGMENT where there is a squeeze.
    """
    program, programs = tl.program_id(0), tl.num_programs(0)
    c = tl.program_id(1) * S.BLOCK_C + tl.arange(0, S.BLOCK_C)
    in_c = c < S.C
    mean, rstd, bias, slope = load_norm(norm, c, in_c)
    sum_g = tl.zeros([S.BLOCK_ROWS, S.BLOCK_C], dtype=tl.float32)
    sum_gx = tl.zeros([S.BLOCK_ROWS, S.BLOCK_C], dtype=tl.float32)
    for segment in range(program, n_segments, programs):
        base = tl.cast(segment, tl.int64) * S.SEGMENT
        rows = tl.minimum(n_rows - base, S.SEGMENT).to(tl.int32)
        if gate_ptr is not None:
            gate = tl.load(gate_ptr + segment * S.C + c, mask=in_c, other=0.0)
        if upstream.dsqueeze is not None:
            shared = tl.load(upstream.dsqueeze + segment * S.C + c, mask=in_c, other=0.0) / S.SEGMENT
        for start in range(0, S.SEGMENT, S.BLOCK_ROWS):
            row = start + tl.arange(0, S.BLOCK_ROWS)
            mask = (row < rows)[:, None] & in_c[None, :]
            offsets = row[:, None] * S.C + c[None, :]
            v = load_fp32(x_ptr + base * S.C, offsets, mask)
            if gate_ptr is not None:
                v = v * gate[None, :]
            centered = v - mean[None, :]
            t = load_fp32(upstream.dy + base * S.C, offsets, mask)
            if upstream.dy2 is not None:
                t += load_fp32(upstream.dy2 + base * S.C, offsets, mask)
            if upstream.dsqueeze is not None:
                t += shared[None, :]
            g = DACT(t, centered * slope[None, :] + bias[None, :])
            # outside the mask dy is 0, but 0 * inf would not be
            g = tl.where(mask, g, 0.0)
            sum_g += g
            sum_gx += tl.where(mask, g * centered, 0.0)
    tl.store(sum_ptr + program * 2 * S.C + c, tl.sum(sum_g, 0), mask=in_c)
    tl.store(sum_ptr + program * 2 * S.C + S.C + c, tl.sum(sum_gx, 0) * rstd, mask=in_c)


@triton.jit
def load_means(sum_ptr, n, c, in_c, C: tl.constexpr):
    """mean g and mean g xhat, which a gradient through batch statistics subtracts."""
    return tl.load(sum_ptr + c, mask=in_c, other=0.0) / n, tl.load(sum_ptr + C + c, mask=in_c, other=0.0) / n


@triton.jit
def _bwd_kernel(
    dy_ptr, x_ptr, gate_ptr, norm, sum_ptr, dx_ptr, dgate_ptr, n_rows, n_segments, S: tl.constexpr, DACT: tl.constexpr
):
    """dv = slope * (g - sum g / N - xhat * sum(g xhat) / N); dx = dv * gate; dgate = sum over the image of dv * x.

    No sums: of statistics that are no batch's, dv = slope * g.
    """
    program, programs = tl.program_id(0), tl.num_programs(0)
    c = tl.program_id(1) * S.BLOCK_C + tl.arange(0, S.BLOCK_C)
    in_c = c < S.C
    mean, rstd, bias, slope = load_norm(norm, c, in_c)
    if sum_ptr is not None:
        mean_g, mean_gx = load_means(sum_ptr, n_rows.to(tl.float32), c, in_c, S.C)
    for segment in range(program, n_segments, programs):
        base = tl.cast(segment, tl.int64) * S.SEGMENT
        rows = tl.minimum(n_rows - base, S.SEGMENT).to(tl.int32)
        if gate_ptr is not None:
            gate = tl.load(gate_ptr + segment * S.C + c, mask=in_c, other=0.0)
            dgate = tl.zeros([S.BLOCK_ROWS, S.BLOCK_C], dtype=tl.float32)
        for start in range(0, S.SEGMENT, S.BLOCK_ROWS):
            row = start + tl.arange(0, S.BLOCK_ROWS)
            mask = (row < rows)[:, None] & in_c[None, :]
            offsets = row[:, None] * S.C + c[None, :]
            x = load_fp32(x_ptr + base * S.C, offsets, mask)
            v = x
            if gate_ptr is not None:
                v = x * gate[None, :]
            centered = v - mean[None, :]
            dv = DACT(load_fp32(dy_ptr + base * S.C, offsets, mask), centered * slope[None, :] + bias[None, :])
            if sum_ptr is not None:
                dv = dv - mean_g[None, :] - centered * rstd[None, :] * mean_gx[None, :]
            dv = dv * slope[None, :]
            dx = dv
            if gate_ptr is not None:
                dgate += tl.where(mask, dv * x, 0.0)
                dx = dv * gate[None, :]
            tl.store(dx_ptr + base * S.C + offsets, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        if gate_ptr is not None:
            tl.store(dgate_ptr + segment * S.C + c, tl.sum(dgate, 0), mask=in_c)


class Tiling:
    """How [B, C, H, W] in channels_last memory is cut into segments (images, or runs of rows), tiles and programs."""

    def __init__(self, x: Tensor, by_image: bool, tile_bytes: int = _TILE_BYTES):
        batch, channels, height, width = x.shape
        self.rows = batch * height * width
        segment = height * width if by_image else _UNGATED_SEGMENT
        self.segments = triton.cdiv(self.rows, segment)
        block_c = block_of(channels, 128)
        fitting = resident(x.device, RESIDENT_WARPS // 4)
        while block_c > _FEW_CHANNELS and self.segments * triton.cdiv(channels, block_c) <= fitting // 2:
            block_c //= 2
        block_rows = block_of(segment, max(1, tile_bytes // x.element_size() // block_c))
        channel_blocks = triton.cdiv(channels, block_c)
        # one wave: all run at once, and none waits for others to end
        self.programs = min(self.segments, max(1, fitting // channel_blocks))
        self.grid = (self.programs, channel_blocks)
        self.sizes = Sizes(channels, segment, block_rows, block_c)


def sums_for_dx(sums: Tensor, training: bool) -> Tensor | None:
    """What a gradient through statistics reads of `reduce_gradients`: where `synchronized` merges batches, this one's
    share of all ranks' sums; None where the statistics are no batch's.
    """
    shared = sharing()
    return None if not training else sums if shared is None else shared.for_means(sums)


def kept(fixed_mean: Tensor, fixed_var: Tensor) -> tuple[Tensor, Tensor]:
    """What backward reads of evaluation's statistics: training may move the running ones before it runs."""
    return fixed_mean.clone(), fixed_var.clone()


def batch_statistics(
    x: Tensor, gate: Tensor | None, running_mean: Tensor | None, running_var: Tensor | None, momentum: float
) -> tuple[Tensor, Tensor]:
    """Mean and biased variance [C] float32 of x * gate; updates the running statistics in place."""
    tiling = Tiling(x, gate is not None)
    partials = Partials.empty(tiling.programs, x.shape[1], x.device)
    launch(_stats_kernel, tiling.grid, x, gate, partials, tiling.rows, tiling.segments, S=tiling.sizes)
    return partials.merge(tiling.rows, running_mean, running_var, momentum)


def forward(
    x: Tensor,
    gate: Tensor | None,
    norm: Norm,
    activation: str | None,
    residual: Tensor | None = None,
    squeeze: Tensor | None = None,
) -> Tensor:
    """y like x from given statistics; fills `squeeze` [B, C] float32, if given, with the mean of y over H and W."""
    # the squeeze is one more accumulator
    tile_bytes = _TILE_BYTES if squeeze is None else _BWD_TILE_BYTES
    tiling = Tiling(x, gate is not None or squeeze is not None, tile_bytes)
    y = torch.empty_like(x, memory_format=torch.channels_last)
    arguments = (x, gate, norm, residual, y, squeeze, tiling.rows, tiling.segments)
    launch(_fwd_kernel, tiling.grid, *arguments, S=tiling.sizes, ACT=ACTIVATIONS[activation].value, maxnreg=128)
    return y


def reduce_gradients(upstream: Upstream, x: Tensor, gate: Tensor | None, norm: Norm, activation: str | None) -> Tensor:
    """[2 C] float32: per channel the sum of g, which is dbias, then the sum of g * xhat, which is dweight."""
    tiling = Tiling(x, gate is not None or upstream.dsqueeze is not None, _BWD_TILE_BYTES)
    partials = torch.empty(tiling.programs, 2 * x.shape[1], dtype=torch.float32, device=x.device)
    arguments = (upstream, x, gate, norm, partials, tiling.rows, tiling.segments)
    launch(
        _bwd_reduce_kernel, tiling.grid, *arguments, S=tiling.sizes, DACT=ACTIVATIONS[activation].backward, maxnreg=128
    )
    return sum_partials(partials)


def backward(
    dy: Tensor, x: Tensor, gate: Tensor | None, norm: Norm, training: bool, activation: str | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx like x, dgate [B, C] float32 or empty, dbias and dweight [2 C] float32)."""
    sums = reduce_gradients(Upstream(dy), x, gate, norm, activation)
    tiling = Tiling(x, gate is not None, _BWD_TILE_BYTES)
    dx = torch.empty_like(x, memory_format=torch.channels_last)
    dgate = torch.empty(gate.shape if gate is not None else (0,), dtype=torch.float32, device=x.device)
    used = sums_for_dx(sums, training)
    arguments = (dy, x, gate, norm, used, dx, dgate, tiling.rows, tiling.segments)
    launch(_bwd_kernel, tiling.grid, *arguments, S=tiling.sizes, DACT=ACTIVATIONS[activation].backward)
    return dx, dgate, sums


def parameter_gradients(
    sums: Tensor, bias: Tensor, weight: Tensor | None, needs_bias: bool, needs_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    """(dbias, dweight) in their dtypes, where they are needed."""
    dbias, dweight = sums.chunk(2)
    return dbias.to(bias.dtype) if needs_bias else None, dweight.to(weight.dtype) if needs_weight else None
