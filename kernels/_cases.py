"""One list of calls for every op: the shapes that the hlb network really uses, and any other.

The tests, the ahead-of-time compile check and the benchmarks all work from it, so a new op is registered once, here.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

Tensors = dict[str, Tensor | None]


@dataclass(frozen=True)
class Case:
    """One call of one op.

    make(device, dtype): fresh random arguments by name, activations and weights in `dtype`.
    differentiable: the arguments that get a gradient; buffers: those that the op updates in place.
    options: keyword arguments; takes_dtype: whether the op has a `dtype` option for its result.
    """

    op: str
    label: str
    make: Callable[[torch.device, torch.dtype], Tensors]
    differentiable: tuple[str, ...]
    buffers: tuple[str, ...] = ()
    options: dict = field(default_factory=dict)
    takes_dtype: bool = False

    def call(self, ops, tensors: Tensors, dtype: torch.dtype) -> Tensor:
        """Call the op of the package or of its `reference`; dtype is the result's where the op lets one choose."""
        options = {**self.options, "dtype": dtype} if self.takes_dtype else self.options
        return getattr(ops, self.op)(**tensors, **options)


def images(device, batch: int, height: int, width: int, channels: int = 3) -> Tensor:
    """Random uint8 images, smooth enough that neighbouring pixels correlate as in photographs."""
    coarse = torch.rand(batch, channels, max(1, height // 4), max(1, width // 4))
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    noisy = (smooth * 200 + torch.rand(batch, channels, height, width) * 55).to(torch.uint8)
    return noisy.to(device).contiguous(memory_format=torch.channels_last)


def activations(device, dtype, *shape: int) -> Tensor:
    x = torch.randn(shape).to(device=device, dtype=dtype)
    return x.contiguous(memory_format=torch.channels_last)


def _pixel_statistics(device, channels: int) -> Tensors:
    return {
        "mean": torch.linspace(0.45, 0.49, channels, device=device),
        "std": torch.linspace(0.24, 0.26, channels, device=device),
    }


def _running(device, channels: int) -> Tensors:
    return {
        "running_mean": torch.randn(channels, device=device),
        "running_var": torch.rand(channels, device=device) + 0.5,
    }


def whiten(
    batch: int,
    height: int,
    width: int,
    filters: int,
    kernel: int = 2,
    channels: int = 3,
    bias: bool = True,
    activation: str | None = "gelu",
) -> Case:
    def make(device, dtype):
        weight = torch.randn(filters, channels, kernel, kernel, device=device) / kernel
        return {
            "images": images(device, batch, height, width, channels),
            "weight": weight,
            "bias": torch.randn(filters, device=device) if bias else None,
            **_pixel_statistics(device, channels),
        }

    label = f"{batch}x{height}x{width}x{channels}-{filters}k{kernel}-{activation}{'' if bias else '-nobias'}"
    trained = ("bias",) if bias else ()
    return Case("whiten", label, make, trained, options={"activation": activation}, takes_dtype=True)


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
) -> Case:
    filters = channels * kernel**2

    def make(device, dtype):
        return {
            "images": images(device, batch, height, width, channels),
            "whiten_weight": torch.randn(filters, channels, kernel, kernel, device=device) / kernel,
            "project_weight": (torch.randn(out_channels, filters, 1, 1) * 0.3).to(device=device, dtype=dtype),
            "bias": torch.randn(out_channels, device=device),
            **_running(device, out_channels),
            **_pixel_statistics(device, channels),
        }

    label = f"{batch}x{height}x{width}x{channels}-{out_channels}k{kernel}-{activation}{'' if training else '-eval'}"
    return Case(
        "whiten_project_norm_act",
        label,
        make,
        ("project_weight", "bias"),
        ("running_mean", "running_var"),
        {"training": training, "momentum": 0.8, "eps": eps, "activation": activation},
        takes_dtype=True,
    )


def _gate_weights(device, dtype, channels: int, hidden: int) -> Tensors:
    def weight(*shape: int) -> Tensor:
        return (torch.randn(shape) * shape[-1] ** -0.5).to(device=device, dtype=dtype)

    return {
        "weight1": weight(hidden, channels),
        "bias1": weight(hidden),
        "weight2": weight(channels, hidden),
        "bias2": weight(channels),
    }


_GATE_WEIGHTS = ("weight1", "bias1", "weight2", "bias2")


def se_gate(batch: int, channels: int, hidden: int, activation: str | None = "gelu") -> Case:
    def make(device, dtype):
        squeeze = torch.randn(batch, channels).to(device=device, dtype=dtype).float()
        return {"squeeze": squeeze, **_gate_weights(device, dtype, channels, hidden)}

    label = f"{batch}x{channels}-{hidden}-{activation}"
    return Case("se_gate", label, make, ("squeeze", *_GATE_WEIGHTS), options={"activation": activation})


def excite_norm_act_add(
    batch: int,
    channels: int,
    height: int,
    width: int,
    gate: bool = True,
    residual: bool = True,
    training: bool = True,
    activation: str | None = "gelu",
    eps: float = 1e-12,
) -> Case:
    shape = (batch, channels, height, width)

    def make(device, dtype):
        return {
            "x": activations(device, dtype, *shape),
            "gate": torch.rand(batch, channels, device=device) if gate else None,
            "bias": torch.randn(channels, device=device),
            "residual": activations(device, dtype, *shape) if residual else None,
            **_running(device, channels),
        }

    label = "x".join(map(str, shape)) + f"-{activation}"
    label += "".join(f"-no{name}" for name, on in (("gate", gate), ("residual", residual)) if not on)
    present = [name for name, on in (("gate", gate), ("residual", residual)) if on]
    return Case(
        "excite_norm_act_add",
        label + ("" if training else "-eval"),
        make,
        ("x", "bias", *present),
        ("running_mean", "running_var"),
        {"training": training, "momentum": 0.8, "eps": eps, "activation": activation},
    )


def squeeze_excite(
    batch: int, channels: int, height: int, width: int, hidden: int, activation: str | None = "relu"
) -> Case:
    def make(device, dtype):
        x = activations(device, dtype, batch, channels, height, width)
        return {"x": x, **_gate_weights(device, dtype, channels, hidden)}

    label = f"{batch}x{channels}x{height}x{width}-{hidden}-{activation}"
    return Case("squeeze_excite", label, make, ("x", *_GATE_WEIGHTS), options={"activation": activation})


def network_cases(batch: int = 512) -> list[Case]:
    """Every call of the hlb network in a training step on 32x32 images, and whiten as airbench's stem has it."""
    return [
        whiten(batch, 32, 32, 24),
        whiten(batch, 32, 32, 12),
        whiten_project_norm_act(batch, 32, 32, 32),
        whiten_project_norm_act(batch, 32, 32, 32, kernel=3),
        excite_norm_act_add(batch, 128, 15, 15, gate=False, residual=False),
        excite_norm_act_add(batch, 256, 7, 7, gate=False, residual=False),
        excite_norm_act_add(batch, 512, 3, 3, gate=False, residual=False),
        se_gate(batch, 128, 8),
        se_gate(batch, 512, 32),
        excite_norm_act_add(batch, 128, 15, 15),
        excite_norm_act_add(batch, 512, 3, 3),
        squeeze_excite(batch, 128, 15, 15, 8, activation="gelu"),
        squeeze_excite(batch, 512, 3, 3, 32, activation="gelu"),
    ]


def small_cases() -> list[Case]:
    """One cheap call of every op."""
    return [
        whiten(2, 6, 7, 12),
        whiten_project_norm_act(2, 6, 7, 5),
        se_gate(3, 20, 5),
        excite_norm_act_add(2, 12, 3, 5),
        squeeze_excite(2, 12, 3, 5, 4),
    ]
