"""k x k image patches as matrix rows, read straight from [B, H, W, C_in] pixels; shared by the whitening ops.

A patch's features run in memory order f = (row, column, channel), so each patch row is one contiguous run. Pixels are
read as q = u - 128, which float16 holds exactly; one more feature is the constant 1, so that a product with the patches
also yields plain sums. With a `Gather` the pixels come from anywhere in a data set.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._checks import FLOATS
from ._common import split_fp16
from .gather import Gather

PIXEL_SHIFT = 128


@triton.jit
def _reflect(v, SIZE: tl.constexpr):
    """gather.reflect; in 0..SIZE - 1 for every |v| up to 2 (SIZE - 1)."""
    return (SIZE - 1) - tl.abs((SIZE - 1) - tl.abs(v))


@triton.jit
def _load_clamped(pointer, inside, LOW: tl.constexpr, HIGH: tl.constexpr):
    """An image's shift or corner as int32, clamped before it is narrowed, so that no value reads outside the image."""
    return tl.minimum(tl.maximum(tl.load(pointer, mask=inside, other=0), LOW), HIGH).to(tl.int32)


@triton.jit
def _cutout_pixel(mean_ptr, C_IN: tl.constexpr, F_PAD: tl.constexpr):
    """What a cut pixel holds, as q [F_PAD]; in float64, where 255 * mean is exact and every rounding the same."""
    mean = tl.load(mean_ptr + tl.arange(0, F_PAD) % C_IN).to(tl.float64)
    return tl.minimum(tl.maximum(tl.floor(mean * 255.0 + 0.5), 0.0), 255.0).to(tl.float32) - 128.0


@triton.jit
def load_patches(
    images_ptr, index_ptr, crop_ptr, flip_ptr, cutout_ptr, mean_ptr, position, n_positions,
    UINT8: tl.constexpr, GATHER: tl.constexpr, CROP: tl.constexpr, FLIP: tl.constexpr, CUTOUT: tl.constexpr,
    H: tl.constexpr, W: tl.constexpr, C_IN: tl.constexpr, K: tl.constexpr, F_PAD: tl.constexpr,
):  # fmt: skip
    """Patches at flat output positions (b, y, x): float32 [BLOCK_P, F_PAD]; feature F is 1, later ones are 0.

    Rows past n_positions are 0, the constant feature included. With GATHER, b counts a `Gather`'s images (see there)
    and CUTOUT is the square's size, 0 for none; the jitter is left to what takes the patches.
    """
    out_w: tl.constexpr = W - K + 1
    out_hw: tl.constexpr = (H - K + 1) * out_w
    features: tl.constexpr = K * K * C_IN
    inside = position < n_positions
    b = position // out_hw
    rest = position - b * out_hw
    y = rest // out_w
    x = rest - y * out_w
    f = tl.arange(0, F_PAD)
    mask = inside[:, None] & (f < features)[None, :]
    if GATHER:
        image = tl.load(index_ptr + b, mask=inside, other=0).to(tl.int64) * (H * W * C_IN)
        patch_row, patch_column = f // (K * C_IN), f // C_IN % K
        if CROP:
            down = _load_clamped(crop_ptr + 2 * b, inside, 1 - H, H - 1)
            right = _load_clamped(crop_ptr + 2 * b + 1, inside, 1 - W, W - 1)
        if FLIP:
            mirrored = tl.load(flip_ptr + b, mask=inside, other=0) != 0
        if CUTOUT:
            top = _load_clamped(cutout_ptr + 2 * b, inside, -CUTOUT, H)
            left = _load_clamped(cutout_ptr + 2 * b + 1, inside, -CUTOUT, W)
            cut_rows = tl.zeros([position.shape[0], F_PAD], dtype=tl.int1)
            cut_columns = tl.zeros([position.shape[0], F_PAD], dtype=tl.int1)
        rows = tl.zeros([position.shape[0], F_PAD], dtype=tl.int32)
        columns = tl.zeros([position.shape[0], F_PAD], dtype=tl.int32)
        # one value a row and column of the patch, broadcast over its features: cheaper than one an element
        for i in tl.static_range(K):
            at_y, at_x = y + i, x + i
            if CUTOUT:
                in_rows = (at_y >= top) & (at_y < top + CUTOUT)
                in_columns = (at_x >= left) & (at_x < left + CUTOUT)
            if FLIP:
                at_x = tl.where(mirrored, W - 1 - at_x, at_x)
            if CROP:
                at_y, at_x = _reflect(at_y + down, H), _reflect(at_x + right, W)
            of_row, of_column = (patch_row == i)[None, :], (patch_column == i)[None, :]
            rows = tl.where(of_row, (at_y * (W * C_IN))[:, None], rows)
            columns = tl.where(of_column, (at_x * C_IN)[:, None], columns)
            if CUTOUT:
                cut_rows = tl.where(of_row, in_rows[:, None], cut_rows)
                cut_columns = tl.where(of_column, in_columns[:, None], cut_columns)
        offset = image[:, None] + (rows + columns + (f % C_IN)[None, :])
        pixel = tl.load(images_ptr + offset, mask=mask, other=0)
    else:
        corner = ((b.to(tl.int64) * H + y) * W + x) * C_IN
        # (row, column, channel) -> offset from the patch's corner: rows are W pixels apart, the rest is contiguous
        offset = (f // (K * C_IN)) * (W * C_IN) + f % (K * C_IN)
        pixel = tl.load(images_ptr + corner[:, None] + offset[None, :], mask=mask, other=0)
    if UINT8:
        q = pixel.to(tl.float32) - 128.0
    else:
        q = pixel.to(tl.float32)
    if CUTOUT:
        q = tl.where(cut_rows & cut_columns, _cutout_pixel(mean_ptr, C_IN, F_PAD)[None, :], q)
    one = tl.where(inside[:, None] & (f == features)[None, :], 1.0, 0.0)
    return tl.where(mask, q, one)


@triton.jit
def weight_offset(f, C_IN: tl.constexpr, K: tl.constexpr):
    """Where feature f = (row, column, channel) lies in a [C_IN, K, K] filter."""
    return (f % C_IN) * (K * K) + f // C_IN


@triton.jit
def project_patches(q, matrix, EXACT: tl.constexpr):
    """q [BLOCK_P, F_PAD] times matrix [F_PAD, BLOCK_O], float32.

    EXACT runs float32 products; otherwise q must be exact in float16, and the matrix is split in two float16 halves.
    """
    if EXACT:
        return tl.dot(q, matrix, input_precision="ieee")
    hi, lo, scale = split_fp16(matrix)
    q16 = q.to(tl.float16)
    return (tl.dot(q16, hi) + tl.dot(q16, lo) * (1.0 / 2048.0)) * scale[None, :]


@triton.jit
def load_jitter(
    jitter_ptr, position, n_positions, H: tl.constexpr, W: tl.constexpr, K: tl.constexpr
):  # fmt: skip
    """A jittered pixel is contrast * q + offset, in units of q: both [BLOCK_P] float32, 1 and 0 past n_positions."""
    b = position // ((H - K + 1) * (W - K + 1))
    inside = position < n_positions
    contrast = tl.load(jitter_ptr + 2 * b, mask=inside, other=1.0)
    brightness = tl.load(jitter_ptr + 2 * b + 1, mask=inside, other=0.0)
    return contrast, 128.0 * (contrast - 1.0) + 255.0 * brightness


@triton.jit
def filter_patches(
    q, matrix, constant, jitter_ptr, position, n_positions, EXACT: tl.constexpr, JITTER: tl.constexpr,
    H: tl.constexpr, W: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """(jittered q) matrix + constant [BLOCK_P, BLOCK_O] float32; jitter scales the product, so that q stays exact."""
    z = project_patches(q, matrix, EXACT)
    if JITTER:
        contrast, offset = load_jitter(jitter_ptr, position, n_positions, H, W, K)
        z = z * contrast[:, None] + offset[:, None] * tl.sum(matrix, 0)[None, :]
    return z + constant[None, :]


@triton.jit
def correlate_patches(g, q, EXACT: tl.constexpr):
    """g^T q: [BLOCK_P, BLOCK_O] and [BLOCK_P, F_PAD] -> [BLOCK_O, F_PAD] float32; precision as project_patches."""
    if EXACT:
        return tl.dot(tl.trans(g), q, input_precision="ieee")
    hi, lo, scale = split_fp16(g)
    q16 = q.to(tl.float16)
    return (tl.dot(tl.trans(hi), q16) + tl.dot(tl.trans(lo), q16) * (1.0 / 2048.0)) * scale[:, None]


class PatchSource:
    """Where patches come from: the pixel arguments of every patch kernel, and the sizes it is compiled for."""

    def __init__(self, images: Tensor, kernel_size: int, mean: Tensor | None = None, gather: Gather | None = None):
        batch, channels, height, width = images.shape
        self.batch = batch if gather is None else len(gather.index)
        self.height, self.width = height - kernel_size + 1, width - kernel_size + 1
        self.positions = self.batch * self.height * self.width
        self.features = channels * kernel_size**2
        self.f_pad = max(16, triton.next_power_of_2(self.features + 1))
        index = crop = flip = cutout = jitter = None
        if gather is not None:
            index, crop, cutout, jitter = gather.index, gather.shift, gather.cutout, gather.jitter
            flip = None if gather.flip is None else gather.flip.view(torch.uint8)

        def pointer(tensor: Tensor | None) -> Tensor:
            # the images stand for what a kernel is compiled not to read
            return images if tensor is None else tensor

        self.pixels = [images, *map(pointer, (index, crop, flip, cutout, mean))]
        self.jitter, self.jittered = pointer(jitter), jitter is not None
        self.constexprs = dict(
            UINT8=images.dtype == torch.uint8, H=height, W=width, C_IN=channels, K=kernel_size, F_PAD=self.f_pad,
            GATHER=index is not None, CROP=crop is not None, FLIP=flip is not None,
            CUTOUT=gather.cutout_size if cutout is not None else 0,
        )  # fmt: skip


def tile_sizes(source: PatchSource, filters: int, exact: bool, backward: bool) -> dict[str, int]:
    """BLOCK_P positions by BLOCK_O filters a program: as large as stays in registers on every target.

    What a program holds grows with the features, with float32 products, and with the backward pass's second product.
    """
    block_o = min(32, max(16, triton.next_power_of_2(filters)))
    block_p = 128 // (source.f_pad // 32 or 1)
    if exact or backward:
        block_p //= 2
    return {"BLOCK_P": max(16, block_p), "BLOCK_O": block_o}


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
