"""Random values for the arguments of ops, by the argument's name."""

from collections.abc import Callable
from math import prod

import torch
from torch import Tensor

from ...registry import Argument

GATHER = "gather."


def images(device, batch: int, height: int, width: int, channels: int = 3) -> Tensor:
    """Random uint8 images, smooth enough that neighbouring pixels correlate as in photographs."""
    coarse = torch.rand(batch, channels, max(1, height // 4), max(1, width // 4))
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    noisy = (smooth * 200 + torch.rand(batch, channels, height, width) * 55).to(torch.uint8)
    return noisy.to(device).contiguous(memory_format=torch.channels_last)


def _images(shape: tuple[int, ...], facts: dict) -> Tensor:
    batch, channels, height, width = shape
    return images("cpu", batch, height, width, channels)


def _weight(shape: tuple[int, ...], facts: dict) -> Tensor:
    """Of outputs about as large as the inputs."""
    return torch.randn(shape) * prod(shape[1:]) ** -0.5


def _filters(shape: tuple[int, ...], facts: dict) -> Tensor:
    # a vector is a normalization's scale, of either sign
    return torch.randn(shape) / shape[-1] if shape[1:] else 0.5 + torch.randn(shape)


def _index(shape: tuple[int, ...], facts: dict) -> Tensor:
    """Each image at most once while there are enough."""
    images, (batch,) = facts["images"].shape[0], shape
    return torch.randperm(images)[:batch] if batch <= images else torch.randint(images, (batch,))


def _pairs(bottom: Callable[[int, dict], int], top: Callable[[int, dict], int]) -> Callable:
    """Integers for height and width, from the first up to below the second."""

    def draw(shape: tuple[int, ...], facts: dict) -> Tensor:
        sides = facts["images"].shape[2:]
        return torch.stack([torch.randint(bottom(side, facts), top(side, facts), shape[:1]) for side in sides], 1)

    return draw


# of the shape and of all arguments and options of the call, in float32 unless the values are integers
_VALUES: dict[str, Callable[[tuple[int, ...], dict], Tensor]] = {
    "images": _images,
    "mean": lambda shape, facts: torch.linspace(0.45, 0.49, *shape),
    "std": lambda shape, facts: torch.linspace(0.24, 0.26, *shape),
    "running_var": lambda shape, facts: torch.rand(shape) + 0.5,
    "gate": lambda shape, facts: torch.rand(shape),
    "weight": _filters,
    "whiten_weight": _filters,
    "project_weight": _weight,
    "weight1": _weight,
    "weight2": _weight,
    # as far apart as a trained network's, so that scaled they are neither all alike nor all but certain
    "logits": lambda shape, facts: torch.randn(shape) * 2 / facts["scale"],
    "labels": lambda shape, facts: torch.randint(facts["logits"].shape[1], shape),
    "grads": lambda shape, facts: torch.randn(shape) * 0.5,
    # of many, those of two groups
    "lr": lambda shape, facts: torch.where(torch.arange(*shape) < shape[0] // 2, 0.1, 0.3),
    GATHER + "index": _index,
    GATHER + "translation": _pairs(lambda side, facts: -min(3, side - 1), lambda side, facts: min(3, side - 1) + 1),
    GATHER + "flip": lambda shape, facts: torch.rand(shape) < 0.5,
    GATHER + "jitter": lambda shape, facts: (
        torch.tensor([1.0, 0.0]) + torch.tensor([0.3, 0.2]) * (2 * torch.rand(shape) - 1)
    ),
    GATHER + "cutout": _pairs(lambda side, facts: -facts[GATHER + "cutout_size"], lambda side, facts: side + 1),
}


def random_value(name: str, argument: Argument, facts: dict, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Filters and activations in channels_last memory. Where nothing is said of a name: normally distributed.

    facts: all arguments and options of the call; dtype: that of the activations.
    """
    draw = _VALUES.get(name, lambda shape, facts: torch.randn(shape))
    value = draw(argument.shape, facts).to(device=device, dtype=argument.dtype or dtype)
    return value.contiguous(memory_format=torch.channels_last) if value.dim() == 4 else value
