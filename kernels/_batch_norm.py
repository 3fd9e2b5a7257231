"""The one BatchNorm of this package: act(batch_norm(x * gate)) + residual and its gradients; gate, residual optional.

A kernel sees x as [segments, SEGMENT, C]: with a gate or a squeeze a segment is one image (SEGMENT = H * W), so that
a gate value is read once per image and sums over an image stay inside one program; without, any run of rows.
Statistics: every lane keeps a running mean and squared deviation (Welford), lanes and programs are merged in a fixed
order (Chan et al. 1979): no sum of squares that could cancel, no atomics, the same bits every time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import activate, activation_backward, block_of, rounded_product, sum_partials
from .launching import launch

# enough programs to fill any current GPU several times over, few enough that merging them stays negligible
_PROGRAMS = 1024
# bytes of x that a program holds at a time: more would spill registers (see tests/test_ahead_of_time.py)
_TILE_BYTES = 8192
# the backward passes also hold dy
_BWD_TILE_BYTES = 4096
_UNGATED_SEGMENT = 128


@triton.jit
def load_fp32(ptr, offsets, mask):
    return tl.load(ptr + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _stats_kernel(
    x_ptr, gate_ptr, mean_ptr, m2_ptr, count_ptr, n_rows, n_segments,
    C: tl.constexpr, SEGMENT: tl.constexpr, HAS_GATE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Per program and channel: count, mean and sum of squared deviations of v = x * gate."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = c < C
    lane = tl.arange(0, BLOCK_ROWS)
    mean = tl.zeros([BLOCK_ROWS, BLOCK_C], dtype=tl.float32)
    m2 = tl.zeros([BLOCK_ROWS, BLOCK_C], dtype=tl.float32)
    count = tl.zeros([BLOCK_ROWS], dtype=tl.float32)
    for segment in range(program, n_segments, programs):
        base = tl.cast(segment, tl.int64) * SEGMENT
        rows = tl.minimum(n_rows - base, SEGMENT).to(tl.int32)
        if HAS_GATE:
            gate = tl.load(gate_ptr + segment * C + c, mask=in_c, other=0.0)
        for start in range(0, SEGMENT, BLOCK_ROWS):
            row = start + lane
            inside = row < rows
            mask = inside[:, None] & in_c[None, :]
            v = load_fp32(x_ptr + base * C, row[:, None] * C + c[None, :], mask)
            if HAS_GATE:
                v = v * gate[None, :]
            count += inside.to(tl.float32)
            delta = tl.where(mask, v - mean, 0.0)
            mean += delta / tl.maximum(count, 1.0)[:, None]
            m2 += delta * tl.where(mask, v - mean, 0.0)
    total = tl.sum(count, 0)
    # a program always owns a segment, so total > 0
    merged = tl.sum(rounded_product(mean, count[:, None]), 0) / total
    away = mean - merged[None, :]
    spread = tl.sum(m2 + count[:, None] * away * away, 0)
    tl.store(mean_ptr + program * C + c, merged, mask=in_c)
    tl.store(m2_ptr + program * C + c, spread, mask=in_c)
    # every channel block of this program stores the same count
    tl.store(count_ptr + program, total)


@triton.jit
def _merge_stats_kernel(
    partial_mean_ptr, partial_m2_ptr, partial_count_ptr, mean_ptr, var_ptr, running_mean_ptr, running_var_ptr,
    n_partials, n_rows, momentum, keep,
    C: tl.constexpr, HAS_RUNNING: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Chan's merge of all programs: batch mean and biased variance; running statistics as PyTorch updates them."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = c < C
    n = n_rows.to(tl.float32)
    acc = tl.zeros([BLOCK_P, BLOCK_C], dtype=tl.float32)
    for start in range(0, n_partials, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        mask = (p[:, None] < n_partials) & in_c[None, :]
        count = tl.load(partial_count_ptr + p, mask=p < n_partials, other=0.0)
        acc += count[:, None] * load_fp32(partial_mean_ptr, p[:, None] * C + c[None, :], mask)
    mean = tl.sum(acc, 0) / n
    acc = tl.zeros([BLOCK_P, BLOCK_C], dtype=tl.float32)
    for start in range(0, n_partials, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        mask = (p[:, None] < n_partials) & in_c[None, :]
        count = tl.load(partial_count_ptr + p, mask=p < n_partials, other=0.0)
        away = load_fp32(partial_mean_ptr, p[:, None] * C + c[None, :], mask) - mean[None, :]
        acc += load_fp32(partial_m2_ptr, p[:, None] * C + c[None, :], mask) + count[:, None] * away * away
    m2 = tl.sum(acc, 0)
    tl.store(mean_ptr + c, mean, mask=in_c)
    tl.store(var_ptr + c, m2 / n, mask=in_c)
    if HAS_RUNNING:
        old_mean = tl.load(running_mean_ptr + c, mask=in_c, other=0.0)
        old_var = tl.load(running_var_ptr + c, mask=in_c, other=0.0)
        # all warps read before one of them overwrites
        tl.debug_barrier()
        tl.store(running_mean_ptr + c, keep * old_mean + momentum * mean, mask=in_c)
        tl.store(running_var_ptr + c, keep * old_var + momentum * (m2 / (n - 1.0)), mask=in_c)


@triton.jit
def rstd_of(var_ptr, c, in_c, eps):
    return tl.div_rn(1.0, tl.sqrt_rn(tl.load(var_ptr + c, mask=in_c, other=1.0) + eps))


@triton.jit
def _fwd_kernel(
    x_ptr, gate_ptr, bias_ptr, residual_ptr, mean_ptr, var_ptr, y_ptr, squeeze_ptr, n_rows, n_segments, eps,
    C: tl.constexpr, SEGMENT: tl.constexpr, HAS_GATE: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    HAS_SQUEEZE: tl.constexpr, ACT: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y = act((x * gate - mean) * rstd + bias) + residual; squeeze = mean of y over a segment, which is an image."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = c < C
    mean = tl.load(mean_ptr + c, mask=in_c, other=0.0)
    rstd = rstd_of(var_ptr, c, in_c, eps)
    bias = tl.load(bias_ptr + c, mask=in_c, other=0.0).to(tl.float32)
    for segment in range(program, n_segments, programs):
        base = tl.cast(segment, tl.int64) * SEGMENT
        rows = tl.minimum(n_rows - base, SEGMENT).to(tl.int32)
        if HAS_GATE:
            gate = tl.load(gate_ptr + segment * C + c, mask=in_c, other=0.0)
        if HAS_SQUEEZE:
            total = tl.zeros([BLOCK_ROWS, BLOCK_C], dtype=tl.float32)
        for start in range(0, SEGMENT, BLOCK_ROWS):
            row = start + tl.arange(0, BLOCK_ROWS)
            mask = (row < rows)[:, None] & in_c[None, :]
            offsets = row[:, None] * C + c[None, :]
            v = load_fp32(x_ptr + base * C, offsets, mask)
            if HAS_GATE:
                v = v * gate[None, :]
            y = activate((v - mean[None, :]) * rstd[None, :] + bias[None, :], ACT)
            if HAS_RESIDUAL:
                y += load_fp32(residual_ptr + base * C, offsets, mask)
            if HAS_SQUEEZE:
                total += tl.where(mask, y, 0.0)
            tl.store(y_ptr + base * C + offsets, y.to(y_ptr.dtype.element_ty), mask=mask)
        if HAS_SQUEEZE:
            tl.store(squeeze_ptr + segment * C + c, tl.sum(total, 0) / SEGMENT, mask=in_c)


@triton.jit
def _bwd_reduce_kernel(
    dy_ptr, dy2_ptr, dsqueeze_ptr, x_ptr, gate_ptr, bias_ptr, mean_ptr, var_ptr, sum_ptr, n_rows, n_segments, eps,
    C: tl.constexpr, SEGMENT: tl.constexpr, HAS_DY2: tl.constexpr, HAS_GATE: tl.constexpr, HAS_SQUEEZE: tl.constexpr,
    ACT: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Per program and channel: sum of g = t * act'(z) and of g * xhat, as sum_ptr [programs, 2, C].

    t = dy, plus dy2 where y has two gradients, plus dsqueeze / SEGMENT where there is a squeeze.
    """
    program, programs = tl.program_id(0), tl.num_programs(0)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = c < C
    mean = tl.load(mean_ptr + c, mask=in_c, other=0.0)
    rstd = rstd_of(var_ptr, c, in_c, eps)
    bias = tl.load(bias_ptr + c, mask=in_c, other=0.0).to(tl.float32)
    sum_g = tl.zeros([BLOCK_ROWS, BLOCK_C], dtype=tl.float32)
    sum_gx = tl.zeros([BLOCK_ROWS, BLOCK_C], dtype=tl.float32)
    for segment in range(program, n_segments, programs):
        base = tl.cast(segment, tl.int64) * SEGMENT
        rows = tl.minimum(n_rows - base, SEGMENT).to(tl.int32)
        if HAS_GATE:
            gate = tl.load(gate_ptr + segment * C + c, mask=in_c, other=0.0)
        if HAS_SQUEEZE:
            shared = tl.load(dsqueeze_ptr + segment * C + c, mask=in_c, other=0.0) / SEGMENT
        for start in range(0, SEGMENT, BLOCK_ROWS):
            row = start + tl.arange(0, BLOCK_ROWS)
            mask = (row < rows)[:, None] & in_c[None, :]
            offsets = row[:, None] * C + c[None, :]
            v = load_fp32(x_ptr + base * C, offsets, mask)
            if HAS_GATE:
                v = v * gate[None, :]
            xhat = (v - mean[None, :]) * rstd[None, :]
            t = load_fp32(dy_ptr + base * C, offsets, mask)
            if HAS_DY2:
                t += load_fp32(dy2_ptr + base * C, offsets, mask)
            if HAS_SQUEEZE:
                t += shared[None, :]
            g = activation_backward(t, xhat + bias[None, :], ACT)
            # outside the mask dy is 0, but 0 * inf would not be
            g = tl.where(mask, g, 0.0)
            sum_g += g
            sum_gx += tl.where(mask, g * xhat, 0.0)
    tl.store(sum_ptr + program * 2 * C + c, tl.sum(sum_g, 0), mask=in_c)
    tl.store(sum_ptr + program * 2 * C + C + c, tl.sum(sum_gx, 0), mask=in_c)


@triton.jit
def _bwd_kernel(
    dy_ptr, x_ptr, gate_ptr, bias_ptr, mean_ptr, var_ptr, sum_ptr, dx_ptr, dgate_ptr, n_rows, n_segments, eps,
    C: tl.constexpr, SEGMENT: tl.constexpr, HAS_GATE: tl.constexpr, TRAINING: tl.constexpr, ACT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dv = rstd * (g - sum g / N - xhat * sum(g xhat) / N); dx = dv * gate; dgate = sum over the image of dv * x."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = c < C
    mean = tl.load(mean_ptr + c, mask=in_c, other=0.0)
    rstd = rstd_of(var_ptr, c, in_c, eps)
    bias = tl.load(bias_ptr + c, mask=in_c, other=0.0).to(tl.float32)
    if TRAINING:
        n = n_rows.to(tl.float32)
        mean_g = tl.load(sum_ptr + c, mask=in_c, other=0.0) / n
        mean_gx = tl.load(sum_ptr + C + c, mask=in_c, other=0.0) / n
    for segment in range(program, n_segments, programs):
        base = tl.cast(segment, tl.int64) * SEGMENT
        rows = tl.minimum(n_rows - base, SEGMENT).to(tl.int32)
        if HAS_GATE:
            gate = tl.load(gate_ptr + segment * C + c, mask=in_c, other=0.0)
            dgate = tl.zeros([BLOCK_ROWS, BLOCK_C], dtype=tl.float32)
        for start in range(0, SEGMENT, BLOCK_ROWS):
            row = start + tl.arange(0, BLOCK_ROWS)
            mask = (row < rows)[:, None] & in_c[None, :]
            offsets = row[:, None] * C + c[None, :]
            x = load_fp32(x_ptr + base * C, offsets, mask)
            v = x
            if HAS_GATE:
                v = x * gate[None, :]
            xhat = (v - mean[None, :]) * rstd[None, :]
            dv = activation_backward(load_fp32(dy_ptr + base * C, offsets, mask), xhat + bias[None, :], ACT)
            if TRAINING:
                dv = dv - mean_g[None, :] - xhat * mean_gx[None, :]
            dv = dv * rstd[None, :]
            dx = dv
            if HAS_GATE:
                dgate += tl.where(mask, dv * x, 0.0)
                dx = dv * gate[None, :]
            tl.store(dx_ptr + base * C + offsets, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        if HAS_GATE:
            tl.store(dgate_ptr + segment * C + c, tl.sum(dgate, 0), mask=in_c)


class Tiling:
    """How [B, C, H, W] in channels_last memory is cut into segments (images, or runs of rows), tiles and programs."""

    def __init__(self, x: Tensor, by_image: bool, tile_bytes: int = _TILE_BYTES):
        batch, self.channels, height, width = x.shape
        self.rows = batch * height * width
        self.segment = height * width if by_image else _UNGATED_SEGMENT
        self.segments = triton.cdiv(self.rows, self.segment)
        self.block_c = block_of(self.channels, 128)
        self.block_rows = block_of(self.segment, max(1, tile_bytes // x.element_size() // self.block_c))
        channel_blocks = triton.cdiv(self.channels, self.block_c)
        self.programs = min(self.segments, max(1, _PROGRAMS // channel_blocks))
        self.grid = (self.programs, channel_blocks)
        self.constexprs = dict(C=self.channels, SEGMENT=self.segment, BLOCK_ROWS=self.block_rows, BLOCK_C=self.block_c)


class Partials:
    """Per-program count, mean and squared deviations, to be merged into batch statistics."""

    def __init__(self, programs: int, channels: int, device: torch.device):
        self.programs = programs
        self.mean = torch.empty(programs, channels, dtype=torch.float32, device=device)
        self.m2 = torch.empty_like(self.mean)
        self.count = torch.empty(programs, dtype=torch.float32, device=device)

    def merge(
        self, rows: int, running_mean: Tensor | None, running_var: Tensor | None, momentum: float
    ) -> tuple[Tensor, Tensor]:
        """Mean and biased variance [C] float32 of `rows` values; updates the running statistics in place."""
        channels = self.mean.shape[1]
        mean = self.mean.new_empty(channels)
        var = torch.empty_like(mean)
        tracked = running_mean is not None
        launch(
            _merge_stats_kernel, (triton.cdiv(channels, 8),), self.mean, self.m2, self.count, mean, var,
            running_mean if tracked else mean, running_var if tracked else var, self.programs, rows,
            momentum, 1 - momentum,
            C=channels, HAS_RUNNING=tracked, BLOCK_P=256, BLOCK_C=8,
        )  # fmt: skip
        return mean, var


def kept(fixed_mean: Tensor, fixed_var: Tensor) -> tuple[Tensor, Tensor]:
    """What backward reads of evaluation's statistics: training may move the running ones before it runs."""
    return fixed_mean.clone(), fixed_var.clone()


def batch_statistics(
    x: Tensor, gate: Tensor | None, running_mean: Tensor | None, running_var: Tensor | None, momentum: float
) -> tuple[Tensor, Tensor]:
    """Mean and biased variance [C] float32 of x * gate; updates the running statistics in place."""
    tiling = Tiling(x, gate is not None)
    partials = Partials(tiling.programs, tiling.channels, x.device)
    launch(
        _stats_kernel, tiling.grid, x, gate if gate is not None else x, partials.mean, partials.m2, partials.count,
        tiling.rows, tiling.segments, HAS_GATE=gate is not None, **tiling.constexprs,
    )  # fmt: skip
    return partials.merge(tiling.rows, running_mean, running_var, momentum)


def forward(
    x: Tensor, gate: Tensor | None, bias: Tensor, residual: Tensor | None, mean: Tensor, var: Tensor, eps: float,
    activation: str, squeeze: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """y like x from given statistics; fills `squeeze` [B, C] float32, if given, with the mean of y over H and W."""
    # the squeeze is one more accumulator
    tile_bytes = _TILE_BYTES if squeeze is None else _BWD_TILE_BYTES
    tiling = Tiling(x, gate is not None or squeeze is not None, tile_bytes)
    y = torch.empty_like(x, memory_format=torch.channels_last)
    launch(
        _fwd_kernel, tiling.grid, x, gate if gate is not None else x, bias, residual if residual is not None else x,
        mean, var, y, squeeze if squeeze is not None else mean, tiling.rows, tiling.segments, eps,
        HAS_GATE=gate is not None, HAS_RESIDUAL=residual is not None, HAS_SQUEEZE=squeeze is not None,
        ACT=activation, maxnreg=128, **tiling.constexprs,
    )  # fmt: skip
    return y


def reduce_gradients(
    dy: Tensor, dy2: Tensor | None, dsqueeze: Tensor | None, x: Tensor, gate: Tensor | None, bias: Tensor,
    mean: Tensor, var: Tensor, eps: float, activation: str,
) -> Tensor:  # fmt: skip
    """[2 C] float32: per channel the sum of g, which is dbias, then the sum of g * xhat."""
    tiling = Tiling(x, gate is not None or dsqueeze is not None, _BWD_TILE_BYTES)
    partials = torch.empty(tiling.programs, 2 * tiling.channels, dtype=torch.float32, device=x.device)
    launch(
        _bwd_reduce_kernel, tiling.grid, dy, dy2 if dy2 is not None else dy, dsqueeze if dsqueeze is not None else mean,
        x, gate if gate is not None else x, bias, mean, var, partials, tiling.rows, tiling.segments, eps,
        HAS_DY2=dy2 is not None, HAS_GATE=gate is not None, HAS_SQUEEZE=dsqueeze is not None, ACT=activation,
        maxnreg=144, **tiling.constexprs,
    )  # fmt: skip
    return sum_partials(partials)


def backward(
    dy: Tensor, x: Tensor, gate: Tensor | None, bias: Tensor, mean: Tensor, var: Tensor, training: bool, eps: float,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dx like x, dgate [B, C] float32 or empty, dbias [C] float32)."""
    sums = reduce_gradients(dy, None, None, x, gate, bias, mean, var, eps, activation)
    tiling = Tiling(x, gate is not None, _BWD_TILE_BYTES)
    dx = torch.empty_like(x, memory_format=torch.channels_last)
    dgate = torch.empty(gate.shape if gate is not None else (0,), dtype=torch.float32, device=x.device)
    launch(
        _bwd_kernel, tiling.grid, dy, x, gate if gate is not None else x, bias, mean, var, sums, dx, dgate,
        tiling.rows, tiling.segments, eps, HAS_GATE=gate is not None, TRAINING=training, ACT=activation,
        **tiling.constexprs,
    )  # fmt: skip
    return dx, dgate, sums[: tiling.channels]
