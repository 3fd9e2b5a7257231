"""Layers: nn.Modules over the ops of a backend. A network knows layers only; each calls one op, but for `ConvGroup`,
which is made of others.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blink.kernels.gather import Gather
from blink.kernels.reference import ACTIVATIONS, normalize
from blink.model.backend import Backend
from blink.model.convolution import Conv3x3


class NormAct(nn.Module):
    """act(batch_norm(x * gate)) + residual, with a trained bias and a scale fixed at 1.

    x [B, C, H, W]; gate [B, C] float32 or None; residual like x or None. `momentum` is PyTorch's: the weight of the
    new batch in the running statistics.
    """

    op_name = "excite_norm_act_add"

    def __init__(self, channels: int, momentum: float, eps: float, activation: str, backend: Backend):
        super().__init__()
        self.momentum, self.eps, self.activation = momentum, eps, activation
        self.op = getattr(backend, self.op_name)
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def settings(self) -> dict:
        """The keyword arguments that every normalizing op takes."""
        return {"training": self.training, "momentum": self.momentum, "eps": self.eps, "activation": self.activation}

    def forward(self, x: Tensor, gate: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
        return self.op(x, gate, self.bias, residual, self.running_mean, self.running_var, **self.settings())


class PoolNormAct(NormAct):
    """act(batch_norm(max_pool2d(x, 2))), if forked once for each of two users, and its mean over H and W if asked for,
    which a squeeze-and-excite gate takes.

    x [B, C, H, W] -> ([B, C, H // 2, W // 2], again if forked, [B, C] float32 or None)
    """

    op_name = "pool_norm_act"

    def forward(self, x: Tensor, squeeze: bool, fork: bool) -> tuple[Tensor | None, ...]:
        statistics = (self.running_mean, self.running_var)
        return self.op(x, self.bias, *statistics, squeeze=squeeze, fork=fork, **self.settings())


class SEGate(nn.Module):
    """The squeeze-and-excite gate: sigmoid(fc2(act(fc1(squeeze)))), squeeze and gate [B, C] float32."""

    def __init__(self, channels: int, reduction: int, activation: str, backend: Backend):
        super().__init__()
        hidden = max(1, channels // reduction)
        self.activation = activation
        self.op = backend.se_gate
        self.fc1 = nn.Linear(channels, hidden)
        self.fc2 = nn.Linear(hidden, channels)

    def forward(self, squeeze: Tensor) -> Tensor:
        weights = (self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias)
        return self.op(squeeze, *weights, activation=self.activation)


class Stem(nn.Module):
    """What every stem holds: the pixel statistics that normalize the images.

    Called with images [B, C, H, W] uint8 (or the data set and what `gather` takes of it) and the dtype of its result.
    """

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.out_channels = out_channels
        self.register_buffer("mean", torch.zeros(in_channels))
        self.register_buffer("std", torch.ones(in_channels))


class PlainStem(Stem):
    """images -> normalize -> trained 3x3 'same' convolution -> BatchNorm -> activation: a stem without whitening."""

    def __init__(self, in_channels: int, channels: int, norm: NormAct, conv3x3: Callable):
        super().__init__(in_channels, channels)
        self.conv = Conv3x3(in_channels, channels, conv3x3)
        self.norm = norm

    def forward(self, images: Tensor, gather: Gather | None, dtype: torch.dtype) -> Tensor:
        return self.norm(self.conv(normalize(images, self.mean, self.std, dtype, gather)))


class FrozenStem(Stem):
    """A stem whose first convolution has frozen whitening filters.

    `padding` 'same' pads with zeros in normalized space, which is no pixel value, so no kernel can fold the
    normalization away: padded stems run the plain convolution on every backend.
    """

    def __init__(self, in_channels: int, filters: int, kernel_size: int, padding: int | str, out_channels: int):
        super().__init__(in_channels, out_channels)
        self.whiten = nn.Conv2d(in_channels, filters, kernel_size, padding=padding, bias=False)
        self.whiten.weight.requires_grad_(False)
        self.fusable = padding == 0

    def padded_convolution(self, images: Tensor, gather: Gather | None, dtype: torch.dtype) -> Tensor:
        """The 'same' whitening convolution, without bias, as PyTorch pads: an even kernel's extra row at the end."""
        x = normalize(images, self.mean, self.std, dtype, gather)
        k = self.whiten.kernel_size[0]
        # said here, PyTorch does not warn of it
        return F.conv2d(F.pad(x, ((k - 1) // 2, k // 2) * 2), self.whiten.weight.to(dtype))

    def fused(self, images: Tensor, gather: Gather | None, dtype: torch.dtype, *arguments, **options) -> Tensor:
        """The op of an unpadded stem, with what it takes besides images, filters and statistics."""
        own = {"mean": self.mean, "std": self.std, "dtype": dtype, "gather": gather}
        return self.op(images, self.whiten.weight, *arguments, **own, **options)


class ProjectedStem(FrozenStem):
    """images -> normalize -> whitening -> trained 1x1 projection -> BatchNorm -> activation: one op where unpadded."""

    def __init__(
        self, in_channels: int, channels: int, kernel_size: int, padding: int | str, norm: NormAct, backend: Backend
    ):
        features = in_channels * kernel_size**2
        super().__init__(in_channels, features, kernel_size, padding, channels)
        self.project = nn.Conv2d(features, channels, 1, bias=False)
        self.norm = norm
        self.op = backend.whiten_project_norm_act

    def forward(self, images: Tensor, gather: Gather | None, dtype: torch.dtype) -> Tensor:
        norm = self.norm
        if not self.fusable:
            return norm(self.project(self.padded_convolution(images, gather, dtype)))
        trained = (self.project.weight, norm.bias, norm.running_mean, norm.running_var)
        return self.fused(images, gather, dtype, *trained, **norm.settings())


class WhitenStem(FrozenStem):
    """images -> normalize -> whitening by each filter and its negative, with a trained bias -> activation: one op.

    Source: airbench94. The bias starts uniform in +-1/sqrt(fan in), PyTorch's own.
    """

    def __init__(self, in_channels: int, kernel_size: int, padding: int | str, activation: str, backend: Backend):
        features = in_channels * kernel_size**2
        super().__init__(in_channels, 2 * features, kernel_size, padding, 2 * features)
        bound = features**-0.5
        self.bias = nn.Parameter(torch.empty(2 * features).uniform_(-bound, bound))
        self.activation = activation
        self.op, self.act = backend.whiten, ACTIVATIONS[activation]

    def forward(self, images: Tensor, gather: Gather | None, dtype: torch.dtype) -> Tensor:
        if not self.fusable:
            return self.act(self.padded_convolution(images, gather, dtype) + self.bias.to(dtype)[:, None, None])
        return self.fused(images, gather, dtype, self.bias, activation=self.activation)


class ConvGroup(nn.Module):
    """conv1 -> max-pool 2x2 -> norm -> act = r; then `depth` more convolutions, each -> norm -> act.

    An SE gate is made of r's mean and multiplies the last of them before its norm; a residual adds r after its act.
    depth 2 with both is hlb-CIFAR10's group, depth 1 with neither airbench94's, depth 0 stops at r.
    """

    def __init__(
        self, in_channels: int, channels: int, depth: int, residual: bool, se: SEGate | None, make_norm, conv3x3
    ):
        """make_norm(channels, kind) makes a NormAct or PoolNormAct; conv3x3: the convolution to use."""
        super().__init__()
        self.depth, self.residual, self.se = depth, residual, se
        self.conv1 = Conv3x3(in_channels, channels, conv3x3)
        self.norm1 = make_norm(channels, PoolNormAct)
        for i in range(2, depth + 2):
            self.add_module(f"conv{i}", Conv3x3(channels, channels, conv3x3))
            self.add_module(f"norm{i}", make_norm(channels))

    def forward(self, x: Tensor) -> Tensor:
        # the residual's gradient reaches the pooling's backward by itself: nothing sums the two before
        fork = self.residual and self.depth > 0
        r, *residual, squeeze = self.norm1(self.conv1(x), squeeze=self.se is not None, fork=fork)
        gate = None if self.se is None else self.se(squeeze)
        x = r
        for i in range(2, self.depth + 2):
            last = i == self.depth + 1
            conv, norm = getattr(self, f"conv{i}"), getattr(self, f"norm{i}")
            x = norm(conv(x), gate if last else None, residual[0] if last and fork else None)
        return x
