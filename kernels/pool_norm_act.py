"""Max-pool 2x2 -> BatchNorm -> activation, and the squeeze for free, fused.

    p = max_pool2d(x, 2)      z = (p - mean(p)) / sqrt(var(p) + eps) + bias
    y = act(z)                squeeze = mean of y over H and W

The pool pass reads x once, writes the pooled values and a 2-bit index of which pixel won, and keeps the statistics of
what it wrote; x is never read again. Backward expands the pooled gradient with the index and writes all of dx at once.
Sources: the layer order, hlb-CIFAR10; squeeze-and-excite, Hu et al. 2018; batch normalization, Ioffe and Szegedy 2015.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _batch_norm, _checks, _options
from ._batch_norm import Partials, load_fp32, rstd_of
from ._common import activation_backward, block_of, channels_last_like, rounded_product
from .differentiation import differentiable_once
from .launching import launch, opaque_op

# elements of one of the four pixels of every window that a program holds at a time
_TILE = 512
_PROGRAMS = 1024


@triton.jit
def _pool_kernel(
    x_ptr, pooled_ptr, index_ptr, mean_ptr, m2_ptr, count_ptr, n_images,
    C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, STATS: tl.constexpr, SAVE: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Pool whole images. A lane owns four consecutive windows of a channel, whose indices share a byte.

    The first maximum wins and a NaN wins over everything, as in PyTorch.
    """
    out_w: tl.constexpr = W // 2
    windows: tl.constexpr = (H // 2) * out_w
    groups: tl.constexpr = (windows + 3) // 4
    program, programs = tl.program_id(0), tl.num_programs(0)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = c < C
    mean = tl.zeros([BLOCK_G, BLOCK_C], dtype=tl.float32)
    m2 = tl.zeros([BLOCK_G, BLOCK_C], dtype=tl.float32)
    count = tl.zeros([BLOCK_G], dtype=tl.float32)
    for image in range(program, n_images, programs):
        x = x_ptr + tl.cast(image, tl.int64) * (H * W * C)
        pooled = pooled_ptr + tl.cast(image, tl.int64) * (windows * C)
        index = index_ptr + tl.cast(image, tl.int64) * (groups * C)
        for start in range(0, groups, BLOCK_G):
            group = start + tl.arange(0, BLOCK_G)
            packed = tl.zeros([BLOCK_G, BLOCK_C], dtype=tl.int32)
            for j in range(4):
                window = group * 4 + j
                inside = window < windows
                mask = inside[:, None] & in_c[None, :]
                corner = ((window // out_w) * (2 * W) + (window % out_w) * 2) * C
                # pixels are compared as they are: half the registers of float32
                best = tl.load(x + corner[:, None] + c[None, :], mask=mask, other=0.0)
                which = tl.zeros([BLOCK_G, BLOCK_C], dtype=tl.int32)
                for k in tl.static_range(1, 4):
                    pixel = x + ((k // 2) * W + k % 2) * C
                    v = tl.load(pixel + corner[:, None] + c[None, :], mask=mask, other=0.0)
                    wins = (v > best) | (v != v)
                    best = tl.where(wins, v, best)
                    which = tl.where(wins, k, which)
                packed |= which << (2 * j)
                tl.store(pooled + window[:, None] * C + c[None, :], best, mask=mask)
                if STATS:
                    p = best.to(tl.float32)
                    count += inside.to(tl.float32)
                    delta = tl.where(mask, p - mean, 0.0)
                    mean += delta / tl.maximum(count, 1.0)[:, None]
                    m2 += delta * tl.where(mask, p - mean, 0.0)
            if SAVE:
                mask = (group < groups)[:, None] & in_c[None, :]
                tl.store(index + group[:, None] * C + c[None, :], packed.to(tl.uint8), mask=mask)
    if STATS:
        total = tl.sum(count, 0)
        merged = tl.sum(rounded_product(mean, count[:, None]), 0) / total
        away = mean - merged[None, :]
        tl.store(mean_ptr + program * C + c, merged, mask=in_c)
        tl.store(m2_ptr + program * C + c, tl.sum(m2 + count[:, None] * away * away, 0), mask=in_c)
        tl.store(count_ptr + program, total)


@triton.jit
def _unpool_kernel(
    dy_ptr, dy2_ptr, dsqueeze_ptr, pooled_ptr, index_ptr, bias_ptr, mean_ptr, var_ptr, sum_ptr, dx_ptr, n_images,
    n_rows, eps,
    C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, HAS_DY2: tl.constexpr, HAS_SQUEEZE: tl.constexpr,
    TRAINING: tl.constexpr, ACT: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dp = rstd (g - mean g - xhat mean(g xhat)) at each window's winner, 0 at every other pixel of x."""
    out_w: tl.constexpr = W // 2
    windows: tl.constexpr = (H // 2) * out_w
    groups: tl.constexpr = (windows + 3) // 4
    program, programs = tl.program_id(0), tl.num_programs(0)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = c < C
    lane = tl.arange(0, BLOCK_G)
    mean = tl.load(mean_ptr + c, mask=in_c, other=0.0)
    rstd = rstd_of(var_ptr, c, in_c, eps)
    bias = tl.load(bias_ptr + c, mask=in_c, other=0.0).to(tl.float32)
    if TRAINING:
        n = n_rows.to(tl.float32)
        mean_g = tl.load(sum_ptr + c, mask=in_c, other=0.0) / n
        mean_gx = tl.load(sum_ptr + C + c, mask=in_c, other=0.0) / n
    zero = tl.zeros([BLOCK_G, BLOCK_C], dtype=dx_ptr.dtype.element_ty)
    for image in range(program, n_images, programs):
        dx = dx_ptr + tl.cast(image, tl.int64) * (H * W * C)
        pooled = pooled_ptr + tl.cast(image, tl.int64) * (windows * C)
        dy = dy_ptr + tl.cast(image, tl.int64) * (windows * C)
        dy2 = dy2_ptr + tl.cast(image, tl.int64) * (windows * C)
        index = index_ptr + tl.cast(image, tl.int64) * (groups * C)
        if HAS_SQUEEZE:
            shared = tl.load(dsqueeze_ptr + image * C + c, mask=in_c, other=0.0) / windows
        for start in range(0, groups, BLOCK_G):
            group = start + lane
            mask = (group < groups)[:, None] & in_c[None, :]
            packed = tl.load(index + group[:, None] * C + c[None, :], mask=mask, other=0).to(tl.int32)
            for j in range(4):
                window = group * 4 + j
                mask = (window < windows)[:, None] & in_c[None, :]
                offsets = window[:, None] * C + c[None, :]
                xhat = (load_fp32(pooled, offsets, mask) - mean[None, :]) * rstd[None, :]
                t = load_fp32(dy, offsets, mask)
                if HAS_DY2:
                    t += load_fp32(dy2, offsets, mask)
                if HAS_SQUEEZE:
                    t += shared[None, :]
                dp = activation_backward(t, xhat + bias[None, :], ACT)
                if TRAINING:
                    dp = dp - mean_g[None, :] - xhat * mean_gx[None, :]
                dp = (dp * rstd[None, :]).to(dx_ptr.dtype.element_ty)
                which = (packed >> (2 * j)) & 3
                corner = ((window // out_w) * (2 * W) + (window % out_w) * 2) * C
                for k in tl.static_range(4):
                    pixel = dx + ((k // 2) * W + k % 2) * C
                    tl.store(pixel + corner[:, None] + c[None, :], tl.where(which == k, dp, zero), mask=mask)
        # an odd last row or column lies in no window
        if H % 2 == 1:
            for start in range(0, W, BLOCK_G):
                x = start + lane
                at = ((H - 1) * W + x[:, None]) * C + c[None, :]
                tl.store(dx + at, zero, mask=(x < W)[:, None] & in_c[None, :])
        if W % 2 == 1:
            for start in range(0, H, BLOCK_G):
                y = start + lane
                at = (y[:, None] * W + W - 1) * C + c[None, :]
                tl.store(dx + at, zero, mask=(y < H)[:, None] & in_c[None, :])


# read by the compile report: why these kernels may stay below 16 bytes a lane there
NARROW_ACCESS = {
    "_pool_kernel:gfx942": "64-lane waves share a tile that is sized for 32-lane warps",
    "_unpool_kernel:gfx942": "64-lane waves share a tile that is sized for 32-lane warps",
}


class _Tiling:
    """Whole images per program, four windows a lane."""

    def __init__(self, x_shape: tuple[int, ...], itemsize: int):
        self.batch, channels, height, width = x_shape
        block_c = block_of(channels, 128)
        self.groups = triton.cdiv((height // 2) * (width // 2), 4)
        self.programs = min(self.batch, max(1, _PROGRAMS // triton.cdiv(channels, block_c)))
        self.grid = (self.programs, triton.cdiv(channels, block_c))
        self.constexprs = dict(
            C=channels,
            H=height,
            W=width,
            BLOCK_G=block_of(self.groups, max(1, _TILE // block_c)),
            BLOCK_C=block_c,
        )
        # as many threads as the tile has 16-byte pieces
        tile_bytes = self.constexprs["BLOCK_G"] * block_c * itemsize
        self.num_warps = max(1, min(4, tile_bytes // (32 * 16)))


@opaque_op("pool_norm_act_fwd", mutates=("running_mean", "running_var"))
def _fwd(
    x: Tensor,
    bias: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    fixed_mean: Tensor | None,
    fixed_var: Tensor | None,
    momentum: float,
    eps: float,
    activation: str,
    squeezed: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(y, squeeze [B, C], pooled, index [B, G, C] uint8, batch mean [C], batch variance [C]).

    The squeeze is empty if not wanted, the statistics in evaluation mode, the index where nothing is saved.
    """
    training = fixed_mean is None
    running = {"running_mean": running_mean, "running_var": running_var}
    _checks.separate("pool_norm_act", running, {"x": x, "bias": bias})
    batch, channels, height, width = x.shape
    tiling = _Tiling(x.shape, x.element_size())
    pooled = channels_last_like(x, channels, height // 2, width // 2, x.dtype)
    index_shape = (batch, tiling.groups, channels) if save else (0,)
    index = torch.empty(index_shape, dtype=torch.uint8, device=x.device)
    partials = Partials(tiling.programs if training else 0, channels, x.device)
    launch(
        _pool_kernel, tiling.grid, x, pooled, index, partials.mean, partials.m2, partials.count, batch,
        STATS=training, SAVE=save, num_warps=tiling.num_warps, maxnreg=128, **tiling.constexprs,
    )  # fmt: skip
    if training:
        rows = batch * (height // 2) * (width // 2)
        mean, var = partials.merge(rows, running_mean, running_var, momentum)
        used = (mean, var)
    else:
        mean = torch.empty(0, dtype=torch.float32, device=x.device)
        var = torch.empty_like(mean)
        used = (fixed_mean, fixed_var)
    squeeze = torch.empty((batch, channels) if squeezed else (0,), dtype=torch.float32, device=x.device)
    y = _batch_norm.forward(pooled, None, bias, None, *used, eps, activation, squeeze if squeezed else None)
    return y, squeeze, pooled, index, mean, var


@_fwd.register_fake
def _(x, bias, running_mean, running_var, fixed_mean, fixed_var, momentum, eps, activation, squeezed, save):
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
    mean: Tensor,
    var: Tensor,
    height: int,
    width: int,
    training: bool,
    eps: float,
    activation: str,
) -> tuple[Tensor, Tensor]:
    """(dx [B, C, height, width], dbias [C] float32)"""
    batch, channels = pooled.shape[:2]
    sums = _batch_norm.reduce_gradients(dy, dy2, dsqueeze, pooled, None, bias, mean, var, eps, activation)
    dx = channels_last_like(pooled, channels, height, width, pooled.dtype)
    tiling = _Tiling(dx.shape, pooled.element_size())
    launch(
        _unpool_kernel, tiling.grid, dy, dy2 if dy2 is not None else dy, dsqueeze if dsqueeze is not None else mean,
        pooled, index, bias, mean, var, sums, dx, batch, pooled.numel() // channels, eps, HAS_DY2=dy2 is not None,
        HAS_SQUEEZE=dsqueeze is not None, TRAINING=training, ACT=activation, num_warps=tiling.num_warps, maxnreg=128,
        **tiling.constexprs,
    )  # fmt: skip
    return dx, sums[:channels]


@_bwd.register_fake
def _(dy, dy2, dsqueeze, pooled, index, bias, mean, var, height, width, training, eps, activation):
    return channels_last_like(pooled, pooled.shape[1], height, width, pooled.dtype), torch.empty_like(mean)


class PoolNormAct(torch.autograd.Function):
    """Saved for backward: pooled values, 2-bit winners, bias and the statistics used; not x, and z is recomputed."""

    @staticmethod
    def forward(
        ctx, x, bias, running_mean, running_var, fixed_mean, fixed_var, momentum, eps, activation, squeeze, fork
    ):
        save = any(ctx.needs_input_grad)
        y, means, pooled, index, mean, var = _fwd(
            x, bias, running_mean, running_var, fixed_mean, fixed_var, momentum, eps, activation, squeeze, save
        )
        ctx.size, ctx.training, ctx.eps, ctx.activation = x.shape[2:], fixed_mean is None, eps, activation
        if not ctx.training and save:
            mean, var = _batch_norm.kept(fixed_mean, fixed_var)
        ctx.save_for_backward(pooled, index, bias, mean, var)
        ctx.set_materialize_grads(False)
        ctx.squeeze, ctx.fork = squeeze, fork
        # to autograd a view is an output of its own: two gradients arrive, not their sum
        return (y, *([y.view_as(y)] if fork else []), *([means] if squeeze else []))

    @staticmethod
    @differentiable_once("pool_norm_act")
    def backward(ctx, *grads):
        pooled, index, bias, mean, var = ctx.saved_tensors
        dsqueeze = grads[-1] if ctx.squeeze else None
        dys = [dy for dy in grads[: 2 if ctx.fork else 1] if dy is not None]
        if not dys and dsqueeze is None:
            return (None,) * 11
        dy, dy2, *_ = [dy.contiguous(memory_format=torch.channels_last) for dy in dys] + [None, None]
        dy = torch.zeros_like(pooled) if dy is None else dy
        dsqueeze = None if dsqueeze is None else dsqueeze.contiguous()
        dx, dbias = _bwd(
            dy, dy2, dsqueeze, pooled, index, bias, mean, var, *ctx.size, ctx.training, ctx.eps, ctx.activation
        )
        needs_x, needs_bias = ctx.needs_input_grad[:2]
        return (dx if needs_x else None, dbias.to(bias.dtype) if needs_bias else None, *[None] * 9)


def pool_norm_act(
    x: Tensor,
    bias: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    *,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str | None = "gelu",
    squeeze: bool = True,
    fork: bool = False,
) -> tuple[Tensor | None, ...]:
    """(act(batch_norm(max_pool2d(x, 2)) + bias), its mean over H and W), with a BatchNorm scale fixed at 1.

    x: [B, C, H, W] float32, float16 or bfloat16, channels_last, at least 2x2; an odd last row or column is dropped.
    bias: [C] floating, of any strides.
    running_mean, running_var: [C] float32, contiguous, or both None; updated in training, used in evaluation, as
        BatchNorm2d does.
    momentum: the new batch's weight, 0 to 1; eps: positive.
    activation: "gelu" (erf), "silu", "relu" or None.
    squeeze: whether the mean is wanted; None stands in its place if not.
    fork: whether y has two users. It is then returned twice, sharing memory (autograd refuses to modify either in
        place), and backward reads the gradient of each, which autograd would otherwise first add in a pass of its own.
    Returns y [B, C, H // 2, W // 2] like x, channels_last (with `fork`, y again) and the squeeze [B, C] float32, the
    mean of y before y is rounded. Arithmetic is float32. Ties go to the first pixel of a window and NaN wins, as in
    PyTorch.

    With t = dy (+ dy_again) + dsqueeze / (H // 2 * W // 2), g = t * act'(z), N = B * (H // 2) * (W // 2), backward is
        dp = r * (g - sum(g) / N - xhat * sum(g * xhat) / N)      (evaluation: dp = r * g)
        dx = dp at each window's winner, 0 elsewhere      dbias = sum(g)
    Saved: the pooled values, a 2-bit index a window and channel, bias, mean, var. Deterministic. Differentiable once.

    Raises ValueError for a wrong shape, layout, activation, momentum or eps, an empty batch, one value per channel in
    training, or running statistics that share memory with another argument; TypeError for a wrong type or dtype;
    RuntimeError where the kernels cannot run.
    """
    op = "pool_norm_act"
    name = _checks.activation(op, activation)
    _options.batch_norm(op, momentum, eps)
    _checks.images(op, "x", x, _checks.FLOATS)
    batch, channels, height, width = x.shape
    if min(height, width) < 2:
        raise ValueError(f"{op}: x must be at least 2x2 to pool, found {height}x{width}")
    bias = _checks.operand(op, "bias", bias, (channels,), _checks.FLOATS)
    statistics = _checks.running_statistics(op, running_mean, running_var, channels, training)
    _checks.enough_values(op, batch * (height // 2) * (width // 2), training)
    _checks.device(op, x, bias, running_mean, running_var)
    y, *others = PoolNormAct.apply(x, bias, *statistics, momentum, eps, name, squeeze, fork)
    return (y, *others) if squeeze else (y, *others, None)
