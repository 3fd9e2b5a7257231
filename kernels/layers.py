"""nn.Modules over the ops, for networks of your own."""

import torch
from torch import Tensor, nn

from .dispatch import whiten


class Whiten(nn.Module):
    """Normalization and frozen whitening convolution on uint8 images, with a trained bias unless bias=False.

    weight [O, C, k, k] (see `whitening` for how to make one); mean, std [C] in units of 0..1.
    images [B, C, H, W] uint8 -> [B, O, H - k + 1, W - k + 1]; channels_last is fastest.
    """

    def __init__(self, weight: Tensor, mean: Tensor, std: Tensor, bias: bool = True, activation: str | None = "gelu"):
        super().__init__()
        self.register_buffer("weight", weight.detach().clone())
        self.register_buffer("mean", mean.detach().float().clone())
        self.register_buffer("std", std.detach().float().clone())
        self.bias = nn.Parameter(torch.zeros(weight.shape[0])) if bias else None
        self.activation = activation

    def forward(self, images: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return whiten(
            images, self.weight, self.bias, mean=self.mean, std=self.std, activation=self.activation, dtype=dtype
        )
