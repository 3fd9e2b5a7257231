"""nn.Modules over the ops that take the place of layers in networks of your own: a whitening stem, norm layers."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Self

import torch
from torch import Tensor, nn

from . import _options, dispatch, reference
from .squeeze_excitation import ACTIVATION_MODULES, UNKNOWN, computed_by
from .whitening import PatchMoments, patch_moments, pixel_statistics, whitening_weight


def _laid_out(x: Tensor) -> Tensor:
    """As the kernels read images; plain PyTorch takes any memory."""
    fused = dispatch.backend(x.device) == "fused"
    return x.contiguous(memory_format=torch.channels_last) if fused else x


def _check_activation(op: str, name: str | None) -> None:
    if name not in reference.ACTIVATIONS:
        known = ", ".join(map(str, reference.ACTIVATIONS))
        raise ValueError(f"{op}: unknown activation {name!r}; expected one of {known}")


class NormAct(nn.Module):
    """act(BatchNorm2d(x)): parameters, buffers and numerics of nn.BatchNorm2d, so that its state_dict loads.

    x [B, C, H, W] floating -> the same shape and dtype.
    weight: whether there is a scale. In front of ReLU and another normalized convolution it adds nothing that can be
        learned.
    momentum: the new batch's weight, 0 to 1; eps: positive. activation: a key of `reference.ACTIVATIONS`.

    Raises ValueError or TypeError for impossible options.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float = 0.1,
        *,
        activation: str | None = "relu",
        weight: bool = False,
    ):
        super().__init__()
        name = type(self).__name__
        _options.batch_norm(name, momentum, eps)
        _check_activation(name, activation)
        self.num_features, self.eps, self.momentum, self.activation = num_features, eps, momentum, activation
        self.register_parameter("weight", nn.Parameter(torch.ones(num_features)) if weight else None)
        self.bias = nn.Parameter(torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))
        self.register_buffer("num_batches_tracked", torch.zeros((), dtype=torch.int64))

    def extra_repr(self) -> str:
        options = f"eps={self.eps}, momentum={self.momentum}, activation={self.activation!r}"
        return f"{self.num_features}, {options}, weight={self.weight is not None}"

    def settings(self) -> dict:
        """The keyword arguments that every normalizing op takes."""
        return {"training": self.training, "momentum": self.momentum, "eps": self.eps, "activation": self.activation}

    def _norm(self, x: Tensor) -> Tensor:
        """Of the pooled x, where there is a pooling."""
        trained = (self.bias, self.running_mean, self.running_var)
        return dispatch.norm_act(_laid_out(x), *trained, weight=self.weight, **self.settings())

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.num_batches_tracked.add_(1)
        return self._norm(x)


class PoolNormAct(NormAct):
    """act(BatchNorm2d(max_pool2d(x, 2))): `NormAct` behind a 2x2 max-pooling of stride 2, fused by `pool_norm_act`.

    x [B, C, H, W] floating -> [B, C, H // 2, W // 2].
    """

    def _norm(self, x: Tensor) -> Tensor:
        trained = (self.bias, self.running_mean, self.running_var)
        options = {"weight": self.weight, "squeeze": False, **self.settings()}
        return dispatch.pool_norm_act(_laid_out(x), *trained, **options)[0]


@dataclass
class Conversion:
    """What `convert` did: the names of the norm layers that it replaced, and why it left the others."""

    changed: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)


def _activation_of(module: nn.Module) -> str | None:
    """The name of an activation that the ops have, or None."""
    name = computed_by(module, ACTIVATION_MODULES)
    return None if name == UNKNOWN else name


def _pools(module: nn.Module) -> bool:
    """Whether it is max_pool2d(x, 2)."""
    if type(module) is not nn.MaxPool2d or module.return_indices or module.ceil_mode:
        return False
    pairs = [value if isinstance(value, tuple) else (value, value) for value in (module.kernel_size, module.stride)]
    return pairs == [(2, 2), (2, 2)] and module.padding in (0, (0, 0)) and module.dilation in (1, (1, 1))


def _hooked(module: nn.Module | None) -> bool:
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, name, None) for name in hooks)


def _why_not(norm: nn.Module, after: nn.Module | None) -> str | None:
    if type(norm) is not nn.BatchNorm2d:
        return f"is a {type(norm).__name__}"
    if norm.momentum is None:
        return "has momentum=None, a cumulative average"
    if not norm.track_running_stats:
        return "has no running statistics"
    if norm.bias is None:
        return "has no bias"
    if after is None or _activation_of(after) is None:
        return "no activation that the ops have follows it"
    if _hooked(norm) or _hooked(after):
        return "it or its activation has hooks"
    return None


def _converted(norm: nn.BatchNorm2d, activation: str, pool: bool, weight: bool) -> NormAct:
    kind = PoolNormAct if pool else NormAct
    new = kind(norm.num_features, norm.eps, norm.momentum, activation=activation, weight=False)
    new.bias = norm.bias
    if weight:
        new.weight = norm.weight
    for name, buffer in norm.named_buffers(recurse=False):
        setattr(new, name, buffer)
    return new.train(norm.training)


def convert(model: nn.Module, *, weight: bool = True) -> Conversion:
    """Replace, in place, each [MaxPool2d(2) ->] BatchNorm2d -> activation of an nn.Sequential by a module.

    The activation is nn.ReLU, nn.SiLU, nn.GELU or nn.Hardswish. The norm layer becomes a `NormAct` or `PoolNormAct`
    that holds its parameters and buffers (the same tensors), and an nn.Identity takes the place of what it absorbed, so
    that names, state_dict, training mode and results stay as they are. weight: False takes scales away, for networks
    that are trained from the start; a scale that is not 1 stays, as does one that is not trained. Only in an
    nn.Sequential is the order of calls known.

    Returns what was changed and what was left and why.
    """
    report = Conversion()
    inside: set[nn.Module] = set()
    for path, module in list(model.named_modules()):
        if type(module) is not nn.Sequential:
            continue
        children = list(module.named_children())
        for i, (name, norm) in enumerate(children):
            if not isinstance(norm, nn.modules.batchnorm._BatchNorm):
                continue
            inside.add(norm)
            full = f"{path}.{name}" if path else name
            after = children[i + 1][1] if i + 1 < len(children) else None
            reason = _why_not(norm, after)
            if reason:
                report.left[full] = reason
                continue
            pool = i > 0 and _pools(children[i - 1][1]) and not _hooked(children[i - 1][1])
            scaled = norm.weight is not None and (weight or not _is_one(norm.weight))
            setattr(module, name, _converted(norm, _activation_of(after), pool, scaled))
            setattr(module, children[i + 1][0], nn.Identity())
            if pool:
                setattr(module, children[i - 1][0], nn.Identity())
            report.changed.append(full)
    for path, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module not in inside:
            report.left[path] = "is not in an nn.Sequential, where the order of calls is known"
    return report


def _is_one(weight: Tensor) -> bool:
    return weight.requires_grad and bool((weight == 1).all())


def _batches(images: Tensor | Iterable, most: int | None) -> Iterable[Tensor]:
    if isinstance(images, Tensor):
        yield images
        return
    for batch in islice(images, most):
        yield batch[0] if isinstance(batch, Sequence) else batch


class WhiteningConv2d(nn.Module):
    """A frozen convolution that whitens image patches, unpadded, stride 1: a network's first layer.

        act(conv2d((images / 255 - mean) / std, weight) + bias)       or, with out_channels,
        act(batch_norm(project(conv2d((images / 255 - mean) / std, weight))) + bias)

    images: [B, C, H, W] uint8 -> [B, `out_channels`, H - k + 1, W - k + 1], in one op; or floating, normalized already.
    out_channels: of a trained 1x1 projection behind the filters, normalized by a `NormAct` named norm; None: the
        filters' results, D = C * k * k of them; 2 D with `negatives`, each filter and its negative.
    bias: whether the filters' results have a trained one; a projection's is its norm's. It starts at 0.
    activation: a key of `reference.ACTIVATIONS`.
    mean, std: [C] in units of 0..1, of uint8 images; None: `fit` takes those of the images.

    The weight is a buffer: no optimizer sees it, and a state_dict holds it. Until `fit` or a state_dict has set it, a
    call raises RuntimeError. Raises ValueError for impossible options. Sources: hlb-CIFAR10 (projection), airbench
    (negatives, bias).
    """

    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int | None = None,
        kernel_size: int = 2,
        *,
        negatives: bool = False,
        bias: bool = False,
        activation: str | None = None,
        mean: Sequence[float] | Tensor | None = None,
        std: Sequence[float] | Tensor | None = None,
        eps: float = 1e-5,
        momentum: float = 0.1,
    ):
        super().__init__()
        name = type(self).__name__
        _check_activation(name, activation)
        if (mean is None) != (std is None):
            raise ValueError(f"{name}: mean and std are given together or not at all")
        if out_channels is not None and (bias or negatives):
            raise ValueError(f"{name}: a projection, out_channels={out_channels}, needs neither bias nor negatives")
        self.in_channels, self.kernel_size, self.negatives = in_channels, kernel_size, negatives
        self.activation, self._given = activation, mean is not None
        filters = in_channels * kernel_size**2 * (2 if negatives else 1)
        self.out_channels = filters if out_channels is None else out_channels
        nothing = torch.full((filters, in_channels, kernel_size, kernel_size), torch.nan)
        self.register_buffer("weight", nothing)
        self.register_buffer("mean", torch.zeros(in_channels) if mean is None else self._per_channel("mean", mean))
        self.register_buffer("std", torch.ones(in_channels) if std is None else self._per_channel("std", std))
        self.register_parameter("bias", nn.Parameter(torch.zeros(filters)) if bias else None)
        self.project = None if out_channels is None else nn.Conv2d(filters, out_channels, 1, bias=False)
        self.norm = None if out_channels is None else NormAct(out_channels, eps, momentum, activation=activation)
        self._fitted = False

    def _per_channel(self, name: str, values: Sequence[float] | Tensor) -> Tensor:
        values = torch.as_tensor(values, dtype=torch.float32).detach().clone().reshape(-1)
        if values.numel() != self.in_channels:
            raise ValueError(f"WhiteningConv2d: {name} must have {self.in_channels} values, found {values.numel()}")
        return values

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, activation={self.activation!r}"
        )

    @torch.no_grad()
    def fit(
        self, images: Tensor | Iterable, *, eps: float = 5e-4, centered: bool = True, batches: int | None = None
    ) -> Self:
        """Set the filters, and mean and std if none were given, from training images.

        images: [N, C, H, W], uint8 or normalized floating, of any memory and device; or an iterable of such batches, as
            a DataLoader is, each alone or first in a tuple or list with its labels.
        eps: what is added to the patches' variances before they are brought to 1. centered: False: of the second
            moment, not the covariance. batches: how many of an iterable's are taken; None: all.
        Of uint8 images the statistics are exact integers: they depend neither on batches nor on order.
        Returns this module. Raises ValueError for no images, another shape, images smaller than the kernel, or floating
        and uint8 ones together; TypeError for another dtype.
        """
        moments: PatchMoments | None = None
        histogram = torch.zeros(self.in_channels, 256, dtype=torch.int64, device=self.weight.device)
        for batch in _batches(images, batches):
            batch = self._checked(batch).to(self.weight.device)
            if batch.dtype == torch.uint8:
                histogram += torch.stack([torch.bincount(c.reshape(-1), minlength=256) for c in batch.unbind(1)])
            more = patch_moments(batch.permute(0, 2, 3, 1), self.kernel_size)
            if moments is not None and type(more) is not type(moments):
                raise ValueError("WhiteningConv2d: images must be all uint8 or all floating, found both")
            moments = more if moments is None else moments + more
        if moments is None:
            raise ValueError("WhiteningConv2d: there are no images to fit to")
        if not self._given and histogram.any():
            for buffer, value in zip((self.mean, self.std), pixel_statistics(histogram)):
                buffer.copy_(value)
        filters = whitening_weight(moments, self.mean, self.std, eps, centered)
        self.weight.copy_(torch.cat([filters, -filters]) if self.negatives else filters)
        self._fitted = True
        return self

    def _checked(self, images: Tensor) -> Tensor:
        """Raises for what is no batch of images for this layer."""
        name = type(self).__name__
        if not isinstance(images, Tensor) or images.dim() != 4 or images.shape[1] != self.in_channels:
            found = list(images.shape) if isinstance(images, Tensor) else type(images).__name__
            raise ValueError(f"{name}: images must be [N, {self.in_channels}, H, W], found {found}")
        if images.dtype != torch.uint8 and not images.is_floating_point():
            raise TypeError(f"{name}: images must be uint8 or floating, found {images.dtype}")
        return images

    def _load_from_state_dict(self, *arguments):
        super()._load_from_state_dict(*arguments)
        self._fitted = self.weight.device.type != "meta" and not bool(self.weight.isnan().any())

    def forward(self, images: Tensor) -> Tensor:
        if not self._fitted:
            raise RuntimeError("WhiteningConv2d has no filters yet; call fit(images) or load a state_dict first")
        self._checked(images)
        images = _laid_out(images)
        # the kernels take statistics in float32, whatever a model was cast to
        pixels = {"mean": self.mean.float(), "std": self.std.float()} if images.dtype == torch.uint8 else {}
        if self.project is None:
            return dispatch.whiten(images, self.weight, self.bias, activation=self.activation, **pixels)
        if not pixels:
            return self.norm(self.project(dispatch.whiten(images, self.weight)))
        norm = self.norm
        if norm.training:
            norm.num_batches_tracked.add_(1)
        trained = (self.project.weight, norm.bias, norm.running_mean, norm.running_var)
        return dispatch.whiten_project_norm_act(images, self.weight, *trained, **pixels, **norm.settings())
