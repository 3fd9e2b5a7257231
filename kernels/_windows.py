"""Runs of neighbouring positions and the window of pixels that each run's filters see; what `whiten` reads.

RUN positions side by side share most of their pixels. As one matrix row, a window of K x (RUN + K - 1) pixels times a
banded matrix [window, RUN x O] holds each filter once for every position: the pixels are read once for all of them, the
row's results lie side by side in memory, and RUN x 24 columns are whole blocks of 32 where 24 are not.
A tile is ROWS x RUNS x IMAGES matrix rows: whatever depends on an image, a row of pixels or a column of them alone is
computed once for each of these and broadcast. Pixels past an edge are the edge's own, and their results not stored.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ._common import rounded_product
from ._patches import (
    PIXEL_OFFSET,
    PatchSource,
    cutout_pixel,
    load_clamped,
    load_jitter,
    product_of,
    reflect,
    split_fp16,
)

_MOST_FEATURES = 32
_MOST_PARTS = 3


class WindowTile(NamedTuple):
    """ROWS x RUNS x IMAGES runs of RUN positions with O filters each: PARTS blocks of BLOCK_N of the RUN x O columns,
    for windows of F_PAD features; EXACT: products run in float32.
    """

    O: int
    EXACT: bool
    RUN: int
    ROWS: int
    RUNS: int
    IMAGES: int
    F_PAD: int
    BLOCK_N: int
    PARTS: int


class Filters(NamedTuple):
    """weight [O, C_in, k, k] and bias [O] or None, for images normalized by mean and std [C_in], or as they are."""

    weight: Tensor
    bias: Tensor | None
    mean: Tensor | None
    std: Tensor | None


@triton.jit
def fold_filters(filters, n, G: tl.constexpr, T: tl.constexpr):
    """What a window is multiplied with, for columns n = position in the run * O + filter: (factors, scale, c, sums).

    q A^T + c is `scale * product_of(q, factors) + c`; sums [BLOCK_N] are A's over the features.
    """
    span: tl.constexpr = T.RUN + G.K - 1
    f = tl.arange(0, T.F_PAD)
    o, position = n % T.O, n // T.O
    row, column, channel = f // (span * G.C_IN), (f // G.C_IN % span)[:, None] - position[None, :], f % G.C_IN
    used = n < T.RUN * T.O
    mask = (row < G.K)[:, None] & (column >= 0) & (column < G.K) & used[None, :]
    at = (o[None, :] * G.C_IN + channel[:, None]) * (G.K * G.K) + row[:, None] * G.K + column
    w = tl.load(filters.weight + at, mask=mask, other=0.0).to(tl.float32)
    c = tl.zeros(n.shape, dtype=tl.float32)
    if filters.mean is not None:
        mean, std = tl.load(filters.mean + channel), tl.load(filters.std + channel)
        w = w / std[:, None]
        c = tl.sum(rounded_product(w, (-mean + PIXEL_OFFSET / 255.0)[:, None]), 0)
        w = w / 255.0
    if filters.bias is not None:
        c += tl.load(filters.bias + o, mask=used, other=0.0).to(tl.float32)
    sums = tl.sum(w, 0)
    if T.EXACT:
        factors = (w,)
        scale = tl.full(n.shape, 1.0, tl.float32)
    else:
        hi, lo, scale = split_fp16(w)
        factors = (hi, lo)
    return factors, scale, c, sums


@triton.jit
def fold_all(filters, G: tl.constexpr, T: tl.constexpr):
    """`fold_filters` of the program's parts."""
    parts = ()
    for part in tl.static_range(T.PARTS):
        parts += (fold_filters(filters, first_column(part, T) + tl.arange(0, T.BLOCK_N), G, T),)
    return parts


@triton.jit
def first_column(part, T: tl.constexpr):
    return (tl.program_id(1) * T.PARTS + part) * T.BLOCK_N


@triton.jit
def _tile_corner(tile, G: tl.constexpr, T: tl.constexpr):
    """(first image, first row, first run) of a tile: tiles of an image are one after the other."""
    out_w: tl.constexpr = G.W - G.K + 1
    across: tl.constexpr = (out_w + T.RUN * T.RUNS - 1) // (T.RUN * T.RUNS)
    down: tl.constexpr = (G.H - G.K + T.ROWS) // T.ROWS
    rest = tile % (across * down)
    return tile // (across * down) * T.IMAGES, rest // across * T.ROWS, rest % across * T.RUNS


@triton.jit
def load_windows(pixels, tile, n_images, G: tl.constexpr, T: tl.constexpr):
    """The windows of a tile's runs [ROWS * RUNS * IMAGES, F_PAD]: float16 q = u - 128 of bytes, or float32 if EXACT.

    Features run in memory order (row, column, channel); what is past them has no weight, and is finite if they are.
    """
    span: tl.constexpr = T.RUN + G.K - 1
    features: tl.constexpr = G.K * span * G.C_IN
    first_image, first_row, first_run = _tile_corner(tile, G, T)
    image = tl.minimum(first_image + tl.arange(0, T.IMAGES), n_images - 1)
    # axes: row, run, image, feature
    f = tl.arange(0, T.F_PAD)
    row = tl.minimum(first_row + tl.arange(0, T.ROWS), G.H - G.K)[:, None, None, None]
    run = (first_run + tl.arange(0, T.RUNS))[None, :, None, None]
    y = row + tl.minimum(f // (span * G.C_IN), G.K - 1)[None, None, None, :]
    x = tl.minimum(run * T.RUN + (f // G.C_IN % span)[None, None, None, :], G.W - 1)
    if pixels.cutout is not None:
        top = load_clamped(pixels.cutout + 2 * image, None, -G.CUTOUT, G.H)[None, None, :, None]
        left = load_clamped(pixels.cutout + 2 * image + 1, None, -G.CUTOUT, G.W)[None, None, :, None]
        cut = (y >= top) & (y < top + G.CUTOUT) & (x >= left) & (x < left + G.CUTOUT)
    if pixels.flip is not None:
        mirrored = tl.load(pixels.flip + image)[None, None, :, None] != 0
        x = tl.where(mirrored, G.W - 1 - x, x)
    if pixels.translation is not None:
        down = load_clamped(pixels.translation + 2 * image, None, 1 - G.H, G.H - 1)[None, None, :, None]
        right = load_clamped(pixels.translation + 2 * image + 1, None, 1 - G.W, G.W - 1)[None, None, :, None]
        y, x = reflect(y + down, G.H), reflect(x + right, G.W)
    if pixels.index is not None:
        image = tl.load(pixels.index + image)
    start = pixels.images + image.to(tl.int64)[None, None, :, None] * (G.H * G.W * G.C_IN)
    u = tl.load(start + y * (G.W * G.C_IN) + (x * G.C_IN + (f % G.C_IN)[None, None, None, :]))
    if u.dtype == tl.uint8:
        # 1024 + u by its bits: a conversion would take the special functions' unit
        q = (u.to(tl.uint16) | 0x6400).to(tl.float16, bitcast=True) - 1152.0
    else:
        q = tl.where((f < features)[None, None, None, :], u, 0.0)
    if pixels.cutout is not None:
        q = tl.where(cut, cutout_pixel(pixels.mean, f % G.C_IN).to(q.dtype)[None, None, None, :], q)
    q = tl.reshape(q, [T.ROWS * T.RUNS * T.IMAGES, T.F_PAD])
    return q.to(tl.float32) if T.EXACT else q


@triton.jit
def tile_rows(tile, n_images, G: tl.constexpr, T: tl.constexpr):
    """(first image of the tile; of each of its matrix rows: image, offset in a [B, H, W, O] result from the first
    image's start, whether it lies in that, and how many of its columns do, from the left).
    """
    out_h: tl.constexpr = G.H - G.K + 1
    out_w: tl.constexpr = G.W - G.K + 1
    first_image, first_row, first_run = _tile_corner(tile, G, T)
    m = tl.arange(0, T.ROWS * T.RUNS * T.IMAGES)
    i, row, run = m % T.IMAGES, first_row + m // (T.IMAGES * T.RUNS), first_run + m // T.IMAGES % T.RUNS
    offset = ((i * out_h + row) * out_w + run * T.RUN) * T.O
    inside = (first_image + i < n_images) & (row < out_h)
    return first_image, first_image + i, offset, inside, (out_w - run * T.RUN) * T.O


@triton.jit
def filter_windows(q, folded, jitter_ptr, image, n_images, EXACT: tl.constexpr):
    """z of one part [rows, BLOCK_N] float32, for rows of these images."""
    factors, scale, c, sums = folded
    z = product_of(q, factors, EXACT) * scale[None, :]
    if jitter_ptr is not None:
        contrast, offset = load_jitter(jitter_ptr, image, image < n_images)
        z = z * contrast[:, None] + offset[:, None] * sums[None, :]
    return z + c[None, :]


def window_tile(source: PatchSource, filters: int, exact: bool, rows: int) -> tuple[WindowTile, int, int]:
    """(a tile of `rows` matrix rows, fewer if `exact`; how many tiles there are; how many blocks of columns)."""
    channels, kernel = source.geometry.C_IN, source.geometry.K
    run, block = _run_of(filters, channels, kernel) if source.bytes and not exact else (1, 0)
    parts = run * filters // block if block else 1
    block = block or min(32, max(16, triton.next_power_of_2(filters)))
    features = kernel * (run + kernel - 1) * channels
    f_pad = max(16, triton.next_power_of_2(features))
    rows //= (f_pad + 31) // 32
    # what a jitter does to each row takes registers too
    rows = max(16, rows // (2 if exact or source.jittered else 1))
    runs = triton.cdiv(source.width, run)

    def tiles(shape: tuple[int, int, int]) -> int:
        return triton.cdiv(source.height, shape[0]) * triton.cdiv(runs, shape[1])

    powers = [1 << k for k in range(rows.bit_length())]
    shapes = [(r, s, rows // (r * s)) for r in powers for s in powers if r * s <= rows <= 8 * r * s]
    # the least that is computed for nothing, and then the fewest images
    shape = min(shapes, key=lambda s: (tiles(s) / s[2], s[2], -s[1]))
    tile = WindowTile(filters, exact, run, *shape, f_pad, block, parts)
    return tile, tiles(shape) * triton.cdiv(source.batch, shape[2]), triton.cdiv(run * filters, parts * block)


def _run_of(filters: int, channels: int, kernel: int) -> tuple[int, int]:
    """(RUN, BLOCK_N) of the longest run whose columns are whole blocks, few enough to be kept; BLOCK_N 0: none."""
    for run in (4, 2):
        if kernel * (run + kernel - 1) * channels <= _MOST_FEATURES:
            for block in (32, 16):
                if run * filters % block == 0 and run * filters // block <= _MOST_PARTS:
                    return run, block
    return 1, 0
