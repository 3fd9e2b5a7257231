"""What a case is: one call of one op with its arguments and costs."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...gather import Gather

Tensors = dict[str, Tensor | list[Tensor] | None]


def mapped(function: Callable[[Tensor], Tensor], value: Tensor | list[Tensor] | None):
    """function of a tensor, or of every tensor of a list; None stays None."""
    if value is None:
        return None
    return [function(v) for v in value] if isinstance(value, list) else function(value)


def named(name: str, value: Tensor | list[Tensor] | None) -> dict[str, Tensor]:
    """A tensor under its name, the tensors of a list as name[0], name[1] and so on."""
    if value is None:
        return {}
    return {f"{name}[{i}]": v for i, v in enumerate(value)} if isinstance(value, list) else {name: value}


GATHER = "gather."


@dataclass(frozen=True)
class Cost:
    """Bytes moved and floating-point operations (a multiply-add is two), of the matrix products only."""

    bytes: int
    flops: int = 0


@dataclass(frozen=True)
class Case:
    """One call of one op.

    make(device, dtype): fresh random arguments by name, activations and weights in `dtype`. Names "gather.*", here and
        in the options, are fields of the op's `gather`: what copies or converts arguments handles tensors only.
    differentiable: the arguments that get a gradient, none if the op is not differentiable; buffers: those that the op
    updates in place.
    cost(itemsize): of the forward pass, and of the backward pass if there is one, for activations of that many bytes.
    options: keyword arguments; takes_dtype: whether the op has a `dtype` option for its result.
    combine: of an op that returns a tuple: one tensor that depends on every output that has a gradient.
    """

    op: str
    label: str
    make: Callable[[torch.device, torch.dtype], Tensors]
    differentiable: tuple[str, ...]
    cost: Callable[[int], dict[str, Cost]]
    buffers: tuple[str, ...] = ()
    options: dict = field(default_factory=dict)
    takes_dtype: bool = False
    combine: Callable[..., Tensor] | None = None

    def combined(self, ops, tensors: Tensors, dtype: torch.dtype) -> Tensor:
        """One tensor that depends on every output: what is called and compared where one tensor is wanted."""
        y = self.call(ops, tensors, dtype)
        if y is None or isinstance(y, list):
            # an op that only updates its buffers, or one of many results
            values = y or [v for name in self.buffers for v in named(name, tensors[name]).values()]
            return torch.cat([v.detach().flatten() for v in values])
        return self.combine(*y) if isinstance(y, tuple) else y

    def call(self, ops, tensors: Tensors, dtype: torch.dtype) -> Tensor | tuple[Tensor, ...] | list[Tensor] | None:
        """Call the op of the package or of its `reference`; dtype is the result's where the op lets one choose."""
        options = {**self.options, "dtype": dtype} if self.takes_dtype else self.options
        arguments = {**tensors, **options}
        fields = {name: arguments.pop(name) for name in list(arguments) if name.startswith(GATHER)}
        if fields:
            arguments["gather"] = Gather(**{name.removeprefix(GATHER): value for name, value in fields.items()})
        return getattr(ops, self.op)(**arguments)


def images(device, batch: int, height: int, width: int, channels: int = 3) -> Tensor:
    """Random uint8 images, smooth enough that neighbouring pixels correlate as in photographs."""
    coarse = torch.rand(batch, channels, max(1, height // 4), max(1, width // 4))
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    noisy = (smooth * 200 + torch.rand(batch, channels, height, width) * 55).to(torch.uint8)
    return noisy.to(device).contiguous(memory_format=torch.channels_last)


def activations(device, dtype, *shape: int) -> Tensor:
    x = torch.randn(shape).to(device=device, dtype=dtype)
    return x.contiguous(memory_format=torch.channels_last)


def running_statistics(device, channels: int) -> Tensors:
    return {
        "running_mean": torch.randn(channels, device=device),
        "running_var": torch.rand(channels, device=device) + 0.5,
    }
