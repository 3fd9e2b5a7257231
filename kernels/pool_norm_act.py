"""Max-pool 2x2 -> BatchNorm -> activation, and the squeeze for free, fused.

    p = max_pool2d(x, 2)      z = (p - mean(p)) / sqrt(var(p) + eps) * weight + bias
    y = act(z)                squeeze = mean of y over H and W

The pool pass reads x once, writes the pooled values and a 2-bit index of which pixel won, and keeps the statistics of
what it wrote; x is never read again. Backward expands the pooled gradient with the index and writes all of dx at once.
Sources: the layer order, hlb-CIFAR10; squeeze-and-excite, Hu et al. 2018; batch normalization, Ioffe and Szegedy 2015.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _batch_norm, _checks, _options
from ._batch_norm import RESIDENT_WARPS, Norm, Upstream, load_means, load_norm
from ._batch_statistics import Partials, store_partials, welford
from ._common import block_of, channels_last_like, load_fp32
from .activations import ACTIVATIONS
from .differentiation import differentiable_once
from .launching import launch, opaque_op, resident
from .registry import Arguments, Cost, data, fp32, op

# windows times channels that a program holds at a time, of one of the four pixels of each window
_TILE = 512


@triton.jit
def _pool_kernel(x_ptr, pooled_ptr, index_ptr, partials, n_images, S: tl.constexpr):
    """Pool whole images. A lane owns four consecutive windows of a channel, whose indices share a byte.

    The first maximum wins and a NaN wins over everything, as in PyTorch.
    """
    out_w: tl.constexpr = S.W // 2
    windows: tl.constexpr = (S.H // 2) * out_w
    groups: tl.constexpr = (windows + 3) // 4
    program, programs = tl.program_id(0), tl.num_programs(0)
    c = tl.program_id(1) * S.BLOCK_C + tl.arange(0, S.BLOCK_C)
    in_c = c < S.C
    mean = tl.zeros([S.BLOCK_G, S.BLOCK_C], dtype=tl.float32)
    m2 = tl.zeros([S.BLOCK_G, S.BLOCK_C], dtype=tl.float32)
    count = tl.zeros([S.BLOCK_G], dtype=tl.float32)
    for image in range(program, n_images, programs):
        x = x_ptr + tl.cast(image, tl.int64) * (S.H * S.W * S.C)
        pooled = pooled_ptr + tl.cast(image, tl.int64) * (windows * S.C)
        for start in range(0, groups, S.BLOCK_G):
            group = start + tl.arange(0, S.BLOCK_G)
            packed = tl.zeros([S.BLOCK_G, S.BLOCK_C], dtype=tl.int32)
            for j in range(4):
                window = group * 4 + j
                inside = window < windows
                mask = inside[:, None] & in_c[None, :]
                corner = ((window // out_w) * (2 * S.W) + (window % out_w) * 2) * S.C
                # pixels are compared as they are: half the registers of float32
                best = tl.load(x + corner[:, None] + c[None, :], mask=mask, other=0.0)
                which = tl.zeros([S.BLOCK_G, S.BLOCK_C], dtype=tl.int32)
                for k in tl.static_range(1, 4):
                    pixel = x + ((k // 2) * S.W + k % 2) * S.C
                    v = tl.load(pixel + corner[:, None] + c[None, :], mask=mask, other=0.0)
                    wins = (v > best) | (v != v)
                    best = tl.where(wins, v, best)
                    which = tl.where(wins, k, which)
                packed |= which << (2 * j)
                tl.store(pooled + window[:, None] * S.C + c[None, :], best, mask=mask)
                if partials is not None:
                    mean, m2, count = welford(mean, m2, count, best.to(tl.float32), inside, mask)
            if index_ptr is not None:
                mask = (group < groups)[:, None] & in_c[None, :]
                index = index_ptr + tl.cast(image, tl.int64) * (groups * S.C)
                tl.store(index + group[:, None] * S.C + c[None, :], packed.to(tl.uint8), mask=mask)
    if partials is not None:
        store_partials(partials, program, c, in_c, mean, m2, count, S.C)


@triton.jit
def _unpool_kernel(
    upstream, pooled_ptr, index_ptr, norm, sum_ptr, dx_ptr, n_images, n_rows, S: tl.constexpr, DACT: tl.constexpr
):
    """dp = slope (g - mean g - xhat mean(g xhat)) at each window's winner, 0 at every other pixel of x."""
    out_w: tl.constexpr = S.W // 2
    windows: tl.constexpr = (S.H // 2) * out_w
    groups: tl.constexpr = (windows + 3) // 4
    program, programs = tl.program_id(0), tl.num_programs(0)
    c = tl.program_id(1) * S.BLOCK_C + tl.arange(0, S.BLOCK_C)
    in_c = c < S.C
    lane = tl.arange(0, S.BLOCK_G)
    mean, rstd, bias, slope = load_norm(norm, c, in_c)
    if sum_ptr is not None:
        mean_g, mean_gx = load_means(sum_ptr, n_rows.to(tl.float32), c, in_c, S.C)
    zero = tl.zeros([S.BLOCK_G, S.BLOCK_C], dtype=dx_ptr.dtype.element_ty)
    for image in range(program, n_images, programs):
        dx = dx_ptr + tl.cast(image, tl.int64) * (S.H * S.W * S.C)
        pooled = pooled_ptr + tl.cast(image, tl.int64) * (windows * S.C)
        dy = upstream.dy + tl.cast(image, tl.int64) * (windows * S.C)
        if upstream.dy2 is not None:
            dy2 = upstream.dy2 + tl.cast(image, tl.int64) * (windows * S.C)
        index = index_ptr + tl.cast(image, tl.int64) * (groups * S.C)
        if upstream.dsqueeze is not None:
            shared = tl.load(upstream.dsqueeze + image * S.C + c, mask=in_c, other=0.0) / windows
        for start in range(0, groups, S.BLOCK_G):
            group = start + lane
            mask = (group < groups)[:, None] & in_c[None, :]
            packed = tl.load(index + group[:, None] * S.C + c[None, :], mask=mask, other=0).to(tl.int32)
            for j in range(4):
                window = group * 4 + j
                mask = (window < windows)[:, None] & in_c[None, :]
                offsets = window[:, None] * S.C + c[None, :]
                centered = load_fp32(pooled, offsets, mask) - mean[None, :]
                t = load_fp32(dy, offsets, mask)
                if upstream.dy2 is not None:
                    t += load_fp32(dy2, offsets, mask)
                if upstream.dsqueeze is not None:
                    t += shared[None, :]
                dp = DACT(t, centered * slope[None, :] + bias[None, :])
                if sum_ptr is not None:
                    dp = dp - mean_g[None, :] - centered * rstd[None, :] * mean_gx[None, :]
                dp = (dp * slope[None, :]).to(dx_ptr.dtype.element_ty)
                which = (packed >> (2 * j)) & 3
                corner = ((window // out_w) * (2 * S.W) + (window % out_w) * 2) * S.C
                for k in tl.static_range(4):
                    pixel = dx + ((k // 2) * S.W + k % 2) * S.C
                    tl.store(pixel + corner[:, None] + c[None, :], tl.where(which == k, dp, zero), mask=mask)
        # an odd last row or column lies in no window
        if S.H % 2 == 1:
            for start in range(0, S.W, S.BLOCK_G):
                x = start + lane
                at = ((S.H - 1) * S.W + x[:, None]) * S.C + c[None, :]
                tl.store(dx + at, zero, mask=(x < S.W)[:, None] & in_c[None, :])
        if S.W % 2 == 1:
            for start in range(0, S.H, S.BLOCK_G):
                y = start + lane
                at = (y[:, None] * S.W + S.W - 1) * S.C + c[None, :]
                tl.store(dx + at, zero, mask=(y < S.H)[:, None] & in_c[None, :])


# read by the compile report: why these kernels may stay below 16 bytes a lane there
NARROW_ACCESS = {
    "_pool_kernel:gfx942": "64-lane waves share a tile that is sized for 32-lane warps",
    "_unpool_kernel:gfx942": "64-lane waves share a tile that is sized for 32-lane warps",
}


class _Sizes(NamedTuple):
    C: int
    H: int
    W: int
    BLOCK_G: int
    BLOCK_C: int


class _Tiling:
    """Whole images per program, four windows a lane."""

    def __init__(self, x_shape: tuple[int, ...], itemsize: int, device: torch.device):
        self.batch, channels, height, width = x_shape
        block_c = block_of(channels, 128)
        self.groups = triton.cdiv((height // 2) * (width // 2), 4)
        block_g = block_of(self.groups, max(1, _TILE // block_c))
        self.sizes = _Sizes(channels, height, width, block_g, block_c)
        # as many threads as the tile has 16-byte pieces
        tile_bytes = block_g * block_c * itemsize
        self.num_warps = max(1, min(4, tile_bytes // (32 * 16)))
        channel_blocks = triton.cdiv(channels, block_c)
        fitting = resident(device, RESIDENT_WARPS // self.num_warps)
        self.programs = min(self.batch, max(1, fitting // channel_blocks))
        self.grid = (self.programs, channel_blocks)


@opaque_op("pool_norm_act_fwd", mutates=("running_mean", "running_var"))
def _fwd(
    x: Tensor,
    bias: Tensor,
    weight: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    fixed_mean: Tensor | None,
    fixed_var: Tensor | None,
    momentum: float,
    eps: float,
    activation: str | None,
    squeezed: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(y, squeeze [B, C], pooled, index [B, G, C] uint8 with four windows a byte, batch mean [C], batch variance [C]).

    The squeeze is empty if not wanted, the statistics in evaluation mode, the index where nothing is saved.
    """
    training = fixed_mean is None
    running = {"running_mean": running_mean, "running_var": running_var}
    _checks.separate("pool_norm_act", running, {"x": x, "bias": bias, "weight": weight})
    batch, channels, height, width = x.shape
    tiling = _Tiling(x.shape, x.element_size(), x.device)
    pooled = channels_last_like(x, channels, height // 2, width // 2, x.dtype)
    index_shape = (batch, tiling.groups, channels) if save else (0,)
    index = torch.empty(index_shape, dtype=torch.uint8, device=x.device)
    partials = Partials.empty(tiling.programs, channels, x.device) if training else None
    arguments = (x, pooled, index if save else None, partials, batch)
    launch(_pool_kernel, tiling.grid, *arguments, S=tiling.sizes, num_warps=tiling.num_warps, maxnreg=128)
    if training:
        rows = batch * (height // 2) * (width // 2)
        mean, var = partials.merge(rows, running_mean, running_var, momentum)
        used = (mean, var)
    else:
        mean = torch.empty(0, dtype=torch.float32, device=x.device)
        var = torch.empty_like(mean)
        used = (fixed_mean, fixed_var)
    squeeze = torch.empty((batch, channels) if squeezed else (0,), dtype=torch.float32, device=x.device)
    norm = Norm(*used, bias, eps, weight)
    y = _batch_norm.forward(pooled, None, norm, activation, squeeze=squeeze if squeezed else None)
    return y, squeeze, pooled, index, mean, var


@_fwd.register_fake
def _(x, bias, weight, running_mean, running_var, fixed_mean, fixed_var, momentum, eps, activation, squeezed, save):
    batch, channels, height, width = x.shape
    y = channels_last_like(x, channels, height // 2, width // 2, x.dtype)
    groups = triton.cdiv((height // 2) * (width // 2), 4)
    index = torch.empty((batch, groups, channels) if save else (0,), dtype=torch.uint8, device=x.device)
    squeeze = torch.empty((batch, channels) if squeezed else (0,), dtype=torch.float32, device=x.device)
    mean = torch.empty(channels if fixed_mean is None else 0, dtype=torch.float32, device=x.device)
    return y, squeeze, torch.empty_like(y), index, mean, torch.empty_like(mean)


@opaque_op("pool_norm_act_bwd")
def _bwd(
    dy: Tensor,
    dy2: Tensor | None,
    dsqueeze: Tensor | None,
    pooled: Tensor,
    index: Tensor,
    bias: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    var: Tensor,
    height: int,
    width: int,
    training: bool,
    eps: float,
    activation: str | None,
) -> tuple[Tensor, Tensor]:
    """(dx [B, C, height, width], dbias and dweight [2 C] float32)"""
    batch, channels = pooled.shape[:2]
    upstream, norm = Upstream(dy, dy2, dsqueeze), Norm(mean, var, bias, eps, weight)
    sums = _batch_norm.reduce_gradients(upstream, pooled, None, norm, activation)
    dx = channels_last_like(pooled, channels, height, width, pooled.dtype)
    tiling = _Tiling(dx.shape, pooled.element_size(), dx.device)
    used = _batch_norm.sums_for_dx(sums, training)
    arguments = (upstream, pooled, index, norm, used, dx, batch, pooled.numel() // channels)
    sizes = dict(S=tiling.sizes, DACT=ACTIVATIONS[activation].backward)
    launch(_unpool_kernel, tiling.grid, *arguments, num_warps=tiling.num_warps, maxnreg=128, **sizes)
    return dx, sums


@_bwd.register_fake
def _(dy, dy2, dsqueeze, pooled, index, bias, weight, mean, var, height, width, training, eps, activation):
    channels = pooled.shape[1]
    return channels_last_like(pooled, channels, height, width, pooled.dtype), mean.new_empty(2 * channels)


class PoolNormAct(torch.autograd.Function):
    """Saved for backward: pooled values, 2-bit winners, bias, weight and the statistics used; not x, and z is
    recomputed.
    """

    @staticmethod
    def forward(
        ctx, x, bias, weight, running_mean, running_var, fixed_mean, fixed_var, momentum, eps, activation, squeeze, fork
    ):
        save, statistics = any(ctx.needs_input_grad), (running_mean, running_var, fixed_mean, fixed_var)
        y, means, pooled, index, mean, var = _fwd(
            x, bias, weight, *statistics, momentum, eps, activation, squeeze, save
        )
        ctx.size, ctx.training, ctx.eps, ctx.activation = x.shape[2:], fixed_mean is None, eps, activation
        if not ctx.training and save:
            mean, var = _batch_norm.kept(fixed_mean, fixed_var)
        ctx.save_for_backward(pooled, index, bias, weight, mean, var)
        ctx.set_materialize_grads(False)
        ctx.squeeze, ctx.fork = squeeze, fork
        # to autograd a view is an output of its own: two gradients arrive, not their sum
        return (y, *([y.view_as(y)] if fork else []), *([means] if squeeze else []))

    @staticmethod
    @differentiable_once("pool_norm_act")
    def backward(ctx, *grads):
        pooled, index, bias, weight, mean, var = ctx.saved_tensors
        dsqueeze = grads[-1] if ctx.squeeze else None
        dys = [dy for dy in grads[: 2 if ctx.fork else 1] if dy is not None]
        if not dys and dsqueeze is None:
            return (None,) * 12
        dy, dy2, *_ = [dy.contiguous(memory_format=torch.channels_last) for dy in dys] + [None, None]
        dy = torch.zeros_like(pooled) if dy is None else dy
        dsqueeze = None if dsqueeze is None else dsqueeze.contiguous()
        dx, sums = _bwd(
            dy, dy2, dsqueeze, pooled, index, bias, weight, mean, var, *ctx.size, ctx.training, ctx.eps, ctx.activation
        )
        needs_x, *needs = ctx.needs_input_grad[:3]
        return (
            dx if needs_x else None,
            *_batch_norm.parameter_gradients(sums, bias, weight, *needs),
            *[None] * 9,
        )


def _arguments(batch: int, channels: int, height: int, width: int, weight: bool = False) -> Arguments:
    """Height and width before pooling."""
    x = data(batch, channels, height, width)
    return {"x": x, "bias": fp32(channels), **_batch_norm.statistics(channels, weight)}


def _cost(arguments: Arguments, options: dict, itemsize: int) -> dict[str, Cost]:
    batch, channels, height, width = arguments["x"].shape
    windows = batch * channels * (height // 2) * (width // 2)
    x, pooled, index = arguments["x"].bytes(itemsize), windows * itemsize, windows // 4
    return {
        # read x, write pooled and index; read pooled, write y
        "fwd": Cost(x + 3 * pooled + index),
        # every dy and pooled for the sums; these and index again, write all of dx
        "bwd": Cost(2 * (2 + options["fork"]) * pooled + index + x),
    }


@op(
    arguments=_arguments,
    cost=_cost,
    differentiable=("x", "bias", "weight"),
    updates=("running_mean", "running_var"),
    options=_batch_norm.OPTIONS,
    small=[dict(batch=2, channels=12, height=5, width=7), dict(batch=2, channels=12, height=5, width=7, weight=True)],
)
def pool_norm_act(
    x: Tensor,
    bias: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    *,
    weight: Tensor | None = None,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str | None = "gelu",
    squeeze: bool = True,
    fork: bool = False,
) -> tuple[Tensor | None, ...]:
    """(act(batch_norm(max_pool2d(x, 2)) * weight + bias), its mean over H and W).

    x: [B, C, H, W] float32, float16 or bfloat16, channels_last, at least 2x2; an odd last row or column is dropped.
    bias: [C] floating, of any strides; weight: the same, or None for a scale fixed at 1.
    running_mean, running_var: [C] float32, contiguous, or both None; updated in training, used in evaluation, as
        BatchNorm2d does.
    momentum: the new batch's weight, 0 to 1; eps: positive.
    activation: a key of `reference.ACTIVATIONS`.
    squeeze: whether the mean is wanted; None stands in its place if not.
    fork: whether y has two users. It is then returned twice, sharing memory (autograd refuses to modify either in
        place), and backward reads the gradient of each, which autograd would otherwise first add in a pass of its own.
    Returns y [B, C, H // 2, W // 2] like x, channels_last (with `fork`, y again) and the squeeze [B, C] float32, the
    mean of y before y is rounded. Arithmetic is float32. Ties go to the first pixel of a window and NaN wins, as in
    PyTorch.

    With t = dy (+ dy_again) + dsqueeze / (H // 2 * W // 2), g = t * act'(z), N = B * (H // 2) * (W // 2), backward is
        dp = r * weight * (g - sum(g) / N - xhat * sum(g * xhat) / N)      (evaluation: dp = r * weight * g)
        dx = dp at each window's winner, 0 elsewhere      dbias = sum(g)      dweight = sum(g * xhat)
    Saved: the pooled values, a 2-bit index a window and channel, bias, weight, mean, var. Deterministic. Differentiable
    once.

    Raises ValueError for a wrong shape, layout, activation, momentum or eps, an empty batch, one value per channel in
    training, or running statistics that share memory with another argument; TypeError for a wrong type or dtype;
    RuntimeError where the kernels cannot run.
    """
    op = "pool_norm_act"
    _checks.activation(op, activation)
    _options.batch_norm(op, momentum, eps)
    _checks.images(op, "x", x, _checks.FLOATS)
    batch, channels, height, width = x.shape
    if min(height, width) < 2:
        raise ValueError(f"{op}: x must be at least 2x2 to pool, found {height}x{width}")
    bias, weight = _checks.affine(op, bias, weight, channels)
    statistics = _checks.running_statistics(op, running_mean, running_var, channels, training)
    _checks.enough_values(op, batch * (height // 2) * (width // 2), training)
    _checks.device(op, x, bias, weight, running_mean, running_var)
    y, *others = PoolNormAct.apply(x, bias, weight, *statistics, momentum, eps, activation, squeeze, fork)
    return (y, *others) if squeeze else (y, *others, None)
