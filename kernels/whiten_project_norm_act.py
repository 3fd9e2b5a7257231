"""The whole stem, fused: uint8 pixels -> normalization -> whitening -> 1x1 projection -> BatchNorm -> activation.

With patches p of the normalized image, W = W2 W1 (projection times whitening, [C, F]) and their batch mean m and
covariance Cov, the projected output W p has the exact batch statistics

    mean = W m      var = diag(W Cov W^T)      z = r W (p - m) + bias,  r = 1 / sqrt(var + eps)      y = act(z)

m and Cov come from integer sums of q = u - 128 over the pixels alone, so the statistics cost one pass over the bytes,
are exact, and need no intermediate: neither the 12- nor the C-channel tensor exists. The finish runs in float64,
because W undoes the strong correlation of neighbouring pixels and cancels most of what it sums.

Backward is one pass over (dy, pixels): G = sum g q^T and sum g, with g = dy act'(z), give dW2 and dbias; the images get
no gradient. Sources: the stem, hlb-CIFAR10; batch normalization, Ioffe and Szegedy 2015.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import _checks
from ._common import activate, activate_grad, channels_last_like
from ._launch import launch, opaque_op
from ._patches import (
    PatchShape,
    check_kernel,
    correlate_patches,
    load_patches,
    needs_float32,
    output_dtype,
    project_patches,
    tile_sizes,
    weight_offset,
)

_MOMENT_BLOCK = 128
# |q| <= 2**7, so a sum of 2**10 products stays within the 2**24 up to which float32 counts exactly
_EXACT_POSITIONS = 1024
_PROGRAMS = 512


@triton.jit
def _moments_kernel(
    images_ptr, moments_ptr, n_positions, UINT8: tl.constexpr,
    H: tl.constexpr, W: tl.constexpr, C_IN: tl.constexpr, K: tl.constexpr, F_PAD: tl.constexpr,
    BLOCK_P: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Add sum of q q^T over this program's patches to moments [F_PAD, F_PAD] int64; feature F is 1, so row F is sum q.

    Integer atomics: the order of additions cannot change the result.
    """
    f = tl.arange(0, F_PAD)
    total = tl.zeros([F_PAD, F_PAD], dtype=tl.int64)
    for start in range(tl.program_id(0) * CHUNK, n_positions, tl.num_programs(0) * CHUNK):
        exact = tl.zeros([F_PAD, F_PAD], dtype=tl.float32)
        for inner in range(0, CHUNK, BLOCK_P):
            position = start + inner + tl.arange(0, BLOCK_P)
            q = load_patches(images_ptr, position, n_positions, UINT8, H, W, C_IN, K, F_PAD).to(tl.float16)
            exact = tl.dot(tl.trans(q), q, acc=exact)
        total += exact.to(tl.int64)
    tl.atomic_add(moments_ptr + f[:, None] * F_PAD + f[None, :], total)


@triton.jit
def _row_of_product(
    project_ptr, whiten_ptr, row, FILTERS: tl.constexpr, C_IN: tl.constexpr, K: tl.constexpr, F_PAD: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Row `row` of W = W2 W1 in float64 [F_PAD], features in patch order."""
    features: tl.constexpr = K * K * C_IN
    f = tl.arange(0, F_PAD)
    out = tl.zeros([F_PAD], dtype=tl.float64)
    for start in range(0, FILTERS, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        w2 = tl.load(project_ptr + row * FILTERS + k, mask=k < FILTERS, other=0.0).to(tl.float64)
        mask = (k < FILTERS)[:, None] & (f < features)[None, :]
        at = k[:, None] * features + weight_offset(f, C_IN, K)[None, :]
        w1 = tl.load(whiten_ptr + at, mask=mask, other=0.0).to(tl.float64)
        out += tl.sum(w2[:, None] * w1, 0)
    return out


@triton.jit
def _pixel_map(mean_ptr, std_ptr, C_IN: tl.constexpr, K: tl.constexpr, F_PAD: tl.constexpr):
    """p = scale * q + offset per feature, float64 [F_PAD]; padding features get scale 0."""
    f = tl.arange(0, F_PAD)
    in_f = f < K * K * C_IN
    mean = tl.load(mean_ptr + f % C_IN, mask=in_f, other=0.0).to(tl.float64)
    std = tl.load(std_ptr + f % C_IN, mask=in_f, other=1.0).to(tl.float64)
    scale = tl.where(in_f, 1.0 / (std * 255.0), 0.0)
    # 1 / 255 in float32 would cost the constants their last bits
    offset = tl.where(in_f, (128.0 - 255.0 * mean) * scale, 0.0)
    return scale, offset


@triton.jit
def _patch_moments(moments_ptr, n, FEATURES: tl.constexpr, F_PAD: tl.constexpr):
    """Mean [F_PAD] and covariance [F_PAD, F_PAD] of q in float64, zero where either feature is padding."""
    f = tl.arange(0, F_PAD)
    in_f = f < FEATURES
    first = tl.load(moments_ptr + FEATURES * F_PAD + f, mask=in_f, other=0).to(tl.float64) / n
    both = in_f[:, None] & in_f[None, :]
    second = tl.load(moments_ptr + f[:, None] * F_PAD + f[None, :], mask=both, other=0).to(tl.float64) / n
    return first, second - first[:, None] * first[None, :]


@triton.jit
def _finish_kernel(
    moments_ptr, project_ptr, whiten_ptr, bias_ptr, mean_ptr, std_ptr, running_mean_ptr, running_var_ptr,
    matrix_ptr, shift_ptr, rstd_ptr, n_positions, momentum, keep, eps,
    FILTERS: tl.constexpr, TRAINING: tl.constexpr, HAS_RUNNING: tl.constexpr,
    C_IN: tl.constexpr, K: tl.constexpr, F_PAD: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program per output channel: z = matrix q + shift, and the running statistics."""
    features: tl.constexpr = K * K * C_IN
    row = tl.program_id(0)
    f = tl.arange(0, F_PAD)
    w = _row_of_product(project_ptr, whiten_ptr, row, FILTERS, C_IN, K, F_PAD, BLOCK_K)
    scale, offset = _pixel_map(mean_ptr, std_ptr, C_IN, K, F_PAD)
    v = w * scale
    constant = tl.sum(w * offset, 0)
    bias = tl.load(bias_ptr + row).to(tl.float64)
    if TRAINING:
        n = n_positions.to(tl.float64)
        first, covariance = _patch_moments(moments_ptr, n, features, F_PAD)
        var = tl.sum(v * tl.sum(covariance * v[None, :], 1), 0)
        var = tl.where(var < 0.0, 0.0, var)
        mean_q = tl.sum(v * first, 0)
        if HAS_RUNNING:
            old = tl.load(running_mean_ptr + row)
            tl.store(running_mean_ptr + row, keep * old + momentum * (mean_q + constant).to(tl.float32))
            old = tl.load(running_var_ptr + row)
            tl.store(running_var_ptr + row, keep * old + momentum * (var * (n / (n - 1.0))).to(tl.float32))
    else:
        mean_q = tl.load(running_mean_ptr + row).to(tl.float64) - constant
        var = tl.load(running_var_ptr + row).to(tl.float64)
    rstd = 1.0 / tl.sqrt(var + eps)
    matrix = (rstd * v).to(tl.float32)
    if TRAINING:
        # the mean of the matrix as rounded, so that the rounding does not shift z
        shift = bias - tl.sum(matrix.to(tl.float64) * first, 0)
    else:
        shift = bias - rstd * mean_q
    tl.store(matrix_ptr + row * F_PAD + f, matrix)
    tl.store(shift_ptr + row, shift.to(tl.float32))
    tl.store(rstd_ptr + row, rstd.to(tl.float32))


@triton.jit
def _load_matrix(matrix_ptr, o, C: tl.constexpr, F_PAD: tl.constexpr):
    """matrix^T [F_PAD, BLOCK_O]"""
    f = tl.arange(0, F_PAD)
    return tl.load(matrix_ptr + o[None, :] * F_PAD + f[:, None], mask=(o < C)[None, :], other=0.0)


@triton.jit
def _fwd_kernel(
    images_ptr, matrix_ptr, shift_ptr, y_ptr, n_positions,
    C: tl.constexpr, ACT: tl.constexpr, EXACT: tl.constexpr, UINT8: tl.constexpr,
    H: tl.constexpr, W: tl.constexpr, C_IN: tl.constexpr, K: tl.constexpr, F_PAD: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """y [positions, C] = act(q matrix^T + shift)."""
    o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    matrix = _load_matrix(matrix_ptr, o, C, F_PAD)
    shift = tl.load(shift_ptr + o, mask=o < C, other=0.0)
    start = tl.program_id(0) * BLOCK_P
    lane = tl.arange(0, BLOCK_P)
    q = load_patches(images_ptr, start + lane, n_positions, UINT8, H, W, C_IN, K, F_PAD)
    y = activate(project_patches(q, matrix, EXACT) + shift[None, :], ACT)
    mask = (start + lane < n_positions)[:, None] & (o < C)[None, :]
    out = y_ptr + tl.cast(start, tl.int64) * C
    tl.store(out + lane[:, None] * C + o[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _bwd_kernel(
    dy_ptr, images_ptr, matrix_ptr, shift_ptr, partial_ptr, n_positions,
    C: tl.constexpr, ACT: tl.constexpr, EXACT: tl.constexpr, UINT8: tl.constexpr,
    H: tl.constexpr, W: tl.constexpr, C_IN: tl.constexpr, K: tl.constexpr, F_PAD: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """Per program: G = sum g q^T, [C, F_PAD]; the constant feature makes its column F the sum of g."""
    o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    f = tl.arange(0, F_PAD)
    lane = tl.arange(0, BLOCK_P)
    matrix = _load_matrix(matrix_ptr, o, C, F_PAD)
    shift = tl.load(shift_ptr + o, mask=o < C, other=0.0)
    acc = tl.zeros([BLOCK_O, F_PAD], dtype=tl.float32)
    for start in range(tl.program_id(0) * BLOCK_P, n_positions, tl.num_programs(0) * BLOCK_P):
        q = load_patches(images_ptr, start + lane, n_positions, UINT8, H, W, C_IN, K, F_PAD)
        mask = (start + lane < n_positions)[:, None] & (o < C)[None, :]
        dy = dy_ptr + tl.cast(start, tl.int64) * C
        g = tl.load(dy + lane[:, None] * C + o[None, :], mask=mask, other=0.0).to(tl.float32)
        g *= activate_grad(project_patches(q, matrix, EXACT) + shift[None, :], ACT)
        acc += correlate_patches(tl.where(mask, g, 0.0), q, EXACT)
    out = partial_ptr + tl.program_id(0) * C * F_PAD
    tl.store(out + o[:, None] * F_PAD + f[None, :], acc, mask=(o < C)[:, None])


@triton.jit
def _bwd_finish_kernel(
    partial_ptr, moments_ptr, project_ptr, whiten_ptr, mean_ptr, std_ptr, rstd_ptr, dproject_ptr, dbias_ptr,
    n_partials, n_positions,
    C: tl.constexpr, FILTERS: tl.constexpr, TRAINING: tl.constexpr,
    C_IN: tl.constexpr, K: tl.constexpr, F_PAD: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program per output channel: the partials in a fixed order, BatchNorm's correction, dW2 and dbias."""
    features: tl.constexpr = K * K * C_IN
    row = tl.program_id(0)
    f = tl.arange(0, F_PAD)
    acc = tl.zeros([BLOCK_N, F_PAD], dtype=tl.float64)
    for start in range(0, n_partials, BLOCK_N):
        p = start + tl.arange(0, BLOCK_N)
        at = (p[:, None] * C + row) * F_PAD + f[None, :]
        acc += tl.load(partial_ptr + at, mask=(p < n_partials)[:, None], other=0.0).to(tl.float64)
    total = tl.sum(acc, 0)
    sum_g = tl.sum(tl.where(f == features, total, 0.0), 0)
    scale, offset = _pixel_map(mean_ptr, std_ptr, C_IN, K, F_PAD)
    rstd = tl.load(rstd_ptr + row).to(tl.float64)
    if TRAINING:
        w = _row_of_product(project_ptr, whiten_ptr, row, FILTERS, C_IN, K, F_PAD, BLOCK_K)
        n = n_positions.to(tl.float64)
        first, covariance = _patch_moments(moments_ptr, n, features, F_PAD)
        centred = (total - sum_g * first) * scale
        sum_gx = rstd * tl.sum(w * centred, 0)
        cov_w = scale * tl.sum(covariance * (w * scale)[None, :], 1)
        dw = rstd * (centred - (sum_gx * rstd) * cov_w)
    else:
        dw = rstd * (total * scale + sum_g * offset)
    dw = tl.where(f < features, dw, 0.0)
    for start in range(0, FILTERS, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        mask = (k < FILTERS)[:, None] & (f < features)[None, :]
        at = k[:, None] * features + weight_offset(f, C_IN, K)[None, :]
        w1 = tl.load(whiten_ptr + at, mask=mask, other=0.0).to(tl.float64)
        tl.store(dproject_ptr + row * FILTERS + k, tl.sum(w1 * dw[None, :], 1).to(tl.float32), mask=k < FILTERS)
    tl.store(dbias_ptr + row, sum_g.to(tl.float32))


def _tile(images: Tensor, channels: int, shape: PatchShape, out_dtype: torch.dtype, backward: bool) -> dict:
    exact = needs_float32(images, out_dtype)
    return dict(C=channels, EXACT=exact, **tile_sizes(shape, channels, exact, backward), **shape.constexprs)


def _finish_sizes(project_weight: Tensor, shape: PatchShape) -> dict:
    filters = project_weight.shape[1]
    sizes = {key: shape.constexprs[key] for key in ("C_IN", "K", "F_PAD")}
    # a warp for each 16 features keeps the float64 matrices in registers
    return dict(
        FILTERS=filters,
        BLOCK_K=min(32, triton.next_power_of_2(filters)),
        num_warps=min(8, max(1, shape.f_pad // 16) ** 2),
        **sizes,
    )


@opaque_op("whiten_project_norm_act_fwd", mutates=("running_mean", "running_var"))
def _fwd(
    images: Tensor,
    whiten_weight: Tensor,
    project_weight: Tensor,
    bias: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    mean: Tensor,
    std: Tensor,
    training: bool,
    momentum: float,
    eps: float,
    activation: str,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(y, integer moments [F_PAD, F_PAD], matrix [C, F_PAD], shift [C], rstd [C])"""
    channels = project_weight.shape[0]
    shape = PatchShape(images, whiten_weight.shape[2])
    fp32 = dict(dtype=torch.float32, device=images.device)
    moments = torch.zeros(shape.f_pad, shape.f_pad, dtype=torch.int64, device=images.device)
    if training:
        programs = min(triton.cdiv(shape.positions, _EXACT_POSITIONS), _PROGRAMS)
        launch(
            _moments_kernel, (programs,), images, moments, shape.positions,
            BLOCK_P=_MOMENT_BLOCK, CHUNK=_EXACT_POSITIONS, **shape.constexprs,
        )  # fmt: skip
    matrix = torch.empty(channels, shape.f_pad, **fp32)
    shift, rstd = torch.empty(channels, **fp32), torch.empty(channels, **fp32)
    tracked = running_mean is not None
    launch(
        _finish_kernel, (channels,), moments, project_weight, whiten_weight, bias, mean, std,
        running_mean if tracked else rstd, running_var if tracked else rstd, matrix, shift, rstd,
        shape.positions, momentum, 1 - momentum, eps, TRAINING=training, HAS_RUNNING=tracked,
        **_finish_sizes(project_weight, shape),
    )  # fmt: skip
    y = channels_last_like(images, channels, shape.height, shape.width, dtype)
    tile = _tile(images, channels, shape, dtype, backward=False)
    grid = (triton.cdiv(shape.positions, tile["BLOCK_P"]), triton.cdiv(channels, tile["BLOCK_O"]))
    launch(_fwd_kernel, grid, images, matrix, shift, y, shape.positions, ACT=activation, **tile)
    return y, moments, matrix, shift, rstd


@_fwd.register_fake
def _(
    images, whiten_weight, project_weight, bias, running_mean, running_var, mean, std, training, momentum, eps,
    activation, dtype,
):  # fmt: skip
    channels, device = project_weight.shape[0], images.device
    shape = PatchShape(images, whiten_weight.shape[2])
    y = channels_last_like(images, channels, shape.height, shape.width, dtype)
    moments = torch.empty(shape.f_pad, shape.f_pad, dtype=torch.int64, device=device)
    matrix = torch.empty(channels, shape.f_pad, dtype=torch.float32, device=device)
    shift = torch.empty(channels, dtype=torch.float32, device=device)
    return y, moments, matrix, shift, torch.empty_like(shift)


@opaque_op("whiten_project_norm_act_bwd")
def _bwd(
    dy: Tensor,
    images: Tensor,
    whiten_weight: Tensor,
    project_weight: Tensor,
    mean: Tensor,
    std: Tensor,
    moments: Tensor,
    matrix: Tensor,
    shift: Tensor,
    rstd: Tensor,
    training: bool,
    activation: str,
) -> tuple[Tensor, Tensor]:
    """(dproject [C, K] float32, dbias [C] float32)"""
    channels, filters = project_weight.shape
    shape = PatchShape(images, whiten_weight.shape[2])
    fp32 = dict(dtype=torch.float32, device=images.device)
    tile = _tile(images, channels, shape, dy.dtype, backward=True)
    programs = min(triton.cdiv(shape.positions, tile["BLOCK_P"]), _PROGRAMS)
    partials = torch.empty(programs, channels, shape.f_pad, **fp32)
    launch(
        _bwd_kernel, (programs, triton.cdiv(channels, tile["BLOCK_O"])), dy, images, matrix, shift, partials,
        shape.positions, ACT=activation, **tile,
    )  # fmt: skip
    dproject, dbias = torch.empty(channels, filters, **fp32), torch.empty(channels, **fp32)
    launch(
        _bwd_finish_kernel, (channels,), partials, moments, project_weight, whiten_weight, mean, std, rstd, dproject,
        dbias, programs, shape.positions, C=channels, TRAINING=training, BLOCK_N=32,
        **_finish_sizes(project_weight, shape),
    )  # fmt: skip
    return dproject, dbias


@_bwd.register_fake
def _(dy, images, whiten_weight, project_weight, mean, std, moments, matrix, shift, rstd, training, activation):
    dproject = torch.empty(project_weight.shape, dtype=torch.float32, device=images.device)
    return dproject, torch.empty(project_weight.shape[0], dtype=torch.float32, device=images.device)


class WhitenProjectNormAct(torch.autograd.Function):
    """Saved for backward: the uint8 images and tensors of at most [C, F_PAD]; no activation."""

    @staticmethod
    def forward(
        ctx, images, whiten_weight, project_weight, bias, running_mean, running_var, mean, std, training, momentum,
        eps, activation, dtype,
    ):  # fmt: skip
        flat = project_weight.reshape(project_weight.shape[0], -1)
        y, *tables = _fwd(
            images, whiten_weight, flat, bias, running_mean, running_var, mean, std, training, momentum, eps,
            activation, dtype,
        )  # fmt: skip
        ctx.save_for_backward(images, whiten_weight, project_weight, mean, std, *tables)
        ctx.training, ctx.activation, ctx.bias_dtype = training, activation, bias.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        images, whiten_weight, project_weight, *rest = ctx.saved_tensors
        flat = project_weight.reshape(project_weight.shape[0], -1)
        dy = dy.contiguous(memory_format=torch.channels_last)
        dproject, dbias = _bwd(dy, images, whiten_weight, flat, *rest, ctx.training, ctx.activation)
        needs_project, needs_bias = ctx.needs_input_grad[2:4]
        return (
            None,
            None,
            dproject.view(project_weight.shape).to(project_weight.dtype) if needs_project else None,
            dbias.to(ctx.bias_dtype) if needs_bias else None,
            *[None] * 9,
        )


def whiten_project_norm_act(
    images: Tensor,
    whiten_weight: Tensor,
    project_weight: Tensor,
    bias: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    *,
    mean: Tensor,
    std: Tensor,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str | None = "gelu",
    dtype: torch.dtype | None = None,
) -> Tensor:
    """act(batch_norm(project(whiten((images / 255 - mean) / std))) + bias), unpadded, BatchNorm scale fixed at 1.

    images: [B, C_in, H, W] uint8, channels_last.
    whiten_weight: [K, C_in, k, k] floating, contiguous, frozen.
    project_weight: [C, K] or [C, K, 1, 1] floating, trainable.
    bias: [C] floating, trainable (BatchNorm's).
    running_mean, running_var: [C] float32, or both None; updated in training, used in evaluation, as BatchNorm2d does.
    mean, std: [C_in] float32 in units of 0..1.
    activation: "gelu" (erf), "silu", "relu" or None.
    dtype: of the result; by default autocast's if it is on, else project_weight's.
    Returns [B, C, H - k + 1, W - k + 1], channels_last. Batch statistics are exact (integers, finished in float64).

    Backward, with G = sum g q^T, D = 1 / (255 std), Gc = (G - sum(g) m_q^T) D and gx = r rowsum(W * Gc):
        dW = r (Gc - gx r (W Cov))      dproject = dW whiten^T      dbias = sum(g)
    Saved: images (uint8), the integer moments, the folded matrix and shift, rstd. Deterministic. Differentiable once.

    Raises ValueError for a wrong shape, layout or activation, an empty batch, one value per channel in training, or a
    whitening weight that requires a gradient; TypeError for a wrong dtype; RuntimeError where the kernels cannot run.
    """
    op = "whiten_project_norm_act"
    name = _checks.activation(op, activation)
    _checks.images(op, "images", images, (torch.uint8,))
    check_kernel(op, images, whiten_weight)
    _checks.dtype(op, "whiten_weight", whiten_weight, _checks.FLOATS)
    _checks.dtype(op, "project_weight", project_weight, _checks.FLOATS)
    channels, filters = project_weight.shape[0], whiten_weight.shape[0]
    _checks.shape(op, "project_weight", project_weight, (channels, filters, *(1,) * (project_weight.dim() - 2)))
    _checks.shape(op, "bias", bias, (channels,))
    _checks.dtype(op, "bias", bias, _checks.FLOATS)
    for label, value in (("mean", mean), ("std", std)):
        _checks.shape(op, label, value, (images.shape[1],))
        _checks.dtype(op, label, value, (torch.float32,))
    if whiten_weight.requires_grad:
        raise ValueError(f"{op}: whiten_weight is frozen and gets no gradient; detach it")
    _checks.running_statistics(op, running_mean, running_var, channels, training)
    lost = whiten_weight.shape[2] - 1
    positions = images.shape[0] * (images.shape[2] - lost) * (images.shape[3] - lost)
    _checks.enough_values(op, positions, training)
    _checks.device(op, images, whiten_weight, project_weight, bias, running_mean, running_var, mean, std)
    dtype = output_dtype(op, images, project_weight, dtype)
    return WhitenProjectNormAct.apply(
        images, whiten_weight.contiguous(), project_weight, bias, running_mean, running_var, mean, std, training,
        momentum, eps, name, dtype,
    )  # fmt: skip
