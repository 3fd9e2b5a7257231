"""k x k image patches as matrix rows, read straight from [B, H, W, C_in] pixels; shared by the whitening ops.

A patch's features run in memory order f = (row, column, channel), so each patch row is one contiguous run. Pixels are
read as q = u - 128, which float16 holds exactly; one more feature is the constant 1, so that a product with the patches
also yields plain sums.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._checks import FLOATS
from ._common import split_fp16

PIXEL_SHIFT = 128


@triton.jit
def load_patches(
    images_ptr, position, n_positions, UINT8: tl.constexpr,
    H: tl.constexpr, W: tl.constexpr, C_IN: tl.constexpr, K: tl.constexpr, F_PAD: tl.constexpr,
):  # fmt: skip
    """Patches at flat output positions (b, y, x): float32 [BLOCK_P, F_PAD]; feature F is 1, later ones are 0.

    Rows past n_positions are 0, the constant feature included.
    """
    out_w: tl.constexpr = W - K + 1
    out_hw: tl.constexpr = (H - K + 1) * out_w
    features: tl.constexpr = K * K * C_IN
    inside = position < n_positions
    b = position // out_hw
    rest = position - b * out_hw
    y = rest // out_w
    x = rest - y * out_w
    corner = ((b.to(tl.int64) * H + y) * W + x) * C_IN
    f = tl.arange(0, F_PAD)
    # (row, column, channel) -> offset from the patch's corner: rows are W pixels apart, the rest is contiguous
    offset = (f // (K * C_IN)) * (W * C_IN) + f % (K * C_IN)
    mask = inside[:, None] & (f < features)[None, :]
    pixel = tl.load(images_ptr + corner[:, None] + offset[None, :], mask=mask, other=0)
    if UINT8:
        q = pixel.to(tl.float32) - 128.0
    else:
        q = pixel.to(tl.float32)
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
def correlate_patches(g, q, EXACT: tl.constexpr):
    """g^T q: [BLOCK_P, BLOCK_O] and [BLOCK_P, F_PAD] -> [BLOCK_O, F_PAD] float32; precision as project_patches."""
    if EXACT:
        return tl.dot(tl.trans(g), q, input_precision="ieee")
    hi, lo, scale = split_fp16(g)
    q16 = q.to(tl.float16)
    return (tl.dot(tl.trans(hi), q16) + tl.dot(tl.trans(lo), q16) * (1.0 / 2048.0)) * scale[:, None]


class PatchShape:
    """The sizes every patch kernel is compiled for."""

    def __init__(self, images: Tensor, kernel_size: int):
        batch, channels, height, width = images.shape
        self.height, self.width = height - kernel_size + 1, width - kernel_size + 1
        self.positions = batch * self.height * self.width
        self.features = channels * kernel_size**2
        self.f_pad = max(16, triton.next_power_of_2(self.features + 1))
        self.constexprs = dict(
            UINT8=images.dtype == torch.uint8, H=height, W=width, C_IN=channels, K=kernel_size, F_PAD=self.f_pad
        )


def tile_sizes(shape: PatchShape, filters: int, exact: bool, backward: bool) -> dict[str, int]:
    """BLOCK_P positions by BLOCK_O filters a program: as large as stays in registers on every target.

    What a program holds grows with the features, with float32 products, and with the backward pass's second product.
    """
    block_o = min(32, max(16, triton.next_power_of_2(filters)))
    block_p = 128 // (shape.f_pad // 32 or 1)
    if exact or backward:
        block_p //= 2
    return {"BLOCK_P": max(16, block_p), "BLOCK_O": block_o}


def check_kernel(op: str, images: Tensor, weight: Tensor) -> None:
    """weight [O, C_in, k, k] contiguous, and the image at least k x k."""
    if weight.dim() != 4 or weight.shape[1] != images.shape[1] or weight.shape[2] != weight.shape[3]:
        raise ValueError(
            f"{op}: weight must be [O, {images.shape[1]}, k, k] for these images, found {list(weight.shape)}"
        )
    if min(images.shape[2:]) < weight.shape[2]:
        raise ValueError(
            f"{op}: images of {images.shape[2]}x{images.shape[3]} hold no {weight.shape[2]}x{weight.shape[2]} patch"
        )


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
