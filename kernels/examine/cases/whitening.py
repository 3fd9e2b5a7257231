"""Cases of the ops that read pixels."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .base import GATHER, Case, Cost, Tensors, images, running_statistics

GATHER_PARTS = ("shift", "flip", "jitter", "cutout")


def _pixel_statistics(device, channels: int) -> Tensors:
    return {
        "mean": torch.linspace(0.45, 0.49, channels, device=device),
        "std": torch.linspace(0.24, 0.26, channels, device=device),
    }


def gather_fields(
    device, data: int, batch: int, height: int, width: int, parts: tuple[str, ...], cutout_size: int
) -> Tensors:
    """Random fields of a `Gather` of `batch` images out of `data`, each at most once while there are enough."""

    def pairs(bottom: Callable[[int], int], top: Callable[[int], int]) -> Tensor:
        return torch.stack([torch.randint(bottom(size), top(size), (batch,)) for size in (height, width)], 1)

    index = torch.randperm(data)[:batch] if batch <= data else torch.randint(0, data, (batch,))
    made = {
        "shift": lambda: pairs(lambda size: -min(3, size - 1), lambda size: min(3, size - 1) + 1),
        "flip": lambda: torch.rand(batch) < 0.5,
        "jitter": lambda: torch.tensor([1.0, 0.0]) + torch.tensor([0.3, 0.2]) * (2 * torch.rand(batch, 2) - 1),
        "cutout": lambda: pairs(lambda size: -cutout_size, lambda size: size + 1),
    }
    return {GATHER + "index": index.to(device)} | {GATHER + part: made[part]().to(device) for part in parts}


@dataclass(frozen=True)
class _Batch:
    """The images of a whitening case: as they are, or taken out of twice as many by a `Gather` with these `parts`."""

    batch: int
    height: int
    width: int
    channels: int
    parts: tuple[str, ...] | None

    def make(self, device) -> Tensors:
        size = (self.height, self.width)
        if self.parts is None:
            return {"images": images(device, self.batch, *size, self.channels)}
        fields = gather_fields(device, 2 * self.batch, self.batch, *size, self.parts, self.cutout_size)
        return {"images": images(device, 2 * self.batch, *size, self.channels), **fields}

    @property
    def cutout_size(self) -> int:
        return max(2, min(self.height, self.width) // 4)

    @property
    def options(self) -> dict:
        return {GATHER + "cutout_size": self.cutout_size} if "cutout" in (self.parts or ()) else {}

    @property
    def label(self) -> str:
        """The parts by their first letters."""
        return "" if self.parts is None else "-gather" + ("-" if self.parts else "") + "".join(p[0] for p in self.parts)


def whiten(
    batch: int,
    height: int,
    width: int,
    filters: int,
    kernel: int = 2,
    channels: int = 3,
    bias: bool = True,
    activation: str | None = "gelu",
    gather: tuple[str, ...] | None = None,
) -> Case:
    """gather: the parts of a `Gather` besides its index."""
    source = _Batch(batch, height, width, channels, gather)

    def make(device, dtype):
        weight = torch.randn(filters, channels, kernel, kernel, device=device) / kernel
        return {
            **source.make(device),
            "weight": weight,
            "bias": torch.randn(filters, device=device) if bias else None,
            **_pixel_statistics(device, channels),
        }

    label = f"{batch}x{height}x{width}x{channels}-{filters}k{kernel}-{activation}{'' if bias else '-nobias'}"
    label += source.label

    def cost(itemsize):
        pixels = batch * height * width * channels
        positions = batch * (height - kernel + 1) * (width - kernel + 1)
        y = positions * filters * itemsize
        product = 2 * positions * filters * channels * kernel**2
        return {
            "fwd": Cost(pixels + y, product),  # read images, write y
            # read dy, and the images only where the activation needs z again
            "bwd": Cost(y + pixels, product) if activation else Cost(y),
        }

    trained = ("bias",) if bias else ()
    options = {"activation": activation, **source.options}
    return Case("whiten", label, make, trained, cost, options=options, takes_dtype=True)


def whiten_project_norm_act(
    batch: int,
    height: int,
    width: int,
    out_channels: int,
    kernel: int = 2,
    channels: int = 3,
    training: bool = True,
    activation: str | None = "gelu",
    eps: float = 1e-12,
    gather: tuple[str, ...] | None = None,
) -> Case:
    """gather: the parts of a `Gather` besides its index."""
    filters = channels * kernel**2
    source = _Batch(batch, height, width, channels, gather)

    def make(device, dtype):
        return {
            **source.make(device),
            "whiten_weight": torch.randn(filters, channels, kernel, kernel, device=device) / kernel,
            "project_weight": (torch.randn(out_channels, filters, 1, 1) * 0.3).to(device=device, dtype=dtype),
            "bias": torch.randn(out_channels, device=device),
            **running_statistics(device, out_channels),
            **_pixel_statistics(device, channels),
        }

    def cost(itemsize):
        pixels = batch * height * width * channels
        positions = batch * (height - kernel + 1) * (width - kernel + 1)
        y = positions * out_channels * itemsize
        product = 2 * positions * out_channels * filters
        moments = 2 * positions * filters**2 if training else 0
        return {
            # training reads the images twice: y needs the batch moments; write y. A gather reads as many pixels
            "fwd": Cost(pixels * (2 if training else 1) + y, product + moments),
            "bwd": Cost(pixels + y, 2 * product),  # read images and dy once; z again and G = g^T q
        }

    label = f"{batch}x{height}x{width}x{channels}-{out_channels}k{kernel}-{activation}{'' if training else '-eval'}"
    label += source.label
    return Case(
        "whiten_project_norm_act",
        label,
        make,
        ("project_weight", "bias"),
        cost,
        ("running_mean", "running_var"),
        {"training": training, "momentum": 0.8, "eps": eps, "activation": activation, **source.options},
        takes_dtype=True,
    )
