"""First and second moments of image patches, exact, and what the stem computes from them: statistics and gradients.

Patches q = u - 128 have integer moments, summed as integers in any order. Jittered patches a q + e, with e an image's
128 (a - 1) + 255 b, have float64 ones: each image's follow from its integer moments, and images are added in a fixed
order. With the constant feature 1 behind the pixels, one matrix [F_PAD, F_PAD] holds the second moments, row and column
F of it the sums, and entry (F, F) the count.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._batch_statistics import update_running
from ._common import rounded_product, sum_partials
from ._patches import PIXEL_OFFSET, Geometry, PatchSource, jittered_positions, load_jitter, load_patches, weight_offset
from ._synchronized import sharing
from .launching import launch, resident

_MOMENT_BLOCK = 128
_GATHERED_TILE = 2048
# |q| <= 2**7, so a sum over 2**10 positions stays within the 2**24 up to which float32 counts exactly
_CHUNK = tl.constexpr(1024)
_PROGRAMS = 512
_JITTERED_IMAGES = 16
# what the compile report would otherwise report as accesses that are narrower than the layout allows
NARROW_ACCESS = {"_jittered_moments_kernel:gfx942": "64-lane waves share a tile that is sized for 32-lane warps"}


class Weights(NamedTuple):
    """What a projection of whitened patches is made of: project [C, FILTERS], whiten [FILTERS, C_in, k, k], and the
    pixels' mean and std [C_in].
    """

    project: Tensor
    whiten: Tensor
    mean: Tensor
    std: Tensor


class Folded(NamedTuple):
    """z = matrix q + shift, [C, F_PAD] and [C], and 1 / standard deviation [C], float32."""

    matrix: Tensor
    shift: Tensor
    rstd: Tensor


@triton.jit
def _exact_moments(pixels, start, n_positions, G: tl.constexpr, BLOCK_P: tl.constexpr):
    """Sum of q q^T over _CHUNK positions from `start` on: integers, in float32."""
    exact = tl.zeros([G.F_PAD, G.F_PAD], dtype=tl.float32)
    for inner in range(0, _CHUNK, BLOCK_P):
        position = start + inner + tl.arange(0, BLOCK_P)
        q = load_patches(pixels, position, n_positions, G)
        # a maximum of one, which is nothing: operands that come straight from 8 bits Triton reads element by element
        q = tl.max(q[:, :, None], 2).to(tl.float16)
        exact = tl.dot(tl.trans(q), q, acc=exact)
    return exact


@triton.jit
def _moments_kernel(pixels, moments_ptr, n_positions, G: tl.constexpr, BLOCK_P: tl.constexpr):
    """Add sum of q q^T over this program's patches to moments [F_PAD, F_PAD] int64.

    Integer atomics: the order of additions cannot change the result.
    """
    f = tl.arange(0, G.F_PAD)
    total = tl.zeros([G.F_PAD, G.F_PAD], dtype=tl.int64)
    for start in range(tl.program_id(0) * _CHUNK, n_positions, tl.num_programs(0) * _CHUNK):
        total += _exact_moments(pixels, start, n_positions, G, BLOCK_P).to(tl.int64)
    tl.atomic_add(moments_ptr + f[:, None] * G.F_PAD + f[None, :], total)


@triton.jit
def _image_moments_kernel(pixels, moments_ptr, G: tl.constexpr, BLOCK_P: tl.constexpr):
    """One image a program: moments [B, F_PAD, F_PAD] int64 of its patches."""
    out_hw: tl.constexpr = (G.H - G.K + 1) * (G.W - G.K + 1)
    f = tl.arange(0, G.F_PAD)
    first = tl.program_id(0) * out_hw
    total = tl.zeros([G.F_PAD, G.F_PAD], dtype=tl.int64)
    for start in range(first, first + out_hw, _CHUNK):
        total += _exact_moments(pixels, start, first + out_hw, G, BLOCK_P).to(tl.int64)
    at = tl.program_id(0).to(tl.int64) * (G.F_PAD * G.F_PAD) + f[:, None] * G.F_PAD + f[None, :]
    tl.store(moments_ptr + at, total)


@triton.jit
def _jittered_moments_kernel(
    image_moments_ptr, jitter_ptr, partial_ptr, n_images, share, G: tl.constexpr, BLOCK_N: tl.constexpr
):
    """One row of the float64 moments of a q + e a program, summed over `share` images in a fixed order.

    An image's M = sum q q^T, s = sum q and n become a^2 M + a e (s 1^T + 1 s^T) + e^2 n; a = 1, e = 0 for feature F.
    """
    features: tl.constexpr = G.K * G.K * G.C_IN
    row = tl.program_id(0)
    f = tl.arange(0, G.F_PAD)
    pixel = (f < features)[None, :]
    acc = tl.zeros([BLOCK_N, G.F_PAD], dtype=tl.float64)
    part = tl.program_id(1)
    for start in range(part * share, tl.minimum(part * share + share, n_images), BLOCK_N):
        b = start + tl.arange(0, BLOCK_N)
        inside = b < n_images
        contrast, offset = load_jitter(jitter_ptr, b, inside, tl.float64)
        scale, moved = tl.where(pixel, contrast[:, None], 1.0), tl.where(pixel, offset[:, None], 0.0)
        of_image = image_moments_ptr + b.to(tl.int64) * (G.F_PAD * G.F_PAD)
        of_row, of_sums = of_image + row * G.F_PAD, of_image + features * G.F_PAD
        mask = inside[:, None]
        products = tl.load(of_row[:, None] + f[None, :], mask=mask, other=0).to(tl.float64)
        row_sum = tl.load(of_row + features, mask=inside, other=0).to(tl.float64)
        sums = tl.load(of_sums[:, None] + f[None, :], mask=mask, other=0).to(tl.float64)
        count = tl.load(of_sums + features, mask=inside, other=0).to(tl.float64)
        row_scale, row_moved = tl.where(row < features, contrast, 1.0), tl.where(row < features, offset, 0.0)
        acc += row_scale[:, None] * (products * scale + row_sum[:, None] * moved)
        acc += row_moved[:, None] * (sums * scale + count[:, None] * moved)
    tl.store(partial_ptr + (part * G.F_PAD + row) * G.F_PAD + f, tl.sum(acc, 0))


@triton.jit
def _mean_and_covariance(moments_ptr, n, G: tl.constexpr):
    """Mean [F_PAD] and covariance [F_PAD, F_PAD] of q in float64, zero where either feature is padding."""
    features: tl.constexpr = G.K * G.K * G.C_IN
    f = tl.arange(0, G.F_PAD)
    in_f = f < features
    first = tl.load(moments_ptr + features * G.F_PAD + f, mask=in_f, other=0).to(tl.float64) / n
    both = in_f[:, None] & in_f[None, :]
    second = tl.load(moments_ptr + f[:, None] * G.F_PAD + f[None, :], mask=both, other=0).to(tl.float64) / n
    return first, second - first[:, None] * first[None, :]


@triton.jit
def _whitening_rows(weights, k, f, G: tl.constexpr, FILTERS: tl.constexpr):
    """Filters k in float64 [BLOCK_K, F_PAD], features in patch order."""
    features: tl.constexpr = G.K * G.K * G.C_IN
    mask = (k < FILTERS)[:, None] & (f < features)[None, :]
    at = k[:, None] * features + weight_offset(f, G)[None, :]
    return tl.load(weights.whiten + at, mask=mask, other=0.0).to(tl.float64)


@triton.jit
def _row_of_product(weights, row, G: tl.constexpr, FILTERS: tl.constexpr, BLOCK_K: tl.constexpr):
    """Row `row` of W = W2 W1 in float64 [F_PAD], features in patch order."""
    f = tl.arange(0, G.F_PAD)
    out = tl.zeros([G.F_PAD], dtype=tl.float64)
    for start in range(0, FILTERS, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        w2 = tl.load(weights.project + row * FILTERS + k, mask=k < FILTERS, other=0.0).to(tl.float64)
        out += tl.sum(rounded_product(w2[:, None], _whitening_rows(weights, k, f, G, FILTERS)), 0)
    return out


@triton.jit
def _pixel_map(weights, G: tl.constexpr):
    """p = scale * q + offset per feature, float64 [F_PAD]; padding features get scale 0."""
    f = tl.arange(0, G.F_PAD)
    in_f = f < G.K * G.K * G.C_IN
    mean = tl.load(weights.mean + f % G.C_IN, mask=in_f, other=0.0).to(tl.float64)
    std = tl.load(weights.std + f % G.C_IN, mask=in_f, other=1.0).to(tl.float64)
    scale = tl.where(in_f, 1.0 / (std * 255.0), 0.0)
    # 1 / 255 in float32 would cost the constants their last bits
    offset = tl.where(in_f, (-255.0 * mean + PIXEL_OFFSET) * scale, 0.0)
    return scale, offset


@triton.jit
def _finish_kernel(
    moments_ptr, weights, bias_ptr, running, folded, n_positions, eps,
    G: tl.constexpr, FILTERS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program per output channel: z = matrix q + shift, and the running statistics, which stand for the moments
    where there are none.
    """
    row = tl.program_id(0)
    f = tl.arange(0, G.F_PAD)
    w = _row_of_product(weights, row, G, FILTERS, BLOCK_K)
    scale, offset = _pixel_map(weights, G)
    v = w * scale
    constant = tl.sum(rounded_product(w, offset), 0)
    bias = tl.load(bias_ptr + row).to(tl.float64)
    if moments_ptr is not None:
        n = n_positions.to(tl.float64)
        first, covariance = _mean_and_covariance(moments_ptr, n, G)
        var = tl.sum(rounded_product(v, tl.sum(rounded_product(covariance, v[None, :]), 1)), 0)
        var = tl.where(var < 0.0, 0.0, var)
        mean_q = tl.sum(rounded_product(v, first), 0)
        if running is not None:
            update_running(running, row, (mean_q + constant).to(tl.float32), (var * (n / (n - 1.0))).to(tl.float32))
    else:
        mean_q = tl.load(running.mean + row).to(tl.float64) - constant
        var = tl.load(running.var + row).to(tl.float64)
    rstd = 1.0 / tl.sqrt(var + eps)
    matrix = (rstd * v).to(tl.float32)
    if moments_ptr is not None:
        # the mean of the matrix as rounded, so that the rounding does not shift z
        shift = bias - tl.sum(rounded_product(matrix.to(tl.float64), first), 0)
    else:
        shift = bias - rstd * mean_q
    tl.store(folded.matrix + row * G.F_PAD + f, matrix)
    tl.store(folded.shift + row, shift.to(tl.float32))
    tl.store(folded.rstd + row, rstd.to(tl.float32))


@triton.jit
def _bwd_finish_kernel(
    partial_ptr, moments_ptr, weights, rstd_ptr, dproject_ptr, dbias_ptr, n_partials, n_positions,
    C: tl.constexpr, G: tl.constexpr, FILTERS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program per output channel: the partials in a fixed order, BatchNorm's correction where there are moments,
    dW2 and dbias.
    """
    features: tl.constexpr = G.K * G.K * G.C_IN
    row = tl.program_id(0)
    f = tl.arange(0, G.F_PAD)
    acc = tl.zeros([BLOCK_N, G.F_PAD], dtype=tl.float64)
    for start in range(0, n_partials, BLOCK_N):
        p = start + tl.arange(0, BLOCK_N)
        at = (p[:, None] * C + row) * G.F_PAD + f[None, :]
        acc += tl.load(partial_ptr + at, mask=(p < n_partials)[:, None], other=0.0).to(tl.float64)
    total = tl.sum(acc, 0)
    sum_g = tl.sum(tl.where(f == features, total, 0.0), 0)
    scale, offset = _pixel_map(weights, G)
    rstd = tl.load(rstd_ptr + row).to(tl.float64)
    if moments_ptr is not None:
        w = _row_of_product(weights, row, G, FILTERS, BLOCK_K)
        n = n_positions.to(tl.float64)
        first, covariance = _mean_and_covariance(moments_ptr, n, G)
        centred = (total - sum_g * first) * scale
        sum_gx = rstd * tl.sum(rounded_product(w, centred), 0)
        cov_w = scale * tl.sum(rounded_product(covariance, (w * scale)[None, :]), 1)
        dw = rstd * (centred - (sum_gx * rstd) * cov_w)
    else:
        dw = rstd * (total * scale + sum_g * offset)
    dw = tl.where(f < features, dw, 0.0)
    for start in range(0, FILTERS, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        dw2 = tl.sum(rounded_product(_whitening_rows(weights, k, f, G, FILTERS), dw[None, :]), 1)
        tl.store(dproject_ptr + row * FILTERS + k, dw2.to(tl.float32), mask=k < FILTERS)
    tl.store(dbias_ptr + row, sum_g.to(tl.float32))


def _of_any_size(geometry: Geometry) -> Geometry:
    """For kernels that see no image, so that one of each is compiled for all sizes."""
    return geometry._replace(H=0, W=0, CUTOUT=0)


def empty_moments(source: PatchSource) -> Tensor:
    """Uninitialized moments [F_PAD, F_PAD]: int64, or float64 with a jitter."""
    dtype = torch.float64 if source.jittered else torch.int64
    return torch.empty(source.f_pad, source.f_pad, dtype=dtype, device=source.pixels.images.device)


def moments_of(source: PatchSource) -> Tensor:
    """Sum of q q^T over all patches, [F_PAD, F_PAD]: int64, or float64 with a jitter."""
    pixels, geometry = source.pixels, source.geometry
    if not source.jittered:
        moments = empty_moments(source)
        # a gather computes two addresses an element, which take registers
        block = _MOMENT_BLOCK if pixels.index is None else max(16, _GATHERED_TILE // source.f_pad)
        grid = (min(triton.cdiv(source.positions, _CHUNK.value), _PROGRAMS),)
        sizes = dict(G=geometry, BLOCK_P=block, maxnreg=200)
        launch(_moments_kernel, grid, pixels, moments.zero_(), source.positions, **sizes)
        return moments
    device, f_pad = pixels.images.device, source.f_pad
    of_images = torch.empty(source.batch, f_pad, f_pad, dtype=torch.int64, device=device)
    block = jittered_positions(source)
    launch(_image_moments_kernel, (source.batch,), pixels, of_images, G=geometry, BLOCK_P=block)
    # as many parts of the batch as make programs for all processors
    blocks = triton.cdiv(source.batch, _JITTERED_IMAGES)
    share = triton.cdiv(blocks, max(1, resident(device, 1) // f_pad)) * _JITTERED_IMAGES
    parts = triton.cdiv(source.batch, share)
    partials = torch.empty(parts, f_pad, f_pad, dtype=torch.float64, device=device)
    arguments, sizes = (of_images, pixels.jitter, partials, source.batch, share), dict(G=_of_any_size(geometry))
    launch(_jittered_moments_kernel, (f_pad, parts), *arguments, **sizes, BLOCK_N=_JITTERED_IMAGES)
    return partials[0] if parts == 1 else sum_partials(partials.view(parts, -1)).view(f_pad, f_pad)


def moments_of_all(source: PatchSource) -> Tensor:
    """The same of the patches on all ranks whose batches `synchronized` merges; exact too."""
    moments, shared = moments_of(source), sharing()
    return moments if shared is None else shared.summed(moments)


def positions_of_all(source: PatchSource) -> int:
    """How many patches that is."""
    shared = sharing()
    return source.positions if shared is None else shared.of_all(source.positions)


def finish_sizes(project_weight: Tensor, source: PatchSource) -> dict:
    filters = project_weight.shape[1]
    # a warp for each 16 features keeps the float64 matrices in registers
    num_warps = min(8, max(1, source.f_pad // 16) ** 2)
    block = min(32, triton.next_power_of_2(filters))
    return dict(G=_of_any_size(source.geometry), FILTERS=filters, BLOCK_K=block, num_warps=num_warps)
