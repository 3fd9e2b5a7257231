"""First and second moments of image patches, exact, and what the stem computes from them: statistics and gradients.

Patches q = u - 128 have integer moments, summed as integers in any order. Jittered patches a q + e, with e an image's
128 (a - 1) + 255 b, have float64 ones: each image's follow from its integer moments, and images are added in a fixed
order. With the constant feature 1 behind the pixels, one matrix [F_PAD, F_PAD] holds the second moments, row and column
F of it the sums, and entry (F, F) the count.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import rounded_product
from ._patches import PatchSource, jittered_positions, load_patches, weight_offset
from .launching import launch

_MOMENT_BLOCK = 128
_GATHERED_TILE = 2048
# |q| <= 2**7, so a sum of 2**10 products stays within the 2**24 up to which float32 counts exactly
_EXACT_POSITIONS = 1024
_PROGRAMS = 512
# what the compile report would otherwise report as accesses that are narrower than the layout allows
NARROW_ACCESS = {"_jittered_moments_kernel:gfx942": "64-lane waves share a tile that is sized for 32-lane warps"}


@triton.jit
def _exact_moments(
    images_ptr, index_ptr, crop_ptr, flip_ptr, cutout_ptr, mean_ptr, start, n_positions,
    UINT8: tl.constexpr, GATHER: tl.constexpr, CROP: tl.constexpr, FLIP: tl.constexpr, CUTOUT: tl.constexpr,
    H: tl.constexpr, W: tl.constexpr, C_IN: tl.constexpr, K: tl.constexpr, F_PAD: tl.constexpr,
    BLOCK_P: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Sum of q q^T over CHUNK positions from `start` on: integers, in float32."""
    exact = tl.zeros([F_PAD, F_PAD], dtype=tl.float32)
    for inner in range(0, CHUNK, BLOCK_P):
        position = start + inner + tl.arange(0, BLOCK_P)
        q = load_patches(
            images_ptr, index_ptr, crop_ptr, flip_ptr, cutout_ptr, mean_ptr, position, n_positions,
            UINT8, GATHER, CROP, FLIP, CUTOUT, H, W, C_IN, K, F_PAD,
        ).to(tl.float16)  # fmt: skip
        exact = tl.dot(tl.trans(q), q, acc=exact)
    return exact


@triton.jit
def _moments_kernel(
    images_ptr, index_ptr, crop_ptr, flip_ptr, cutout_ptr, mean_ptr, moments_ptr, n_positions,
    UINT8: tl.constexpr, GATHER: tl.constexpr, CROP: tl.constexpr, FLIP: tl.constexpr, CUTOUT: tl.constexpr,
    H: tl.constexpr, W: tl.constexpr, C_IN: tl.constexpr, K: tl.constexpr, F_PAD: tl.constexpr,
    BLOCK_P: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Add sum of q q^T over this program's patches to moments [F_PAD, F_PAD] int64.

    Integer atomics: the order of additions cannot change the result.
    """
    f = tl.arange(0, F_PAD)
    total = tl.zeros([F_PAD, F_PAD], dtype=tl.int64)
    for start in range(tl.program_id(0) * CHUNK, n_positions, tl.num_programs(0) * CHUNK):
        exact = _exact_moments(
            images_ptr, index_ptr, crop_ptr, flip_ptr, cutout_ptr, mean_ptr, start, n_positions,
            UINT8, GATHER, CROP, FLIP, CUTOUT, H, W, C_IN, K, F_PAD, BLOCK_P, CHUNK,
        )  # fmt: skip
        total += exact.to(tl.int64)
    tl.atomic_add(moments_ptr + f[:, None] * F_PAD + f[None, :], total)


@triton.jit
def _image_moments_kernel(
    images_ptr, index_ptr, crop_ptr, flip_ptr, cutout_ptr, mean_ptr, moments_ptr,
    UINT8: tl.constexpr, GATHER: tl.constexpr, CROP: tl.constexpr, FLIP: tl.constexpr, CUTOUT: tl.constexpr,
    H: tl.constexpr, W: tl.constexpr, C_IN: tl.constexpr, K: tl.constexpr, F_PAD: tl.constexpr,
    BLOCK_P: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One image a program: moments [B, F_PAD, F_PAD] int64 of its patches."""
    out_hw: tl.constexpr = (H - K + 1) * (W - K + 1)
    f = tl.arange(0, F_PAD)
    first = tl.program_id(0) * out_hw
    total = tl.zeros([F_PAD, F_PAD], dtype=tl.int64)
    for start in range(first, first + out_hw, CHUNK):
        exact = _exact_moments(
            images_ptr, index_ptr, crop_ptr, flip_ptr, cutout_ptr, mean_ptr, start, first + out_hw,
            UINT8, GATHER, CROP, FLIP, CUTOUT, H, W, C_IN, K, F_PAD, BLOCK_P, CHUNK,
        )  # fmt: skip
        total += exact.to(tl.int64)
    at = tl.program_id(0).to(tl.int64) * (F_PAD * F_PAD) + f[:, None] * F_PAD + f[None, :]
    tl.store(moments_ptr + at, total)


@triton.jit
def _jittered_moments_kernel(
    image_moments_ptr, jitter_ptr, moments_ptr, n_images,
    FEATURES: tl.constexpr, F_PAD: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One row of the float64 moments of a q + e a program, images in a fixed order.

    An image's M = sum q q^T, s = sum q and n become a^2 M + a e (s 1^T + 1 s^T) + e^2 n; a = 1, e = 0 for feature F.
    """
    row = tl.program_id(0)
    f = tl.arange(0, F_PAD)
    pixel = (f < FEATURES)[None, :]
    acc = tl.zeros([BLOCK_N, F_PAD], dtype=tl.float64)
    for start in range(0, n_images, BLOCK_N):
        b = start + tl.arange(0, BLOCK_N)
        inside = b < n_images
        contrast = tl.load(jitter_ptr + 2 * b, mask=inside, other=1.0).to(tl.float64)
        brightness = tl.load(jitter_ptr + 2 * b + 1, mask=inside, other=0.0).to(tl.float64)
        offset = 128.0 * (contrast - 1.0) + 255.0 * brightness
        scale, moved = tl.where(pixel, contrast[:, None], 1.0), tl.where(pixel, offset[:, None], 0.0)
        of_image = image_moments_ptr + b.to(tl.int64) * (F_PAD * F_PAD)
        of_row, of_sums = of_image + row * F_PAD, of_image + FEATURES * F_PAD
        mask = inside[:, None]
        products = tl.load(of_row[:, None] + f[None, :], mask=mask, other=0).to(tl.float64)
        row_sum = tl.load(of_row + FEATURES, mask=inside, other=0).to(tl.float64)
        sums = tl.load(of_sums[:, None] + f[None, :], mask=mask, other=0).to(tl.float64)
        count = tl.load(of_sums + FEATURES, mask=inside, other=0).to(tl.float64)
        row_scale, row_moved = tl.where(row < FEATURES, contrast, 1.0), tl.where(row < FEATURES, offset, 0.0)
        acc += row_scale[:, None] * (products * scale + row_sum[:, None] * moved)
        acc += row_moved[:, None] * (sums * scale + count[:, None] * moved)
    tl.store(moments_ptr + row * F_PAD + f, tl.sum(acc, 0))


@triton.jit
def _mean_and_covariance(moments_ptr, n, FEATURES: tl.constexpr, F_PAD: tl.constexpr):
    """Mean [F_PAD] and covariance [F_PAD, F_PAD] of q in float64, zero where either feature is padding."""
    f = tl.arange(0, F_PAD)
    in_f = f < FEATURES
    first = tl.load(moments_ptr + FEATURES * F_PAD + f, mask=in_f, other=0).to(tl.float64) / n
    both = in_f[:, None] & in_f[None, :]
    second = tl.load(moments_ptr + f[:, None] * F_PAD + f[None, :], mask=both, other=0).to(tl.float64) / n
    return first, second - first[:, None] * first[None, :]


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
        out += tl.sum(rounded_product(w2[:, None], w1), 0)
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
    constant = tl.sum(rounded_product(w, offset), 0)
    bias = tl.load(bias_ptr + row).to(tl.float64)
    if TRAINING:
        n = n_positions.to(tl.float64)
        first, covariance = _mean_and_covariance(moments_ptr, n, features, F_PAD)
        var = tl.sum(rounded_product(v, tl.sum(rounded_product(covariance, v[None, :]), 1)), 0)
        var = tl.where(var < 0.0, 0.0, var)
        mean_q = tl.sum(rounded_product(v, first), 0)
        if HAS_RUNNING:
            old_mean, old_var = tl.load(running_mean_ptr + row), tl.load(running_var_ptr + row)
            # all warps read before one of them overwrites
            tl.debug_barrier()
            tl.store(running_mean_ptr + row, keep * old_mean + momentum * (mean_q + constant).to(tl.float32))
            tl.store(running_var_ptr + row, keep * old_var + momentum * (var * (n / (n - 1.0))).to(tl.float32))
    else:
        mean_q = tl.load(running_mean_ptr + row).to(tl.float64) - constant
        var = tl.load(running_var_ptr + row).to(tl.float64)
    rstd = 1.0 / tl.sqrt(var + eps)
    matrix = (rstd * v).to(tl.float32)
    if TRAINING:
        # the mean of the matrix as rounded, so that the rounding does not shift z
        shift = bias - tl.sum(rounded_product(matrix.to(tl.float64), first), 0)
    else:
        shift = bias - rstd * mean_q
    tl.store(matrix_ptr + row * F_PAD + f, matrix)
    tl.store(shift_ptr + row, shift.to(tl.float32))
    tl.store(rstd_ptr + row, rstd.to(tl.float32))


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
        first, covariance = _mean_and_covariance(moments_ptr, n, features, F_PAD)
        centred = (total - sum_g * first) * scale
        sum_gx = rstd * tl.sum(rounded_product(w, centred), 0)
        cov_w = scale * tl.sum(rounded_product(covariance, (w * scale)[None, :]), 1)
        dw = rstd * (centred - (sum_gx * rstd) * cov_w)
    else:
        dw = rstd * (total * scale + sum_g * offset)
    dw = tl.where(f < features, dw, 0.0)
    for start in range(0, FILTERS, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        mask = (k < FILTERS)[:, None] & (f < features)[None, :]
        at = k[:, None] * features + weight_offset(f, C_IN, K)[None, :]
        w1 = tl.load(whiten_ptr + at, mask=mask, other=0.0).to(tl.float64)
        dw2 = tl.sum(rounded_product(w1, dw[None, :]), 1)
        tl.store(dproject_ptr + row * FILTERS + k, dw2.to(tl.float32), mask=k < FILTERS)
    tl.store(dbias_ptr + row, sum_g.to(tl.float32))


def empty_moments(source: PatchSource) -> Tensor:
    """Uninitialized moments [F_PAD, F_PAD]: int64, or float64 with a jitter."""
    dtype = torch.float64 if source.jittered else torch.int64
    return torch.empty(source.f_pad, source.f_pad, dtype=dtype, device=source.jitter.device)


def patch_moments(source: PatchSource) -> Tensor:
    """Sum of q q^T over all patches, [F_PAD, F_PAD]: int64, or float64 with a jitter."""
    moments = empty_moments(source)
    sizes = dict(CHUNK=_EXACT_POSITIONS, **source.constexprs)
    if not source.jittered:
        # a gather computes two addresses an element, which take registers
        block = max(16, _GATHERED_TILE // source.f_pad) if source.constexprs["GATHER"] else _MOMENT_BLOCK
        programs = min(triton.cdiv(source.positions, _EXACT_POSITIONS), _PROGRAMS)
        launch(
            _moments_kernel, (programs,), *source.pixels, moments.zero_(), source.positions, BLOCK_P=block, maxnreg=200,
            **sizes,
        )  # fmt: skip
        return moments
    of_images = torch.empty(source.batch, *moments.shape, dtype=torch.int64, device=moments.device)
    launch(
        _image_moments_kernel, (source.batch,), *source.pixels, of_images, BLOCK_P=jittered_positions(source), **sizes
    )
    launch(
        _jittered_moments_kernel, (source.f_pad,), of_images, source.jitter, moments, source.batch,
        FEATURES=source.features, F_PAD=source.f_pad, BLOCK_N=16,
    )  # fmt: skip
    return moments


def finish_sizes(project_weight: Tensor, source: PatchSource) -> dict:
    filters = project_weight.shape[1]
    sizes = {key: source.constexprs[key] for key in ("C_IN", "K", "F_PAD")}
    # a warp for each 16 features keeps the float64 matrices in registers
    return dict(
        FILTERS=filters,
        BLOCK_K=min(32, triton.next_power_of_2(filters)),
        num_warps=min(8, max(1, source.f_pad // 16) ** 2),
        **sizes,
    )
