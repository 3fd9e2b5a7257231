"""The whole stem, fused: uint8 pixels -> normalization -> whitening -> 1x1 projection -> BatchNorm -> activation.

With patches p of the normalized image, W = W2 W1 (projection times whitening, [C, F]) and their batch mean m and
covariance Cov, the projected output W p has the exact batch statistics

    mean = W m      var = diag(W Cov W^T)      z = r W (p - m) + bias,  r = 1 / sqrt(var + eps)      y = act(z)

m and Cov come from integer sums of q = u - 128 over the pixels alone, so the statistics cost one pass over the bytes,
are exact, and need no intermediate: neither the 12- nor the C-channel tensor exists. The finish runs in float64,
because W undoes the strong correlation of neighbouring pixels and cancels most of what it sums.

Backward is one pass over (dy, pixels): G = sum g q^T and sum g, with g = dy act'(z), give dW2 and dbias; the images get
no gradient.

With a `Gather` the bytes come straight from the data set. Its jitter (contrast a, brightness b) turns an image's q into
a q + e, e = 128 (a - 1) + 255 b, in the moments (float64), in z = a matrix q + e rowsum(matrix) + shift, and in
G = sum a g q^T + sum e g 1^T; the pixels that enter a product stay integers. Sources: the stem, hlb-CIFAR10; batch
normalization, Ioffe and Szegedy 2015.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _checks, _options
from ._batch_norm import OPTIONS, statistics
from ._batch_statistics import Running
from ._common import channels_last_like, rounded_product
from ._patch_moments import (
    Folded,
    Weights,
    _bwd_finish_kernel,
    _finish_kernel,
    empty_moments,
    finish_sizes,
    moments_of_all,
    positions_of_all,
)
from ._patches import (
    PatchSource,
    Tile,
    correlate_patches,
    filter_patches,
    jittered_positions,
    load_patches,
    needs_float32,
    output_dtype,
    patch_arguments,
    patch_counts,
    pixel_statistics,
    position_jitter,
    tile_of,
)
from .activations import ACTIVATIONS
from .differentiation import differentiable_once
from .gather import PARTS, Gather, unflatten
from .launching import launch, opaque_op
from .registry import Arguments, Cost, data, fp32, op

_PROGRAMS = 512


@triton.jit
def _load_folded(folded, o, F_PAD: tl.constexpr, C: tl.constexpr):
    """matrix^T [F_PAD, BLOCK_O] and shift [BLOCK_O]"""
    f = tl.arange(0, F_PAD)
    matrix = tl.load(folded.matrix + o[None, :] * F_PAD + f[:, None], mask=(o < C)[None, :], other=0.0)
    return matrix, tl.load(folded.shift + o, mask=o < C, other=0.0)


@triton.jit
def _fwd_kernel(pixels, folded, y_ptr, n_positions, G: tl.constexpr, T: tl.constexpr, ACT: tl.constexpr):
    """y [positions, O] = act(q matrix^T + shift)."""
    o = tl.program_id(1) * T.BLOCK_O + tl.arange(0, T.BLOCK_O)
    matrix, shift = _load_folded(folded, o, G.F_PAD, T.O)
    start = tl.program_id(0) * T.BLOCK_P
    lane = tl.arange(0, T.BLOCK_P)
    position = start + lane
    q = load_patches(pixels, position, n_positions, G)
    y = ACT(filter_patches(q, matrix, shift, pixels.jitter, position, n_positions, T.EXACT, G))
    mask = (position < n_positions)[:, None] & (o < T.O)[None, :]
    out = y_ptr + tl.cast(start, tl.int64) * T.O
    tl.store(out + lane[:, None] * T.O + o[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _bwd_kernel(dy_ptr, pixels, folded, partial_ptr, n_positions, G: tl.constexpr, T: tl.constexpr, DACT: tl.constexpr):
    """Per program: G = sum g q^T of the jittered q, [O, F_PAD]; the constant feature makes column F the sum of g."""
    features: tl.constexpr = G.K * G.K * G.C_IN
    o = tl.program_id(1) * T.BLOCK_O + tl.arange(0, T.BLOCK_O)
    f = tl.arange(0, G.F_PAD)
    lane = tl.arange(0, T.BLOCK_P)
    matrix, shift = _load_folded(folded, o, G.F_PAD, T.O)
    acc = tl.zeros([T.BLOCK_O, G.F_PAD], dtype=tl.float32)
    # float32 products are chains of additions, which round a plain sum more than its own would
    OWN_SUMS: tl.constexpr = T.EXACT or pixels.jitter is not None
    if OWN_SUMS:
        sums = tl.zeros([T.BLOCK_O], dtype=tl.float32)
    if pixels.jitter is not None:
        offset_sums = tl.zeros([T.BLOCK_O], dtype=tl.float32)
    for start in range(tl.program_id(0) * T.BLOCK_P, n_positions, tl.num_programs(0) * T.BLOCK_P):
        position = start + lane
        q = load_patches(pixels, position, n_positions, G)
        mask = (position < n_positions)[:, None] & (o < T.O)[None, :]
        dy = dy_ptr + tl.cast(start, tl.int64) * T.O
        g = tl.load(dy + lane[:, None] * T.O + o[None, :], mask=mask, other=0.0).to(tl.float32)
        z = filter_patches(q, matrix, shift, pixels.jitter, position, n_positions, T.EXACT, G)
        g = tl.where(mask, DACT(g, z), 0.0)
        if OWN_SUMS:
            sums += tl.sum(g, 0)
        if pixels.jitter is not None:
            contrast, offset = position_jitter(pixels.jitter, position, n_positions, G)
            offset_sums += tl.sum(rounded_product(g, offset[:, None]), 0)
            g *= contrast[:, None]
        acc += correlate_patches(g, q, T.EXACT)
    if pixels.jitter is not None:
        acc += offset_sums[:, None]
    if OWN_SUMS:
        acc = tl.where((f == features)[None, :], sums[:, None], acc)
    out = partial_ptr + tl.program_id(0) * T.O * G.F_PAD
    tl.store(out + o[:, None] * G.F_PAD + f[None, :], acc, mask=(o < T.O)[:, None])


def _tile(images: Tensor, channels: int, source: PatchSource, out_dtype: torch.dtype, backward: bool) -> Tile:
    tile = tile_of(source, channels, needs_float32(images, out_dtype), backward)
    if backward and source.jittered:
        return tile._replace(BLOCK_P=jittered_positions(source), BLOCK_O=16)
    # two float32 products of many features, and the activation's gradient between them, take all registers
    return tile._replace(BLOCK_P=min(32, tile.BLOCK_P)) if backward and tile.EXACT and source.f_pad > 16 else tile


@opaque_op("whiten_project_norm_act_fwd", mutates=("running_mean", "running_var"))
def _fwd(
    images: Tensor,
    whiten_weight: Tensor,
    project_weight: Tensor,
    bias: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    fixed_mean: Tensor | None,
    fixed_var: Tensor | None,
    mean: Tensor,
    std: Tensor,
    momentum: float,
    eps: float,
    activation: str | None,
    dtype: torch.dtype,
    index: Tensor | None,
    translation: Tensor | None,
    flip: Tensor | None,
    jitter: Tensor | None,
    cutout: Tensor | None,
    cutout_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(y, moments [F_PAD, F_PAD], matrix [C, F_PAD], shift [C], rstd [C])"""
    _checks.separate(
        "whiten_project_norm_act",
        {"running_mean": running_mean, "running_var": running_var},
        {
            "images": images, "whiten_weight": whiten_weight, "project_weight": project_weight, "bias": bias,
            "mean": mean, "std": std, "gather.index": index, "gather.translation": translation, "gather.flip": flip,
            "gather.jitter": jitter, "gather.cutout": cutout,
        },
    )  # fmt: skip
    training, channels = fixed_mean is None, project_weight.shape[0]
    gather = unflatten(index, translation, flip, jitter, cutout, cutout_size)
    source = PatchSource(images, whiten_weight.shape[2], mean, gather)
    fp32 = dict(dtype=torch.float32, device=images.device)
    # in evaluation nothing reads the moments
    moments = moments_of_all(source) if training else empty_moments(source)
    folded = Folded(
        torch.empty(channels, source.f_pad, **fp32), torch.empty(channels, **fp32), torch.empty(channels, **fp32)
    )
    weights = Weights(project_weight, whiten_weight, mean, std)
    running = Running.of(*((running_mean, running_var) if training else (fixed_mean, fixed_var)), momentum)
    positions = positions_of_all(source) if training else source.positions
    arguments = (moments if training else None, weights, bias, running, folded, positions, eps)
    launch(_finish_kernel, (channels,), *arguments, **finish_sizes(project_weight, source))
    y = channels_last_like(images, channels, source.height, source.width, dtype, source.batch)
    tile = _tile(images, channels, source, dtype, backward=False)
    grid = (triton.cdiv(source.positions, tile.BLOCK_P), triton.cdiv(channels, tile.BLOCK_O))
    sizes = dict(G=source.geometry, T=tile, ACT=ACTIVATIONS[activation].value)
    launch(_fwd_kernel, grid, source.pixels, folded, y, source.positions, **sizes)
    return y, moments, *folded


@_fwd.register_fake
def _(
    images, whiten_weight, project_weight, bias, running_mean, running_var, fixed_mean, fixed_var, mean, std,
    momentum, eps, activation, dtype, *gather,
):  # fmt: skip
    channels, device = project_weight.shape[0], images.device
    source = PatchSource(images, whiten_weight.shape[2], mean, unflatten(*gather))
    y = channels_last_like(images, channels, source.height, source.width, dtype, source.batch)
    matrix = torch.empty(channels, source.f_pad, dtype=torch.float32, device=device)
    shift = torch.empty(channels, dtype=torch.float32, device=device)
    return y, empty_moments(source), matrix, shift, torch.empty_like(shift)


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
    activation: str | None,
    index: Tensor | None,
    translation: Tensor | None,
    flip: Tensor | None,
    jitter: Tensor | None,
    cutout: Tensor | None,
    cutout_size: int,
) -> tuple[Tensor, Tensor]:
    """(dproject [C, K] float32, dbias [C] float32)"""
    channels, filters = project_weight.shape
    gather = unflatten(index, translation, flip, jitter, cutout, cutout_size)
    source = PatchSource(images, whiten_weight.shape[2], mean, gather)
    fp32 = dict(dtype=torch.float32, device=images.device)
    tile = _tile(images, channels, source, dy.dtype, backward=True)
    programs = min(triton.cdiv(source.positions, tile.BLOCK_P), _PROGRAMS)
    partials = torch.empty(programs, channels, source.f_pad, **fp32)
    arguments = (dy, source.pixels, Folded(matrix, shift, rstd), partials, source.positions)
    sizes = dict(G=source.geometry, T=tile, DACT=ACTIVATIONS[activation].backward)
    maxnreg = 255 if tile.EXACT else None
    launch(_bwd_kernel, (programs, triton.cdiv(channels, tile.BLOCK_O)), *arguments, maxnreg=maxnreg, **sizes)
    dproject, dbias = torch.empty(channels, filters, **fp32), torch.empty(channels, **fp32)
    weights = Weights(project_weight, whiten_weight, mean, std)
    # the gradients are linear in the partials, so that those of all ranks' batches need only be added up
    positions = positions_of_all(source) if training else source.positions
    arguments = (partials, moments if training else None, weights, rstd, dproject, dbias, programs, positions)
    sizes = finish_sizes(project_weight, source)
    launch(_bwd_finish_kernel, (channels,), *arguments, C=channels, BLOCK_N=32, **sizes)
    return dproject, dbias


@_bwd.register_fake
def _(dy, images, whiten_weight, project_weight, *rest):
    dproject = torch.empty(project_weight.shape, dtype=torch.float32, device=images.device)
    return dproject, torch.empty(project_weight.shape[0], dtype=torch.float32, device=images.device)


class WhitenProjectNormAct(torch.autograd.Function):
    """Saved for backward: the uint8 images, the gather's tensors and tables of at most [C, F_PAD]; no activation."""

    @staticmethod
    def forward(
        ctx, images, whiten_weight, project_weight, bias, running_mean, running_var, fixed_mean, fixed_var, mean, std,
        momentum, eps, activation, dtype, *gather,
    ):  # fmt: skip
        y, *tables = _fwd(
            images, whiten_weight, project_weight, bias, running_mean, running_var, fixed_mean, fixed_var, mean, std,
            momentum, eps, activation, dtype, *gather,
        )  # fmt: skip
        ctx.save_for_backward(images, whiten_weight, project_weight, mean, std, *tables, *gather[:-1])
        ctx.training, ctx.activation = fixed_mean is None, activation
        ctx.dtypes, ctx.cutout_size = (project_weight.dtype, bias.dtype), gather[-1]
        return y

    @staticmethod
    @differentiable_once("whiten_project_norm_act")
    def backward(ctx, dy):
        tensors, gather = ctx.saved_tensors[:-5], ctx.saved_tensors[-5:]
        dy = dy.contiguous(memory_format=torch.channels_last)
        grads = _bwd(dy, *tensors, ctx.training, ctx.activation, *gather, ctx.cutout_size)
        needs = ctx.needs_input_grad[2:4]
        return (
            None,
            None,
            *(grad.to(dtype) if needed else None for grad, dtype, needed in zip(grads, ctx.dtypes, needs)),
            *[None] * 16,
        )


def _arguments(
    batch: int,
    height: int,
    width: int,
    channels: int,
    kernel: int = 2,
    image_channels: int = 3,
    gather: tuple[str, ...] | None = None,
) -> dict:
    """channels: of the result; gather: the parts of a `Gather` besides its index."""
    filters = image_channels * kernel**2
    return {
        **patch_arguments(batch, height, width, image_channels, gather),
        "whiten_weight": fp32(filters, image_channels, kernel, kernel),
        "project_weight": data(channels, filters, 1, 1),
        "bias": fp32(channels),
        **statistics(channels),
        **pixel_statistics(image_channels),
    }


def _cost(arguments: Arguments, options: dict, itemsize: int) -> dict[str, Cost]:
    pixels, positions, features = patch_counts(arguments, "whiten_weight")
    filters, channels = arguments["whiten_weight"].shape[0], arguments["project_weight"].shape[0]
    y, product = positions * channels * itemsize, 2 * positions * channels * filters
    moments = 2 * positions * filters * features if options["training"] else 0
    return {
        # training reads the images twice, as y needs the batch moments; write y. A gather reads as many pixels
        "fwd": Cost(pixels * (2 if options["training"] else 1) + y, product + moments),
        # read images and dy once; z again and G = g^T q
        "bwd": Cost(pixels + y, 2 * product),
    }


@op(
    arguments=_arguments,
    cost=_cost,
    differentiable=("project_weight", "bias"),
    updates=("running_mean", "running_var"),
    options=OPTIONS,
    small=[
        dict(batch=3, height=8, width=7, channels=12),
        dict(batch=2, height=6, width=7, channels=5, gather=PARTS),
    ],
    further=[
        dict(height=32, width=32, channels=32, kernel=kernel, gather=gather)
        for kernel in (2, 3)
        for gather in (None, PARTS)
    ],
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
    gather: Gather | None = None,
) -> Tensor:
    """act(batch_norm(project(whiten((images / 255 - mean) / std))) + bias), unpadded, BatchNorm scale fixed at 1.

    images: [B, C_in, H, W] uint8, channels_last.
    whiten_weight: [K, C_in, k, k] floating, frozen.
    project_weight: [C, K] or [C, K, 1, 1] floating, trainable.
    bias: [C] floating, trainable (BatchNorm's).
    running_mean, running_var: [C] float32, contiguous, or both None; updated in training, used in evaluation, as
        BatchNorm2d does.
    momentum: the new batch's weight, 0 to 1; eps: positive.
    mean, std: [C_in] float32 in units of 0..1. Weights, bias, mean and std may have any strides.
    activation: a key of `reference.ACTIVATIONS`.
    dtype: of the result; by default autocast's if it is on, else project_weight's.
    gather: makes the batch of B = len(gather.index) images out of images [N, C_in, H, W], the whole data set.
    Returns [B, C, H - k + 1, W - k + 1], channels_last. Batch statistics are exact (integers, finished in float64; with
    a jitter, float64 throughout).

    Backward, with G = sum g q^T, D = 1 / (255 std), Gc = (G - sum(g) m_q^T) D and gx = r rowsum(W * Gc):
        dW = r (Gc - gx r (W Cov))      dproject = dW whiten^T      dbias = sum(g)
    Saved: images (uint8; a data set is not copied), gather, the moments, the folded matrix and shift, rstd.
    Deterministic. Differentiable once.

    Raises ValueError for a wrong shape, layout, activation, momentum or eps, an empty batch, one value per channel in
    training, running statistics that share memory with another argument, or a whitening weight, mean, std or jitter
    that requires a gradient; TypeError for a wrong type or dtype; RuntimeError where the kernels cannot run.
    """
    op = "whiten_project_norm_act"
    _checks.activation(op, activation)
    _options.batch_norm(op, momentum, eps)
    _checks.images(op, "images", images, (torch.uint8,))
    whiten_weight = _checks.filters(op, "whiten_weight", whiten_weight, images)
    project_weight = _checks.pointwise(op, "project_weight", project_weight, (None, len(whiten_weight)))
    channels = len(project_weight)
    bias = _checks.operand(op, "bias", bias, (channels,), _checks.FLOATS)
    mean, std = (
        _checks.operand(op, label, value, images.shape[1:2], (torch.float32,))
        for label, value in (("mean", mean), ("std", std))
    )
    _checks.constant(op, whiten_weight=whiten_weight, mean=mean, std=std)
    statistics = _checks.running_statistics(op, running_mean, running_var, channels, training)
    chosen = _checks.gather(op, gather, images)
    lost = whiten_weight.shape[2] - 1
    batch = len(images if gather is None else gather.index)
    _checks.enough_values(op, batch * (images.shape[2] - lost) * (images.shape[3] - lost), training)
    given = (images, whiten_weight, project_weight, bias, *statistics, mean, std, *chosen[:-1])
    _checks.device(op, *given)
    dtype = output_dtype(op, images, project_weight, dtype)
    return WhitenProjectNormAct.apply(
        images, whiten_weight, project_weight, bias, *statistics, mean, std, momentum, eps, activation, dtype, *chosen
    )
