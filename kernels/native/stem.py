"""The whitening stems, compiled: `whiten` and `whiten_project_norm_act`, from uint8 images and a `Gather` of them.

Nothing of the result's size is saved: backward makes the batch from the images again. Pixels are normalized and
products summed in float32, in one order on any number of threads; sums over positions go on in float64.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .. import _options, reference
from ..differentiation import differentiable_once
from ..gather import Gather
from . import _takes
from .library import Library, load


class _Source(NamedTuple):
    """A batch as the kernels read it: the tensors that lead their arguments, its sizes, and the cutout's."""

    tensors: tuple[Tensor | None, ...]
    batch: int
    size: tuple[int, int, int]
    cutout_size: int

    def out(self, outputs: int, kernel: int, dtype: torch.dtype) -> Tensor:
        height, width, _ = self.size
        shape = (self.batch, outputs, height - kernel + 1, width - kernel + 1)
        return torch.empty(shape, dtype=dtype, memory_format=torch.channels_last)

    def sizes(self, outputs: int, kernel: int) -> tuple[int, ...]:
        return self.batch, *self.size, outputs, kernel, self.cutout_size


def _source(images: Tensor, mean: Tensor | None, std: Tensor | None, gather: Gather | None) -> _Source | None:
    """None for what the kernels do not take."""
    if not _takes.images(images, (torch.uint8,)):
        return None
    count, channels, height, width = images.shape
    if any(not _takes.vector(t, channels) or t is None or t.requires_grad for t in (mean, std)):
        return None
    pixels = (_takes.fp32(mean), _takes.fp32(std))
    if gather is None:
        return _Source((images, *[None] * 5, *pixels), count, (height, width, channels), 0)
    fields = (gather.index, gather.translation, gather.cutout, gather.flip, gather.jitter)
    batch = len(gather.index)
    shapes = ((batch,), (batch, 2), (batch, 2), (batch,), (batch, 2))
    kinds = (torch.int64, (torch.int64, torch.int32), torch.int64, torch.bool, torch.float32)
    for field, shape, kind in zip(fields, shapes, kinds):
        allowed = kind if isinstance(kind, tuple) else (kind,)
        if field is not None and not (_takes.plain(field) and field.shape == shape and field.dtype in allowed):
            return None
    index = gather.index
    if batch == 0 or (gather.jitter is not None and gather.jitter.requires_grad):
        return None
    # where the kernels would read beyond the images, the reference raises PyTorch's IndexError
    if int(index.min()) < 0 or int(index.max()) >= count:
        return None
    translation = None if gather.translation is None else gather.translation.long()
    ready = [None if t is None else t.contiguous() for t in (index, translation, *fields[2:])]
    return _Source((images, *ready, *pixels), batch, (height, width, channels), gather.cutout_size)


def _filters(weight: Tensor, images: Tensor) -> bool:
    """Whether weight is frozen filters [O, C, k, k] for these images."""
    return (
        _takes.plain(weight)
        and not weight.requires_grad
        and weight.is_floating_point()
        and weight.dim() == 4
        and weight.numel() > 0
        and weight.shape[1] == images.shape[1]
        and weight.shape[2] == weight.shape[3] <= min(images.shape[2:])
    )


class _Whiten(torch.autograd.Function):
    """Saved for backward: the images, what gathers them, weight and bias."""

    @staticmethod
    def forward(ctx, library: Library, source: _Source, weight: Tensor, bias: Tensor | None, dtype: torch.dtype):
        outputs, kernel = len(weight), weight.shape[2]
        ctx.library, ctx.batch, ctx.size, ctx.cutout_size = library, *source[1:]
        ctx.save_for_backward(weight, bias, *source.tensors)
        y = source.out(outputs, kernel, dtype)
        library.whiten_forward(
            *source.tensors, _takes.fp32(weight), _takes.fp32(bias), y, *source.sizes(outputs, kernel),
            torch.get_num_threads(),
        )  # fmt: skip
        return y

    @staticmethod
    @differentiable_once("whiten")
    def backward(ctx, dy):
        weight, bias, *tensors = ctx.saved_tensors
        if not ctx.needs_input_grad[3]:
            return (None,) * 5
        dbias = torch.empty(len(weight))
        sizes = (ctx.batch, *ctx.size, len(weight), weight.shape[2], ctx.cutout_size)
        ctx.library.whiten_backward(
            dy.contiguous(memory_format=torch.channels_last), *tensors, _takes.fp32(weight), _takes.fp32(bias), dbias,
            *sizes, torch.get_num_threads(),
        )  # fmt: skip
        return None, None, None, dbias.to(bias.dtype), None


class _WhitenProjectNormAct(torch.autograd.Function):
    """Saved for backward: the images, what gathers them, the weights, bias, mean and var; no activation."""

    @staticmethod
    def forward(
        ctx, library, source, whiten_weight, project_weight, bias, running_mean, running_var, training, momentum, eps,
        dtype,
    ):  # fmt: skip
        outputs, kernel = len(project_weight), whiten_weight.shape[2]
        folded = _folded(project_weight, whiten_weight)
        running = (running_mean, running_var)
        fixed, moving = ((None, None), running) if training else (running, (None, None))
        mean, var = (torch.empty(outputs) for _ in range(2)) if training else (t.clone() for t in running)
        y = source.out(outputs, kernel, dtype)
        library.whiten_norm_act_forward(
            *source.tensors, folded, _takes.fp32(bias), *fixed, *moving, mean, var, y, *source.sizes(outputs, kernel),
            float(momentum), float(eps), torch.get_num_threads(),
        )  # fmt: skip
        ctx.library, ctx.batch, ctx.size, ctx.cutout_size = library, *source[1:]
        ctx.training, ctx.eps = training, eps
        ctx.save_for_backward(whiten_weight, project_weight, bias, mean, var, *source.tensors)
        return y

    @staticmethod
    @differentiable_once("whiten_project_norm_act")
    def backward(ctx, dy):
        whiten_weight, project_weight, bias, mean, var, *tensors = ctx.saved_tensors
        outputs, kernel = len(project_weight), whiten_weight.shape[2]
        features = whiten_weight[0].numel()
        sums = torch.empty((2 + 2 * features) * outputs + features, dtype=torch.float64)
        sizes = (ctx.batch, *ctx.size, outputs, kernel, ctx.cutout_size)
        ctx.library.whiten_norm_act_backward(
            dy.contiguous(memory_format=torch.channels_last), *tensors, _folded(project_weight, whiten_weight),
            _takes.fp32(bias), mean, var, sums, *sizes, ctx.training, float(ctx.eps), torch.get_num_threads(),
        )  # fmt: skip
        by_output, sum_q = sums.split([(2 + 2 * features) * outputs, features])
        g, along, with_g, with_x = by_output.view(-1, outputs).split([1, 1, features, features])
        if ctx.training:
            height, width = (side - kernel + 1 for side in ctx.size[:2])
            with_g = with_g - (sum_q[:, None] * g + with_x * along) / (ctx.batch * height * width)
        dweight = with_g * (var.double() + ctx.eps).rsqrt()
        # the kernels' features are [k, k, C], those of the filters [C, k, k]
        patches = whiten_weight.double().permute(2, 3, 1, 0).reshape(features, -1)
        dproject = (dweight.T @ patches).view_as(project_weight) if ctx.needs_input_grad[3] else None
        return (
            None,
            None,
            None,
            None if dproject is None else dproject.to(project_weight.dtype),
            g[0].to(bias.dtype) if ctx.needs_input_grad[4] else None,
            *[None] * 6,
        )


def _folded(project_weight: Tensor, whiten_weight: Tensor) -> Tensor:
    """Both products as one convolution's weight [O, C, k, k] float32."""
    product = project_weight.detach().flatten(1).double() @ whiten_weight.flatten(1).double()
    return product.float().view(len(project_weight), *whiten_weight.shape[1:])


def _library(images: Tensor, activation: str | None, dtype: torch.dtype) -> Library | None:
    known = activation in reference.ACTIVATIONS and dtype in _takes.FLOATS
    return load("stem", activation, dtype) if known else None


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
    """act(conv2d(normalize(images), weight) + bias), unpadded: see `kernels.whiten`.

    Compiled for uint8 images [B, C, H, W], channels_last, and a result in float32 or bfloat16.
    """
    _options.pixel_statistics("whiten", not images.is_floating_point(), mean, std)
    source = library = None
    if _takes.plain_call() and _takes.images(images, (torch.uint8,)) and _filters(weight, images):
        source = _source(images, mean, std, gather)
        if source is not None and _takes.vector(bias, len(weight)):
            library = _library(images, activation, dtype or weight.dtype)
    if library is None:
        options = dict(mean=mean, std=std, activation=activation, dtype=dtype, gather=gather)
        return reference.whiten(images, weight, bias, **options)
    return _Whiten.apply(library, source, weight, bias, dtype or weight.dtype)


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
    """act(batch_norm(project(whiten(images)))): see `kernels.whiten_project_norm_act`. Compiled as `whiten` is."""
    options = dict(training=training, momentum=momentum, eps=eps, activation=activation)
    source = library = None
    if _takes.plain_call() and _takes.images(images, (torch.uint8,)) and _filters(whiten_weight, images):
        source = _source(images, mean, std, gather)
        outputs, pointwise = len(project_weight), (len(whiten_weight), *(1,) * (project_weight.dim() - 2))
        taken = source is not None and _takes.plain(project_weight) and project_weight.shape[1:] == pointwise
        if taken and outputs > 0 and project_weight.is_floating_point():
            height, width = (side - whiten_weight.shape[2] + 1 for side in images.shape[2:])
            vectors = (bias, None, running_mean, running_var)
            count = source.batch * height * width
            if _takes.normalization("whiten_project_norm_act", outputs, count, *vectors, **options):
                library = _library(images, activation, dtype or project_weight.dtype)
    if library is None:
        return reference.whiten_project_norm_act(
            images, whiten_weight, project_weight, bias, running_mean, running_var,
            mean=mean, std=std, dtype=dtype, gather=gather, **options,
        )  # fmt: skip
    return _WhitenProjectNormAct.apply(
        library, source, whiten_weight, project_weight, bias, running_mean, running_var, training, momentum, eps,
        dtype or project_weight.dtype,
    )  # fmt: skip
