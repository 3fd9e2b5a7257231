"""Cases of the optimizer ops, which take lists of tensors."""

import math
from collections import Counter

import torch
from torch import Tensor

from .base import Case, Cost, Tensors

Shapes = list[tuple[int, ...]]


def _weights(device, dtype, shapes: Shapes, scale: float = 1.0) -> list[Tensor]:
    """Filters in channels_last memory and matrices in `dtype`, vectors in float32, as a network has them."""
    values = [torch.randn(shape) * scale for shape in shapes]
    values = [v.contiguous(memory_format=torch.channels_last) if v.dim() == 4 else v for v in values]
    return [v.to(device=device, dtype=dtype if v.dim() > 1 else torch.float32) for v in values]


def _updates(device, dtype, shapes: Shapes, buffer_dtype: torch.dtype | None, rates: bool) -> Tensors:
    return {
        "params": _weights(device, dtype, shapes),
        "grads": _weights(device, dtype, shapes, 0.5),
        "momentum_buffers": _weights(device, buffer_dtype or dtype, shapes),
        "lr": torch.linspace(0.1, 0.3, len(shapes), device=device) if rates else torch.full((1,), 0.3, device=device),
    }


def _listed(shapes: Shapes) -> str:
    """Matrix shapes, equal ones counted: 64x216+3*256x2304."""
    names = [f"{shape[0]}x{math.prod(shape[1:])}" for shape in shapes]
    return "+".join(f"{n}*{name}" if n > 1 else name for name, n in Counter(names).items())


def sgd_nesterov(
    shapes: Shapes, weight_decay: float = 0.1, buffer_dtype: torch.dtype | None = None, rates: bool = False
) -> Case:
    """rates: a learning rate for each tensor."""

    def cost(itemsize):
        # read weight, gradient and momentum, write weight and momentum
        return {"fwd": Cost(sum(5 * math.prod(shape) * (itemsize if len(shape) > 1 else 4) for shape in shapes))}

    count = sum(math.prod(shape) for shape in shapes)
    label = f"{len(shapes)}-tensors-{count}" + (f"-{buffer_dtype}".replace("torch.", "") if buffer_dtype else "")
    return Case(
        "sgd_nesterov",
        label + ("-rates" if rates else ""),
        lambda device, dtype: _updates(device, dtype, shapes, buffer_dtype, rates),
        (),
        cost,
        ("params", "momentum_buffers"),
        {"momentum": 0.85, "weight_decay": weight_decay},
    )


def _iteration_flops(shapes: Shapes, steps: int) -> int:
    """Of the Gram form, whose products but the last are symmetric, half of a product each."""
    total = 0
    for shape in shapes:
        m, k = sorted((shape[0], math.prod(shape[1:])))
        # X X^T and Q X; the first step makes P, PR, PRP, each further one PQ too, the last neither PR nor PRP
        total += m * m * k + 2 * m * m * k + (4 * steps - 3) * m**3
    return total


def newton_schulz(shapes: Shapes, steps: int = 3) -> Case:
    def make(device, dtype):
        matrices = [torch.randn(shape[0], math.prod(shape[1:])) for shape in shapes]
        return {"matrices": [m.to(device=device, dtype=dtype) for m in matrices]}

    def cost(itemsize):
        count = sum(math.prod(shape) for shape in shapes)
        # read for the norm, for R = X X^T and for Q X, write Q X
        return {"fwd": Cost(4 * count * itemsize, _iteration_flops(shapes, steps))}

    label = f"{_listed(shapes)}-{steps}steps"
    return Case("newton_schulz", label, make, (), cost, options={"steps": steps}, takes_dtype=True)


def muon(
    shapes: Shapes,
    weight_decay: float = 0.0,
    renormalize: bool = True,
    buffer_dtype: torch.dtype | None = None,
    rates: bool = False,
) -> Case:
    """rates: a learning rate for each tensor."""

    def cost(itemsize):
        count = sum(math.prod(shape) for shape in shapes)
        # read weight, gradient and momentum, write momentum and X; read X for R; read X and weight, write weight
        return {"fwd": Cost(9 * count * itemsize, _iteration_flops(shapes, 3))}

    label = _listed(shapes) + ("" if renormalize else "-asis") + ("-rates" if rates else "")
    return Case(
        "muon",
        label + (f"-{buffer_dtype}".replace("torch.", "") if buffer_dtype else ""),
        lambda device, dtype: _updates(device, dtype, shapes, buffer_dtype, rates),
        (),
        cost,
        ("params", "momentum_buffers"),
        {"momentum": 0.6, "weight_decay": weight_decay, "renormalize": renormalize},
        takes_dtype=True,
    )


def _gate_shapes(channels: int) -> Shapes:
    hidden = channels // 16
    return [(hidden, channels), (hidden,), (channels, hidden), (channels,)]


# what the hlb network trains: filters, gates, BatchNorm biases, head
HLB_SHAPES: Shapes = [
    (32, 12, 1, 1), (128, 32, 3, 3), (128, 128, 3, 3), (128, 128, 3, 3), (256, 128, 3, 3), (512, 256, 3, 3),
    (512, 512, 3, 3), (512, 512, 3, 3), *_gate_shapes(128), *_gate_shapes(512), (32,), (128,), (128,), (128,), (256,),
    (512,), (512,), (512,), (10, 512),
]  # fmt: skip
# the filters of airbench94_muon
AIR_FILTERS: Shapes = [(64, 24, 3, 3), (64, 64, 3, 3), (256, 64, 3, 3), *[(256, 256, 3, 3)] * 3]


def narrowed(shapes: Shapes, divisor: int) -> Shapes:
    return [(*(max(4, size // divisor) for size in shape[:2]), *shape[2:]) for shape in shapes]
