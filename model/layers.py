"""Layers: nn.Modules over the ops of a backend. A network knows layers only; a layer knows one op."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.reference import normalize
from model.backend import Backend


class NormAct(nn.Module):
    """act(batch_norm(x * gate)) + residual, with a trained bias and a scale fixed at 1.

    x [B, C, H, W]; gate [B, C] float32 or None; residual like x or None. `momentum` is PyTorch's: the weight of the
    new batch in the running statistics.
    """

    def __init__(self, channels: int, momentum: float, eps: float, activation: str, backend: Backend):
        super().__init__()
        self.momentum, self.eps, self.activation = momentum, eps, activation
        self.op = backend.excite_norm_act_add
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

    def __init__(self, channels: int, momentum: float, eps: float, activation: str, backend: Backend):
        super().__init__(channels, momentum, eps, activation, backend)
        self.op = backend.pool_norm_act

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


class WhitenStem(nn.Module):
    """uint8 images -> normalize -> frozen whitening convolution -> trained 1x1 projection -> BatchNorm -> activation.

    Unpadded, it is one fused op. With 'same' padding the border is zero in normalized space, which is no pixel value,
    so no kernel can fold the normalization away: those stems run the plain convolution on every backend.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        kernel_size: int,
        padding: int | str,
        norm: NormAct,
        backend: Backend,
    ):
        super().__init__()
        features = in_channels * kernel_size**2
        self.whiten = nn.Conv2d(in_channels, features, kernel_size, padding=padding, bias=False)
        self.whiten.weight.requires_grad_(False)
        self.project = nn.Conv2d(features, channels, 1, bias=False)
        self.norm = norm
        self.op = backend.whiten_project_norm_act
        self.fusable = padding == 0
        self.register_buffer("mean", torch.zeros(in_channels))
        self.register_buffer("std", torch.ones(in_channels))

    def forward(self, images: Tensor) -> Tensor:
        device = images.device.type
        dtype = self.project.weight.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        if not self.fusable:
            x = normalize(images, self.mean, self.std, dtype)
            k = self.whiten.kernel_size[0]
            # as 'same' pads, an even kernel's extra row and column at the end; said here, PyTorch does not warn of it
            x = F.conv2d(F.pad(x, ((k - 1) // 2, k // 2) * 2), self.whiten.weight.to(dtype))
            return self.norm(self.project(x))
        norm = self.norm
        return self.op(
            images,
            self.whiten.weight,
            self.project.weight,
            norm.bias,
            norm.running_mean,
            norm.running_var,
            mean=self.mean,
            std=self.std,
            dtype=dtype,
            **norm.settings(),
        )


class ConvGroup(nn.Module):
    """conv1 -> max-pool 2x2 -> norm -> act = r;
    unless short, conv2 -> norm -> act -> conv3 -> x gate -> norm -> act, + r.
    """

    def __init__(self, in_channels: int, channels: int, short: bool, se: SEGate | None, make_norm):
        """make_norm(channels, kind) makes a NormAct or PoolNormAct."""
        super().__init__()
        self.conv1 = _conv3x3(in_channels, channels)
        self.norm1 = make_norm(channels, PoolNormAct)
        self.short = short
        if short:
            return
        self.se = se
        self.conv2 = _conv3x3(channels, channels)
        self.norm2 = make_norm(channels)
        self.conv3 = _conv3x3(channels, channels)
        self.norm3 = make_norm(channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        if self.short:
            return self.norm1(x, squeeze=False, fork=False)[0]
        r, residual, squeeze = self.norm1(x, squeeze=self.se is not None, fork=True)
        gate = None if self.se is None else self.se(squeeze)
        return self.norm3(self.conv3(self.norm2(self.conv2(r))), gate, residual)


def _conv3x3(in_channels: int, channels: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, channels, 3, padding="same", bias=False)
