"""nn.Modules over the ops, for networks of your own."""

import torch
from torch import Tensor, nn

from .squeeze_excite import squeeze_excite
from .whiten import whiten


class SqueezeExcite(nn.Module):
    """Drop-in for torchvision.ops.SqueezeExcitation (sigmoid gate): same arguments, parameters and state_dict.

    x [B, C, H, W] floating -> x * gate, channels_last; an input in another memory format is converted (one copy).
    """

    def __init__(self, input_channels: int, squeeze_channels: int, activation: str | None = "relu"):
        super().__init__()
        self.fc1 = nn.Conv2d(input_channels, squeeze_channels, 1)
        self.fc2 = nn.Conv2d(squeeze_channels, input_channels, 1)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        weights = (self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias)
        return squeeze_excite(x, *weights, activation=self.activation)


class Whiten(nn.Module):
    """Normalization and frozen whitening convolution on uint8 images, with a trained bias unless bias=False.

    weight [O, C, k, k] (see `whitening` for how to make one); mean, std [C] in units of 0..1.
    images [B, C, H, W] uint8 -> [B, O, H - k + 1, W - k + 1]; converted to channels_last if they are not.
    """

    def __init__(self, weight: Tensor, mean: Tensor, std: Tensor, bias: bool = True, activation: str | None = "gelu"):
        super().__init__()
        self.register_buffer("weight", weight.detach().clone())
        self.register_buffer("mean", mean.detach().float().clone())
        self.register_buffer("std", std.detach().float().clone())
        self.bias = nn.Parameter(torch.zeros(weight.shape[0])) if bias else None
        self.activation = activation

    def forward(self, images: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        images = images.contiguous(memory_format=torch.channels_last)
        return whiten(
            images, self.weight, self.bias, mean=self.mean, std=self.std, activation=self.activation, dtype=dtype
        )
