"""Whitening convolution, fused: uint8 pixels -> normalization -> frozen unpadded k x k filters -> bias -> activation.

    z = sum_f w_f * (u_f / 255 - mean) / std + bias = A (u - 128) + c          y = act(z)

A = w / (255 std) and c = bias + sum_f w_f (128 / 255 - mean) / std are folded inside the kernel: the image is read once
as bytes and y is written once; no normalized image exists. With a `Gather` the bytes come straight from the data set,
and its jitter (contrast a, brightness b) leaves them as they are: z = a A (u - 128) + e rowsum(A) + c with
e = 128 (a - 1) + 255 b. The fold holds only without padding. Source of the layer: hlb-CIFAR10 (2x2, unpadded, frozen).
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _checks, _options
from ._common import channels_last_like, rounded_product, sum_partials
from ._patches import (
    PIXEL_OFFSET,
    PatchSource,
    Tile,
    filter_patches,
    load_patches,
    needs_float32,
    output_dtype,
    patch_arguments,
    patch_counts,
    pixel_statistics,
    tile_of,
    weight_offset,
)
from .activations import ACTIVATIONS, identity_backward
from .differentiation import differentiable_once
from .gather import PARTS, Gather, unflatten
from .launching import launch, opaque_op
from .registry import Arguments, Cost, fp32, op

_BWD_PROGRAMS = 512
# what the compile report would otherwise report as stores that are narrower than the layout allows
NARROW_ACCESS = {"_fwd_kernel:gfx942": "a lane of an mfma result holds 4 channels, which it stores as 8 bytes"}


class _Filters(NamedTuple):
    """weight [O, C_in, k, k] and bias [O] or None, for images normalized by std [C_in], or as they are for None."""

    weight: Tensor
    bias: Tensor | None
    std: Tensor | None


@triton.jit
def _folded(filters, mean_ptr, o, G: tl.constexpr, O: tl.constexpr):
    """A^T [F_PAD, BLOCK_O] and c [BLOCK_O], float32."""
    features: tl.constexpr = G.K * G.K * G.C_IN
    f = tl.arange(0, G.F_PAD)
    in_f = f < features
    mask = in_f[:, None] & (o < O)[None, :]
    at = o[None, :] * features + weight_offset(f, G)[:, None]
    w = tl.load(filters.weight + at, mask=mask, other=0.0).to(tl.float32)
    c = tl.zeros(o.shape, dtype=tl.float32)
    if mean_ptr is not None:
        mean = tl.load(mean_ptr + f % G.C_IN, mask=in_f, other=0.0)
        std = tl.load(filters.std + f % G.C_IN, mask=in_f, other=1.0)
        w = w / std[:, None]
        c = tl.sum(rounded_product(w, (-mean + PIXEL_OFFSET / 255.0)[:, None]), 0)
        w = w / 255.0
    if filters.bias is not None:
        c += tl.load(filters.bias + o, mask=o < O, other=0.0).to(tl.float32)
    return w, c


@triton.jit
def _fwd_kernel(pixels, filters, y_ptr, n_positions, G: tl.constexpr, T: tl.constexpr, ACT: tl.constexpr):
    """y [positions, O] = act(q A^T + c)."""
    o = tl.program_id(1) * T.BLOCK_O + tl.arange(0, T.BLOCK_O)
    matrix, c = _folded(filters, pixels.mean, o, G, T.O)
    start = tl.program_id(0) * T.BLOCK_P
    lane = tl.arange(0, T.BLOCK_P)
    position = start + lane
    q = load_patches(pixels, position, n_positions, G)
    y = ACT(filter_patches(q, matrix, c, pixels.jitter, position, n_positions, T.EXACT, G))
    mask = (position < n_positions)[:, None] & (o < T.O)[None, :]
    out = y_ptr + tl.cast(start, tl.int64) * T.O
    tl.store(out + lane[:, None] * T.O + o[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _bwd_kernel(
    dy_ptr, pixels, filters, partial_ptr, n_positions, G: tl.constexpr, T: tl.constexpr, DACT: tl.constexpr
):
    """Per program and filter: sum of dy * act'(z), z recomputed from the pixels (not read when act is the identity)."""
    o = tl.program_id(1) * T.BLOCK_O + tl.arange(0, T.BLOCK_O)
    if DACT is not identity_backward:
        matrix, c = _folded(filters, pixels.mean, o, G, T.O)
    lane = tl.arange(0, T.BLOCK_P)
    acc = tl.zeros([T.BLOCK_P, T.BLOCK_O], dtype=tl.float32)
    for start in range(tl.program_id(0) * T.BLOCK_P, n_positions, tl.num_programs(0) * T.BLOCK_P):
        position = start + lane
        mask = (position < n_positions)[:, None] & (o < T.O)[None, :]
        dy = dy_ptr + tl.cast(start, tl.int64) * T.O
        g = tl.load(dy + lane[:, None] * T.O + o[None, :], mask=mask, other=0.0).to(tl.float32)
        if DACT is not identity_backward:
            q = load_patches(pixels, position, n_positions, G)
            z = filter_patches(q, matrix, c, pixels.jitter, position, n_positions, T.EXACT, G)
            g = DACT(g, z)
        acc += tl.where(mask, g, 0.0)
    tl.store(partial_ptr + tl.program_id(0) * T.O + o, tl.sum(acc, 0), mask=o < T.O)


def _setup(
    images: Tensor, weight: Tensor, mean: Tensor | None, gather: Gather | None, out_dtype: torch.dtype, backward: bool
) -> tuple[PatchSource, Tile, tuple[int, int]]:
    """(the patches, a program's tile of the result, how many tiles there are)"""
    source = PatchSource(images, weight.shape[2], mean, gather)
    tile = tile_of(source, weight.shape[0], needs_float32(images, out_dtype), backward)
    return source, tile, (triton.cdiv(source.positions, tile.BLOCK_P), triton.cdiv(tile.O, tile.BLOCK_O))


@opaque_op("whiten_fwd")
def _fwd(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mean: Tensor | None,
    std: Tensor | None,
    activation: str | None,
    dtype: torch.dtype,
    index: Tensor | None,
    translation: Tensor | None,
    flip: Tensor | None,
    jitter: Tensor | None,
    cutout: Tensor | None,
    cutout_size: int,
) -> Tensor:
    gather = unflatten(index, translation, flip, jitter, cutout, cutout_size)
    source, tile, grid = _setup(images, weight, mean, gather, dtype, backward=False)
    y = channels_last_like(images, tile.O, source.height, source.width, dtype, source.batch)
    arguments = (source.pixels, _Filters(weight, bias, std), y, source.positions)
    sizes = dict(G=source.geometry, T=tile, ACT=ACTIVATIONS[activation].value)
    launch(_fwd_kernel, grid, *arguments, maxnreg=168 if source.jittered else None, **sizes)
    return y


@_fwd.register_fake
def _(images, weight, bias, mean, std, activation, dtype, *gather):
    source = PatchSource(images, weight.shape[2], mean, unflatten(*gather))
    return channels_last_like(images, weight.shape[0], source.height, source.width, dtype, source.batch)


@opaque_op("whiten_bwd")
def _bwd(
    dy: Tensor,
    images: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor | None,
    std: Tensor | None,
    activation: str | None,
    index: Tensor | None,
    translation: Tensor | None,
    flip: Tensor | None,
    jitter: Tensor | None,
    cutout: Tensor | None,
    cutout_size: int,
) -> Tensor:
    gather = unflatten(index, translation, flip, jitter, cutout, cutout_size)
    source, tile, (tiles, blocks) = _setup(images, weight, mean, gather, dy.dtype, backward=True)
    programs = min(tiles, _BWD_PROGRAMS)
    partials = torch.empty(programs, tile.O, dtype=torch.float32, device=dy.device)
    arguments = (dy, source.pixels, _Filters(weight, bias, std), partials, source.positions)
    sizes = dict(G=source.geometry, T=tile, DACT=ACTIVATIONS[activation].backward)
    launch(_bwd_kernel, (programs, blocks), *arguments, maxnreg=255 if source.jittered else None, **sizes)
    return sum_partials(partials)


@_bwd.register_fake
def _(dy, images, weight, bias, mean, std, activation, *gather):
    return torch.empty(weight.shape[0], dtype=torch.float32, device=dy.device)


class Whiten(torch.autograd.Function):
    """Saved for backward: the images as they are (uint8), the frozen weight, bias, mean, std and the gather's tensors;
    z is recomputed.
    """

    @staticmethod
    def forward(ctx, images, weight, bias, mean, std, activation, dtype, *gather):
        ctx.save_for_backward(images, weight, bias, mean, std, *gather[:-1])
        ctx.activation, ctx.cutout_size = activation, gather[-1]
        return _fwd(images, weight, bias, mean, std, activation, dtype, *gather)

    @staticmethod
    @differentiable_once("whiten")
    def backward(ctx, dy):
        images, weight, bias, mean, std, *gather = ctx.saved_tensors
        dbias = None
        if bias is not None and ctx.needs_input_grad[2]:
            dy = dy.contiguous(memory_format=torch.channels_last)
            dbias = _bwd(dy, images, weight, bias, mean, std, ctx.activation, *gather, ctx.cutout_size).to(bias.dtype)
        return None, None, dbias, *[None] * 10


def _arguments(
    batch: int,
    height: int,
    width: int,
    filters: int,
    kernel: int = 2,
    image_channels: int = 3,
    bias: bool = True,
    gather: tuple[str, ...] | None = None,
) -> dict:
    """gather: the parts of a `Gather` besides its index."""
    return {
        **patch_arguments(batch, height, width, image_channels, gather),
        "weight": fp32(filters, image_channels, kernel, kernel),
        "bias": fp32(filters) if bias else None,
        **pixel_statistics(image_channels),
    }


def _cost(arguments: Arguments, options: dict, itemsize: int) -> dict[str, Cost]:
    pixels, positions, features = patch_counts(arguments, "weight")
    filters = arguments["weight"].shape[0]
    y, product = positions * filters * itemsize, 2 * positions * filters * features
    return {
        # read images, write y
        "fwd": Cost(pixels + y, product),
        # read dy, and the images only where the activation needs z again
        "bwd": Cost(y + pixels, product) if options["activation"] else Cost(y),
    }


@op(
    arguments=_arguments,
    cost=_cost,
    differentiable=("bias",),
    options={"activation": "gelu"},
    small=[dict(batch=3, height=6, width=7, filters=40, gather=parts) for parts in (None, PARTS)],
    further=[
        dict(height=32, width=32, filters=24),
        dict(height=32, width=32, filters=12),
        dict(height=32, width=32, filters=24, gather=PARTS),
    ],
)
def whiten(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    mean: Tensor | None = None,
    std: Tensor | None = None,
    activation: str | None = None,
    dtype: torch.dtype | None = None,
    gather: Gather | None = None,
) -> Tensor:
    """act(conv2d((images / 255 - mean) / std, weight) + bias), unpadded, stride 1, with a frozen weight.

    images: [B, C, H, W] uint8, or float32, float16, bfloat16 already normalized; channels_last.
    weight: [O, C, k, k] floating; treated as a constant.
    bias: [O] floating, trainable, or None.
    mean, std: [C] float32 in units of 0..1; required for uint8 images, not allowed otherwise. Weight, bias, mean and
        std may have any strides.
    activation: a key of `reference.ACTIVATIONS`.
    dtype: of the result; by default the images' if floating, else autocast's, else the weight's.
    gather: makes the batch of B = len(gather.index) images out of images [N, C, H, W] uint8, the whole data set.
    Returns [B, O, H - k + 1, W - k + 1], channels_last. Exact to float32 rounding: pixels are integers in float16,
    and the folded weight is float32 or, for 16-bit results, two float16 halves.

    Backward: dbias = sum over positions of dy * act'(z), one pass over dy and the pixels. Images, weight and gather get
    none. Saved: the arguments; a data set is not copied. Deterministic. Differentiable once.

    Raises ValueError for a wrong shape, layout or activation, an empty batch, a missing or superfluous mean or std, or
    images, a weight, mean, std or jitter that require a gradient; TypeError for a wrong type or dtype, and a gather of
    floating images; RuntimeError where the kernels cannot run.
    """
    op = "whiten"
    _checks.activation(op, activation)
    _checks.images(op, "images", images, (torch.uint8, *_checks.FLOATS))
    weight = _checks.filters(op, "weight", weight, images)
    dtype = output_dtype(op, images, weight, dtype)
    if bias is not None:
        bias = _checks.operand(op, "bias", bias, weight.shape[:1], _checks.FLOATS)
    _options.pixel_statistics(op, images.dtype == torch.uint8, mean, std)
    if mean is not None:
        mean, std = (
            _checks.operand(op, label, value, images.shape[1:2], (torch.float32,))
            for label, value in (("mean", mean), ("std", std))
        )
    _checks.constant(op, images=images, weight=weight, mean=mean, std=std)
    chosen = _checks.gather(op, gather, images)
    _checks.device(op, images, weight, bias, mean, std, *chosen[:-1])
    return Whiten.apply(images, weight, bias, mean, std, activation, dtype, *chosen)
