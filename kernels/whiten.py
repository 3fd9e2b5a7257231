"""Whitening convolution, fused: uint8 pixels -> normalization -> frozen unpadded k x k filters -> bias -> activation.

    z = sum_f w_f * (u_f / 255 - mean) / std + bias = A (u - 128) + c          y = act(z)

A = w / (255 std) and c = bias + sum_f w_f (128 / 255 - mean) / std are folded inside the kernel: the image is read once
as bytes and y is written once; no normalized image exists. With a `Gather` the bytes come straight from the data set,
and its jitter (contrast a, brightness b) leaves them as they are: z = a A (u - 128) + e rowsum(A) + c with
e = 128 (a - 1) + 255 b. The fold holds only without padding. Source of the layer: hlb-CIFAR10 (2x2, unpadded, frozen).
Programs fold the filters once and go from tile to tile; where bytes allow it, several positions side by side are one
matrix row, which reads the pixels that they share once: see `_windows`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _checks, _options
from ._common import channels_last_like, sum_partials
from ._patches import (
    PatchSource,
    needs_float32,
    output_dtype,
    patch_arguments,
    patch_counts,
    pixel_statistics,
)
from ._windows import (
    Filters,
    WindowTile,
    filter_windows,
    first_column,
    fold_all,
    load_windows,
    tile_rows,
    window_tile,
)
from .activations import ACTIVATIONS, identity_backward
from .differentiation import differentiable_once
from .gather import PARTS, Gather, unflatten
from .launching import launch, opaque_op, resident, tensor_cores
from .registry import Arguments, Cost, fp32, op

_FWD_ROWS, _BWD_ROWS = 128, 64
# programs that a processor's registers hold at once, of runs and of single positions
_RESIDENT_RUNS, _RESIDENT_SINGLE = 2, 6
# what the compile report would otherwise report as stores that are narrower than the layout allows
NARROW_ACCESS = {
    "_fwd_kernel:gfx942": "a lane of an mfma result holds 4 channels, which it stores as 8 bytes",
    "_bwd_kernel:gfx942": "gradients are read as an mfma result lies, of which a lane holds 4 rows",
}


@triton.jit
def _fwd_kernel(pixels, filters, y_ptr, n_images, n_tiles, G: tl.constexpr, T: tl.constexpr, ACT: tl.constexpr):
    """y [runs, RUN * O] = act(q A^T + c)."""
    parts = fold_all(filters, G, T)
    for tile in range(tl.program_id(0), n_tiles, tl.num_programs(0)):
        q = load_windows(pixels, tile, n_images, G, T)
        first_image, image, offset, inside, width = tile_rows(tile, n_images, G, T)
        out = y_ptr + tl.cast(first_image, tl.int64) * ((G.H - G.K + 1) * (G.W - G.K + 1) * T.O)
        for part in tl.static_range(T.PARTS):
            n = first_column(part, T) + tl.arange(0, T.BLOCK_N)
            y = ACT(filter_windows(q, parts[part], pixels.jitter, image, n_images, T.EXACT))
            mask = inside[:, None] & (n[None, :] < width[:, None]) & (n < T.RUN * T.O)[None, :]
            tl.store(out + (offset[:, None] + n[None, :]), y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _bwd_kernel(
    dy_ptr, pixels, filters, partial_ptr, n_images, n_tiles, G: tl.constexpr, T: tl.constexpr, DACT: tl.constexpr
):
    """Per program, position of a run and filter: sum of dy * act'(z); z recomputed, but where act is the identity."""
    sums = ()
    for _ in tl.static_range(T.PARTS):
        sums += (tl.zeros([T.ROWS * T.RUNS * T.IMAGES, T.BLOCK_N], dtype=tl.float32),)
    if DACT is not identity_backward:
        parts = fold_all(filters, G, T)
    for tile in range(tl.program_id(0), n_tiles, tl.num_programs(0)):
        first_image, image, offset, inside, width = tile_rows(tile, n_images, G, T)
        dy = dy_ptr + tl.cast(first_image, tl.int64) * ((G.H - G.K + 1) * (G.W - G.K + 1) * T.O)
        if DACT is not identity_backward:
            q = load_windows(pixels, tile, n_images, G, T)
        added = ()
        for part in tl.static_range(T.PARTS):
            n = first_column(part, T) + tl.arange(0, T.BLOCK_N)
            mask = inside[:, None] & (n[None, :] < width[:, None]) & (n < T.RUN * T.O)[None, :]
            g = tl.load(dy + (offset[:, None] + n[None, :]), mask=mask, other=0.0).to(tl.float32)
            if DACT is not identity_backward:
                g = DACT(g, filter_windows(q, parts[part], pixels.jitter, image, n_images, T.EXACT))
                if pixels.images.dtype.element_ty != tl.uint8:
                    # outside, z is of copies of an edge's pixels, which an infinite one makes more of than 0
                    g = tl.where(mask, g, 0.0)
            added += (sums[part] + g,)
        sums = added
    for part in tl.static_range(T.PARTS):
        n = first_column(part, T) + tl.arange(0, T.BLOCK_N)
        out = partial_ptr + tl.program_id(0) * (T.RUN * T.O)
        tl.store(out + n, tl.sum(sums[part], 0), mask=n < T.RUN * T.O)


def _exact(images: Tensor, dtype: torch.dtype) -> bool:
    """Whether products run in float32, as without tensor cores, too: one of them is less than two of halves."""
    return needs_float32(images, dtype) or not tensor_cores(images.device)


def _programs(tile: WindowTile, tiles: int, device: torch.device) -> int:
    return min(tiles, resident(device, _RESIDENT_RUNS if tile.RUN > 1 else _RESIDENT_SINGLE))


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
    source = PatchSource(images, weight.shape[2], mean, gather)
    filters = weight.shape[0]
    tile, tiles, blocks = window_tile(source, filters, _exact(images, dtype), _FWD_ROWS)
    y = channels_last_like(images, filters, source.height, source.width, dtype, source.batch)
    arguments = (source.pixels, Filters(weight, bias, mean, std), y, source.batch, tiles)
    grid = (_programs(tile, tiles, images.device), blocks)
    launch(_fwd_kernel, grid, *arguments, G=source.geometry, T=tile, ACT=ACTIVATIONS[activation].value)
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
    source = PatchSource(images, weight.shape[2], mean, gather)
    tile, tiles, blocks = window_tile(source, weight.shape[0], _exact(images, dy.dtype), _BWD_ROWS)
    programs = _programs(tile, tiles, images.device)
    partials = torch.empty(programs * tile.RUN, tile.O, dtype=torch.float32, device=dy.device)
    arguments = (dy, source.pixels, Filters(weight, bias, mean, std), partials, source.batch, tiles)
    sizes = dict(G=source.geometry, T=tile, DACT=ACTIVATIONS[activation].backward)
    launch(_bwd_kernel, (programs, blocks), *arguments, **sizes)
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
    # single positions, and runs of four in blocks of 32 and of 16 columns
    small=[
        dict(batch=3, height=6, width=7, filters=filters, gather=parts)
        for filters in (40, 24, 12)
        for parts in (None, PARTS)
    ],
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
