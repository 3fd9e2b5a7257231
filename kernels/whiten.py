"""Whitening convolution, fused: uint8 pixels -> normalization -> frozen unpadded k x k filters -> bias -> activation.

    z = sum_f w_f * (u_f / 255 - mean) / std + bias = A (u - 128) + c          y = act(z)

A = w / (255 std) and c = bias + sum_f w_f (128 / 255 - mean) / std are folded inside the kernel: the image is read once
as bytes and y is written once; no normalized image exists. With a `Gather` the bytes come straight from the data set,
and its jitter (contrast a, brightness b) leaves them as they are: z = a A (u - 128) + e rowsum(A) + c with
e = 128 (a - 1) + 255 b. The fold holds only without padding. Source of the layer: hlb-CIFAR10 (2x2, unpadded, frozen).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _checks
from ._common import activate, activation_backward, channels_last_like, rounded_product, sum_partials
from ._patches import (
    PatchSource,
    filter_patches,
    load_patches,
    needs_float32,
    output_dtype,
    tile_sizes,
    weight_offset,
)
from .differentiation import differentiable_once
from .gather import Gather, unflatten
from .launching import launch, opaque_op

_BWD_PROGRAMS = 512
# what the compile report would otherwise report as stores that are narrower than the layout allows
NARROW_ACCESS = {"_fwd_kernel:gfx942": "a lane of an mfma result holds 4 channels, which it stores as 8 bytes"}


@triton.jit
def _folded(
    weight_ptr, bias_ptr, mean_ptr, std_ptr, o, O: tl.constexpr, HAS_BIAS: tl.constexpr, UINT8: tl.constexpr,
    C_IN: tl.constexpr, K: tl.constexpr, F_PAD: tl.constexpr,
):  # fmt: skip
    """A^T [F_PAD, BLOCK_O] and c [BLOCK_O], float32."""
    features: tl.constexpr = K * K * C_IN
    f = tl.arange(0, F_PAD)
    in_f = f < features
    mask = in_f[:, None] & (o < O)[None, :]
    w = tl.load(weight_ptr + o[None, :] * features + weight_offset(f, C_IN, K)[:, None], mask=mask, other=0.0)
    w = w.to(tl.float32)
    c = tl.zeros(o.shape, dtype=tl.float32)
    if UINT8:
        mean = tl.load(mean_ptr + f % C_IN, mask=in_f, other=0.0)
        std = tl.load(std_ptr + f % C_IN, mask=in_f, other=1.0)
        w = w / std[:, None]
        c = tl.sum(rounded_product(w, (128.0 / 255.0 - mean)[:, None]), 0)
        w = w / 255.0
    if HAS_BIAS:
        c += tl.load(bias_ptr + o, mask=o < O, other=0.0).to(tl.float32)
    return w, c


@triton.jit
def _fwd_kernel(
    images_ptr, index_ptr, crop_ptr, flip_ptr, cutout_ptr, mean_ptr, jitter_ptr, weight_ptr, bias_ptr, std_ptr, y_ptr,
    n_positions,
    O: tl.constexpr, HAS_BIAS: tl.constexpr, ACT: tl.constexpr, EXACT: tl.constexpr, UINT8: tl.constexpr,
    GATHER: tl.constexpr, CROP: tl.constexpr, FLIP: tl.constexpr, CUTOUT: tl.constexpr, JITTER: tl.constexpr,
    H: tl.constexpr, W: tl.constexpr, C_IN: tl.constexpr, K: tl.constexpr, F_PAD: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """y [positions, O] = act(q A^T + c)."""
    o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    matrix, c = _folded(weight_ptr, bias_ptr, mean_ptr, std_ptr, o, O, HAS_BIAS, UINT8, C_IN, K, F_PAD)
    start = tl.program_id(0) * BLOCK_P
    lane = tl.arange(0, BLOCK_P)
    position = start + lane
    q = load_patches(
        images_ptr, index_ptr, crop_ptr, flip_ptr, cutout_ptr, mean_ptr, position, n_positions,
        UINT8, GATHER, CROP, FLIP, CUTOUT, H, W, C_IN, K, F_PAD,
    )  # fmt: skip
    y = activate(filter_patches(q, matrix, c, jitter_ptr, position, n_positions, EXACT, JITTER, H, W, K), ACT)
    mask = (position < n_positions)[:, None] & (o < O)[None, :]
    out = y_ptr + tl.cast(start, tl.int64) * O
    tl.store(out + lane[:, None] * O + o[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _bwd_kernel(
    dy_ptr, images_ptr, index_ptr, crop_ptr, flip_ptr, cutout_ptr, mean_ptr, jitter_ptr, weight_ptr, bias_ptr, std_ptr,
    partial_ptr, n_positions,
    O: tl.constexpr, HAS_BIAS: tl.constexpr, ACT: tl.constexpr, EXACT: tl.constexpr, UINT8: tl.constexpr,
    GATHER: tl.constexpr, CROP: tl.constexpr, FLIP: tl.constexpr, CUTOUT: tl.constexpr, JITTER: tl.constexpr,
    H: tl.constexpr, W: tl.constexpr, C_IN: tl.constexpr, K: tl.constexpr, F_PAD: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """Per program and filter: sum of dy * act'(z), z recomputed from the pixels (not read when act is the identity)."""
    o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    if ACT != "identity":
        matrix, c = _folded(weight_ptr, bias_ptr, mean_ptr, std_ptr, o, O, HAS_BIAS, UINT8, C_IN, K, F_PAD)
    lane = tl.arange(0, BLOCK_P)
    acc = tl.zeros([BLOCK_P, BLOCK_O], dtype=tl.float32)
    for start in range(tl.program_id(0) * BLOCK_P, n_positions, tl.num_programs(0) * BLOCK_P):
        position = start + lane
        mask = (position < n_positions)[:, None] & (o < O)[None, :]
        dy = dy_ptr + tl.cast(start, tl.int64) * O
        g = tl.load(dy + lane[:, None] * O + o[None, :], mask=mask, other=0.0).to(tl.float32)
        if ACT != "identity":
            q = load_patches(
                images_ptr, index_ptr, crop_ptr, flip_ptr, cutout_ptr, mean_ptr, position, n_positions,
                UINT8, GATHER, CROP, FLIP, CUTOUT, H, W, C_IN, K, F_PAD,
            )  # fmt: skip
            z = filter_patches(q, matrix, c, jitter_ptr, position, n_positions, EXACT, JITTER, H, W, K)
            g = activation_backward(g, z, ACT)
        acc += tl.where(mask, g, 0.0)
    tl.store(partial_ptr + tl.program_id(0) * O + o, tl.sum(acc, 0), mask=o < O)


def _setup(
    images: Tensor, weight: Tensor, bias: Tensor | None, mean: Tensor | None, gather: Gather | None,
    out_dtype: torch.dtype, backward: bool,
):  # fmt: skip
    filters = weight.shape[0]
    source = PatchSource(images, weight.shape[2], mean, gather)
    exact = needs_float32(images, out_dtype)
    tile = tile_sizes(source, filters, exact, backward)
    constexprs = dict(
        O=filters,
        HAS_BIAS=bias is not None,
        EXACT=exact,
        JITTER=source.jittered,
        **tile,
        **source.constexprs,
    )
    grid = (triton.cdiv(source.positions, tile["BLOCK_P"]), triton.cdiv(filters, tile["BLOCK_O"]))
    return source, grid, constexprs


@opaque_op("whiten_fwd")
def _fwd(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mean: Tensor | None,
    std: Tensor | None,
    activation: str,
    dtype: torch.dtype,
    index: Tensor | None,
    shift: Tensor | None,
    flip: Tensor | None,
    jitter: Tensor | None,
    cutout: Tensor | None,
    cutout_size: int,
) -> Tensor:
    gather = unflatten(index, shift, flip, jitter, cutout, cutout_size)
    source, grid, constexprs = _setup(images, weight, bias, mean, gather, dtype, backward=False)
    y = channels_last_like(images, weight.shape[0], source.height, source.width, dtype, source.batch)
    launch(
        _fwd_kernel, grid, *source.pixels, source.jitter, weight, bias if bias is not None else weight,
        std if std is not None else weight, y, source.positions, ACT=activation,
        maxnreg=168 if source.jittered else None, **constexprs,
    )  # fmt: skip
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
    activation: str,
    index: Tensor | None,
    shift: Tensor | None,
    flip: Tensor | None,
    jitter: Tensor | None,
    cutout: Tensor | None,
    cutout_size: int,
) -> Tensor:
    gather = unflatten(index, shift, flip, jitter, cutout, cutout_size)
    source, (tiles, blocks), constexprs = _setup(images, weight, bias, mean, gather, dy.dtype, backward=True)
    programs = min(tiles, _BWD_PROGRAMS)
    partials = torch.empty(programs, weight.shape[0], dtype=torch.float32, device=dy.device)
    launch(
        _bwd_kernel, (programs, blocks), dy, *source.pixels, source.jitter, weight, bias,
        std if std is not None else weight, partials, source.positions, ACT=activation,
        maxnreg=255 if source.jittered else None, **constexprs,
    )  # fmt: skip
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
    activation: "gelu" (erf), "silu", "relu" or None.
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
    name = _checks.activation(op, activation)
    _checks.images(op, "images", images, (torch.uint8, *_checks.FLOATS))
    weight = _checks.filters(op, "weight", weight, images)
    dtype = output_dtype(op, images, weight, dtype)
    if bias is not None:
        bias = _checks.operand(op, "bias", bias, weight.shape[:1], _checks.FLOATS)
    if (images.dtype == torch.uint8) != (mean is not None) or (mean is None) != (std is None):
        raise ValueError(f"{op}: mean and std are for uint8 images, which need both; found images of {images.dtype}")
    if mean is not None:
        mean, std = (
            _checks.operand(op, label, value, images.shape[1:2], (torch.float32,))
            for label, value in (("mean", mean), ("std", std))
        )
    _checks.constant(op, images=images, weight=weight, mean=mean, std=std)
    chosen = _checks.gather(op, gather, images)
    _checks.device(op, images, weight, bias, mean, std, *chosen[:-1])
    return Whiten.apply(images, weight, bias, mean, std, name, dtype, *chosen)
