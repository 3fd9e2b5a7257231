"""k x k image patches as matrix rows, read straight from [B, H, W, C_in] pixels; shared by the whitening ops.

A patch's features run in memory order f = (row, column, channel), so each patch row is one contiguous run. Pixels are
read as q = u - 128, which float16 holds exactly; one more feature is the constant 1, so that a product with the patches
also yields plain sums. With a `Gather` the pixels come from anywhere in a data set.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._checks import FLOATS
from .gather import Gather
from .registry import Argument, Arguments, fp32

# u - 128 fits int8, and float16 exactly
PIXEL_OFFSET = tl.constexpr(128.0)


class Pixels(NamedTuple):
    """Where pixels come from: the images, and a `Gather`'s tensors with the pixel mean that fills a cutout."""

    images: Tensor
    index: Tensor | None
    translation: Tensor | None
    flip: Tensor | None
    cutout: Tensor | None
    mean: Tensor | None
    jitter: Tensor | None


class Geometry(NamedTuple):
    """Images of H x W pixels of C_IN channels, patches of K x K of them, padded to F_PAD features, and the side of a
    cutout's square.
    """

    H: int
    W: int
    C_IN: int
    K: int
    F_PAD: int
    CUTOUT: int


class Tile(NamedTuple):
    """A program's BLOCK_P positions by BLOCK_O of O filters; EXACT: products run in float32."""

    O: int
    EXACT: bool
    BLOCK_P: int
    BLOCK_O: int


@triton.jit
def reflect(v, SIZE: tl.constexpr):
    """gather.reflect; in 0..SIZE - 1 for every |v| up to 2 (SIZE - 1)."""
    return (SIZE - 1) - tl.abs((SIZE - 1) - tl.abs(v))


@triton.jit
def load_clamped(pointer, inside, LOW: tl.constexpr, HIGH: tl.constexpr):
    """An image's translation or corner as int32, clamped before it is narrowed: none reads outside the image.

    inside: a mask, or None.
    """
    other = None if inside is None else 0
    return tl.minimum(tl.maximum(tl.load(pointer, mask=inside, other=other), LOW), HIGH).to(tl.int32)


@triton.jit
def cutout_pixel(mean_ptr, channel):
    """What a cut pixel holds, as q of every channel given; in float64, where 255 * mean is exact and every rounding the
    same.
    """
    mean = tl.load(mean_ptr + channel).to(tl.float64)
    return tl.minimum(tl.maximum(tl.floor(mean * 255.0 + 0.5), 0.0), 255.0).to(tl.float32) - PIXEL_OFFSET


@triton.jit
def load_patches(pixels, position, n_positions, G: tl.constexpr):
    """Patches at flat output positions (b, y, x): float32 [BLOCK_P, F_PAD]; feature F is 1, later ones are 0.

    Rows past n_positions are 0, the constant feature included. With an index, b counts a `Gather`'s images (see there);
    the jitter is left to what takes the patches.
    """
    out_w: tl.constexpr = G.W - G.K + 1
    out_hw: tl.constexpr = (G.H - G.K + 1) * out_w
    features: tl.constexpr = G.K * G.K * G.C_IN
    inside = position < n_positions
    b = position // out_hw
    rest = position - b * out_hw
    y = rest // out_w
    x = rest - y * out_w
    f = tl.arange(0, G.F_PAD)
    mask = inside[:, None] & (f < features)[None, :]
    if pixels.index is not None:
        image = tl.load(pixels.index + b, mask=inside, other=0).to(tl.int64) * (G.H * G.W * G.C_IN)
        patch_row, patch_column = f // (G.K * G.C_IN), f // G.C_IN % G.K
        if pixels.translation is not None:
            down = load_clamped(pixels.translation + 2 * b, inside, 1 - G.H, G.H - 1)
            right = load_clamped(pixels.translation + 2 * b + 1, inside, 1 - G.W, G.W - 1)
        if pixels.flip is not None:
            mirrored = tl.load(pixels.flip + b, mask=inside, other=0) != 0
        if pixels.cutout is not None:
            top = load_clamped(pixels.cutout + 2 * b, inside, -G.CUTOUT, G.H)
            left = load_clamped(pixels.cutout + 2 * b + 1, inside, -G.CUTOUT, G.W)
            cut_rows = tl.zeros([position.shape[0], G.F_PAD], dtype=tl.int1)
            cut_columns = tl.zeros([position.shape[0], G.F_PAD], dtype=tl.int1)
        rows = tl.zeros([position.shape[0], G.F_PAD], dtype=tl.int32)
        columns = tl.zeros([position.shape[0], G.F_PAD], dtype=tl.int32)
        # one value a row and column of the patch, broadcast over its features: cheaper than one an element
        for i in tl.static_range(G.K):
            at_y, at_x = y + i, x + i
            if pixels.cutout is not None:
                in_rows = (at_y >= top) & (at_y < top + G.CUTOUT)
                in_columns = (at_x >= left) & (at_x < left + G.CUTOUT)
            if pixels.flip is not None:
                at_x = tl.where(mirrored, G.W - 1 - at_x, at_x)
            if pixels.translation is not None:
                at_y, at_x = reflect(at_y + down, G.H), reflect(at_x + right, G.W)
            of_row, of_column = (patch_row == i)[None, :], (patch_column == i)[None, :]
            rows = tl.where(of_row, (at_y * (G.W * G.C_IN))[:, None], rows)
            columns = tl.where(of_column, (at_x * G.C_IN)[:, None], columns)
            if pixels.cutout is not None:
                cut_rows = tl.where(of_row, in_rows[:, None], cut_rows)
                cut_columns = tl.where(of_column, in_columns[:, None], cut_columns)
        offset = image[:, None] + (rows + columns + (f % G.C_IN)[None, :])
        pixel = tl.load(pixels.images + offset, mask=mask, other=0)
    else:
        corner = ((b.to(tl.int64) * G.H + y) * G.W + x) * G.C_IN
        # (row, column, channel) -> offset from the patch's corner: rows are W pixels apart, the rest is contiguous
        offset = (f // (G.K * G.C_IN)) * (G.W * G.C_IN) + f % (G.K * G.C_IN)
        pixel = tl.load(pixels.images + corner[:, None] + offset[None, :], mask=mask, other=0)
    q = pixel.to(tl.float32)
    if pixels.images.dtype.element_ty == tl.uint8:
        q -= PIXEL_OFFSET
    if pixels.cutout is not None:
        q = tl.where(cut_rows & cut_columns, cutout_pixel(pixels.mean, f % G.C_IN)[None, :], q)
    one = tl.where(inside[:, None] & (f == features)[None, :], 1.0, 0.0)
    return tl.where(mask, q, one)


@triton.jit
def weight_offset(f, G: tl.constexpr):
    """Where feature f = (row, column, channel) lies in a [C_IN, K, K] filter."""
    return (f % G.C_IN) * (G.K * G.K) + f // G.C_IN


@triton.jit
def split_fp16(x):
    """x = scale * (hi + lo) to about 2^-22 of each column's max |x|, with hi, lo float16, one scale a column.

    Two tensor-core products with an operand that is exact in float16 then replace a float32 one.
    """
    # a power of two: what was 16 bits long stays exact
    scale = (tl.max(tl.abs(x), 0).to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    scale = tl.where(scale > 0, scale, 1.0)
    # so large that lo is no subnormal number, and that sums of products with 128 stay far from float32's end
    unit = x * (4096.0 / scale)[None, :]
    hi = unit.to(tl.float16)
    lo = (unit - hi.to(tl.float32)).to(tl.float16)
    return hi, lo, scale * (1.0 / 4096.0)


@triton.jit
def product_of(q, factors, EXACT: tl.constexpr):
    """q [BLOCK_P, F_PAD] times a float32 matrix, or its two halves: float32, small terms first."""
    if EXACT:
        product = tl.dot(q, factors[0], input_precision="ieee")
    else:
        q16 = q.to(tl.float16)
        product = tl.dot(q16, factors[0], tl.dot(q16, factors[1]))
    return product


@triton.jit
def project_patches(q, matrix, EXACT: tl.constexpr):
    """q [BLOCK_P, F_PAD] times matrix [F_PAD, BLOCK_O], float32.

    EXACT runs float32 products; otherwise q must be exact in float16, and the matrix is split in two float16 halves.
    """
    if EXACT:
        product = product_of(q, (matrix,), EXACT)
    else:
        hi, lo, scale = split_fp16(matrix)
        product = product_of(q, (hi, lo), EXACT) * scale[None, :]
    return product


@triton.jit
def load_jitter(jitter_ptr, b, mask, DTYPE: tl.constexpr = tl.float32):
    """A jittered pixel of image b is contrast * q + offset, in units of q: both 1 and 0 outside the mask."""
    contrast = tl.load(jitter_ptr + 2 * b, mask=mask, other=1.0).to(DTYPE)
    brightness = tl.load(jitter_ptr + 2 * b + 1, mask=mask, other=0.0).to(DTYPE)
    return contrast, (contrast - 1.0) * PIXEL_OFFSET + 255.0 * brightness


@triton.jit
def position_jitter(jitter_ptr, position, n_positions, G: tl.constexpr):
    """The jitter of every position's image, both [BLOCK_P]."""
    return load_jitter(jitter_ptr, position // ((G.H - G.K + 1) * (G.W - G.K + 1)), position < n_positions)


@triton.jit
def filter_patches(q, matrix, constant, jitter_ptr, position, n_positions, EXACT: tl.constexpr, G: tl.constexpr):
    """(jittered q) matrix + constant [BLOCK_P, BLOCK_O] float32; jitter scales the product, so that q stays exact."""
    z = project_patches(q, matrix, EXACT)
    if jitter_ptr is not None:
        contrast, offset = position_jitter(jitter_ptr, position, n_positions, G)
        z = z * contrast[:, None] + offset[:, None] * tl.sum(matrix, 0)[None, :]
    return z + constant[None, :]


@triton.jit
def correlate_patches(g, q, EXACT: tl.constexpr):
    """g^T q: [BLOCK_P, BLOCK_O] and [BLOCK_P, F_PAD] -> [BLOCK_O, F_PAD] float32; precision as project_patches."""
    if EXACT:
        return tl.dot(tl.trans(g), q, input_precision="ieee")
    hi, lo, scale = split_fp16(g)
    q16 = q.to(tl.float16)
    return tl.dot(tl.trans(hi), q16, tl.dot(tl.trans(lo), q16)) * scale[:, None]


class PatchSource:
    """The pixels of every patch kernel, and what it is compiled for."""

    def __init__(self, images: Tensor, kernel_size: int, mean: Tensor | None = None, gather: Gather | None = None):
        batch, channels, height, width = images.shape
        self.batch = batch if gather is None else len(gather.index)
        self.height, self.width = height - kernel_size + 1, width - kernel_size + 1
        self.positions = self.batch * self.height * self.width
        self.f_pad = max(16, triton.next_power_of_2(channels * kernel_size**2 + 1))
        index = translation = flip = cutout = jitter = None
        if gather is not None:
            index, translation, cutout, jitter = gather.index, gather.translation, gather.cutout, gather.jitter
            flip = None if gather.flip is None else gather.flip.view(torch.uint8)
        self.pixels = Pixels(images, index, translation, flip, cutout, mean, jitter)
        cutout_size = 0 if gather is None else gather.cutout_size
        self.geometry = Geometry(height, width, channels, kernel_size, self.f_pad, cutout_size)

    @property
    def jittered(self) -> bool:
        return self.pixels.jitter is not None

    @property
    def bytes(self) -> bool:
        return self.pixels.images.dtype == torch.uint8


def tile_of(source: PatchSource, filters: int, exact: bool, backward: bool) -> Tile:
    """As large as stays in registers on every target.

    What a program holds grows with the features, with float32 products, and with the backward pass's second product.
    """
    block_o = min(32, max(16, triton.next_power_of_2(filters)))
    block_p = 128 // (source.f_pad // 32 or 1)
    if exact or backward:
        block_p //= 2
    return Tile(filters, exact, max(16, block_p), block_o)


def jittered_positions(source: PatchSource) -> int:
    """BLOCK_P where a jitter's own factors or sums, which grow with the square of the features, take registers too."""
    return max(16, 16384 // source.f_pad**2)


def needs_float32(images: Tensor, out_dtype: torch.dtype) -> bool:
    """Whether products run in float32: for float32 results, and for pixels that float16 does not hold exactly."""
    return out_dtype == torch.float32 or images.dtype in (torch.float32, torch.bfloat16)


def output_dtype(op: str, images: Tensor, weight: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """The stated dtype, else the images' if floating, else autocast's if it is on, else the weight's."""
    if dtype is None:
        if images.is_floating_point():
            dtype = images.dtype
        elif torch.is_autocast_enabled(images.device.type):
            dtype = torch.get_autocast_dtype(images.device.type)
        else:
            dtype = weight.dtype
    if dtype not in FLOATS:
        raise TypeError(f"{op}: dtype must be float32, float16 or bfloat16, found {str(dtype).removeprefix('torch.')}")
    return dtype


def patch_arguments(batch: int, height: int, width: int, channels: int, parts: tuple[str, ...] | None) -> dict:
    """The images of a call: as they are, or taken out of twice as many by a `Gather` with these `parts`."""
    if parts is None:
        return {"images": Argument((batch, channels, height, width), torch.uint8)}
    fields = {
        "translation": Argument((batch, 2), torch.int64),
        "flip": Argument((batch,), torch.bool),
        "jitter": fp32(batch, 2),
        "cutout": Argument((batch, 2), torch.int64),
    }
    return {
        "images": Argument((2 * batch, channels, height, width), torch.uint8),
        "gather.index": Argument((batch,), torch.int64),
        **{f"gather.{part}": fields[part] for part in parts},
        **({"gather.cutout_size": max(2, min(height, width) // 4)} if "cutout" in parts else {}),
    }


def pixel_statistics(channels: int) -> Arguments:
    return {"mean": fp32(channels), "std": fp32(channels)}


def patch_counts(arguments: Arguments, weight: str) -> tuple[int, int, int]:
    """What a call reads: values of pixels, patches, and values of a patch, whose filters are this argument."""
    images, (_, channels, kernel, _) = arguments["images"].shape, arguments[weight].shape
    index = arguments.get("gather.index")
    batch, (height, width) = images[0] if index is None else index.shape[0], images[2:]
    positions = batch * (height - kernel + 1) * (width - kernel + 1)
    return batch * channels * height * width, positions, channels * kernel**2
