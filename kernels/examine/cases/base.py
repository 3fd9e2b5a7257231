"""What a case is: one call of one op with its arguments and costs."""

import inspect
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod

import torch
from torch import Tensor

from ... import reference
from ...gather import Gather
from ...registry import OPS, Argument, Arguments, Cost, Op
from .values import GATHER, random_value

Tensors = dict[str, Tensor | list[Tensor] | None]

# options that change numbers and no work
_UNTOLD = ("momentum", "eps", "weight_decay", "coefficients")


def mapped(function: Callable, value):
    """function of a value, or of every one of a list; None stays None."""
    if value is None:
        return None
    return [function(v) for v in value] if isinstance(value, list) else function(value)


def named(name: str, value: Tensor | list[Tensor] | None) -> dict[str, Tensor]:
    """A tensor under its name, the tensors of a list as name[0], name[1] and so on."""
    if value is None:
        return {}
    return {f"{name}[{i}]": v for i, v in enumerate(value)} if isinstance(value, list) else {name: value}


@dataclass(frozen=True)
class Case:
    """One call of one op, made of what its file registers.

    arguments: shapes and dtypes by name. Names "gather.*", here and in the options, are fields of the op's `gather`:
        what copies or converts arguments handles tensors only.
    options: keyword arguments; states_dtype: whether the call states the dtype of its result where the op lets it.
    """

    op: str
    arguments: Arguments
    options: dict
    states_dtype: bool = True

    @property
    def known(self) -> Op:
        return OPS[self.op]

    @property
    def differentiable(self) -> tuple[str, ...]:
        """The arguments that get a gradient, none if the op is not differentiable."""
        return tuple(name for name in self.known.differentiable if self.arguments.get(name) is not None)

    @property
    def buffers(self) -> tuple[str, ...]:
        """The arguments that the op updates in place."""
        return self.known.updates

    @property
    def takes_dtype(self) -> bool:
        return "dtype" in self._defaults

    @cached_property
    def _defaults(self) -> dict:
        parameters = inspect.signature(getattr(reference, self.op)).parameters.values()
        return {p.name: p.default for p in parameters if p.default is not p.empty}

    @property
    def all_options(self) -> dict:
        """The options of the call, and the op's own where it states none."""
        return {**self._defaults, **self.options}

    def cost(self, itemsize: int) -> dict[str, Cost]:
        """Of the forward pass, and of the backward pass if there is one, for activations of that many bytes."""
        return self.known.cost(self.arguments, self.all_options, itemsize)

    def make(self, device: torch.device, dtype: torch.dtype) -> Tensors:
        """Fresh random arguments by name, activations and weights in `dtype`."""
        facts = {**self.arguments, **self.options}

        def values(name: str):
            return lambda argument: random_value(name, argument, facts, device, dtype)

        # images and activations last
        made = {name: mapped(values(name), self.arguments[name]) for name in reversed(self.arguments)}
        return {name: made[name] for name in self.arguments}

    def combined(self, ops, tensors: Tensors, dtype: torch.dtype) -> Tensor:
        """What `call` returns, as one tensor."""
        return self.combine(self.call(ops, tensors, dtype), tensors)

    def combine(self, y: Tensor | tuple[Tensor, ...] | list[Tensor] | None, tensors: Tensors) -> Tensor:
        """One tensor that depends on every output that has a gradient, or else on every result: what is compared where
        one tensor is wanted. y: what a call on these tensors returned.
        """
        if y is None or isinstance(y, list):
            # an op that only updates its buffers, or one of many results
            values = y or [v for name in self.buffers for v in named(name, tensors[name]).values()]
            return torch.cat([v.detach().flatten() for v in values])
        if not isinstance(y, tuple):
            return y
        first, *others = (v for v in y if v is not None and v.is_floating_point())
        alike = [v for v in others if v.shape == first.shape]
        for value in others:
            if value.shape != first.shape:
                first = first + value.reshape(*value.shape, *(1,) * (first.dim() - value.dim())).to(first.dtype)
        # side by side, so that each gets a gradient of its own
        return torch.cat([first, *alike]) if alike else first

    def call(self, ops, tensors: Tensors, dtype: torch.dtype) -> Tensor | tuple[Tensor, ...] | list[Tensor] | None:
        """Call the op of the package or of its `reference`; dtype is the result's where the op lets one choose."""
        arguments = {**tensors, **self.options, **({"dtype": dtype} if self.states_dtype and self.takes_dtype else {})}
        fields = {name: arguments.pop(name) for name in list(arguments) if name.startswith(GATHER)}
        if fields:
            arguments["gather"] = Gather(**{name.removeprefix(GATHER): value for name, value in fields.items()})
        return getattr(ops, self.op)(**arguments)

    @cached_property
    def label(self) -> str:
        """Shapes, and what differs from a call with every argument and the op's own options."""
        present = {name: value for name, value in self.arguments.items() if value is not None}
        first, *others = ((name, value) for name, value in present.items() if not name.startswith(GATHER))
        parts = [_shapes(first[1])]
        seen = set()
        for name, value in others:
            if isinstance(value, list):
                if any(v.dtype != w.dtype for v, w in zip(value, first[1])):
                    parts.append(f"{name}-{value[0].dtype}".replace("torch.", ""))
            elif "weight" in name and len(value.shape) > 1 and tuple(sorted(value.shape)) not in seen:
                seen.add(tuple(sorted(value.shape)))
                parts.append(_shapes(value))
            elif name == "weight":
                # of a normalization, which need not have one
                parts.append(name)
        parts += [f"no{name}" for name, value in self.arguments.items() if value is None]
        if "lr" in present and present["lr"].numel > 1:
            parts.append("rates")
        if GATHER + "index" in present:
            batch, gathered = present[GATHER + "index"].shape[0], [n for n in present if n.startswith(GATHER)]
            parts[0] = _shapes(present["images"]._replace(shape=(batch, *present["images"].shape[1:])))
            parts.append("gather" + "".join(sorted(name.removeprefix(GATHER)[0] for name in gathered[1:])))
        for name, value in self.options.items():
            if name == "activation" or (isinstance(value, str) and value != self._defaults.get(name)):
                parts.append(str(value))
            elif name not in _UNTOLD and not name.startswith(GATHER) and value != self._defaults.get(name):
                parts.append(f"{'' if value else 'no'}{name}" if isinstance(value, bool) else f"{name}{value:g}")
        return "-".join(parts)

    def with_fewer(self, divisor: int) -> "Case":
        """Of an op on lists, the same call on tensors of as many times fewer channels."""
        if not any(isinstance(value, list) for value in self.arguments.values()):
            return self

        def narrowed(argument: Argument) -> Argument:
            few = (max(4, size // divisor) for size in argument.shape[:2])
            return argument._replace(shape=(*few, *argument.shape[2:]))

        lists = {n: mapped(narrowed, v) if isinstance(v, list) else v for n, v in self.arguments.items()}
        return replace(self, arguments=lists)


def _shapes(value: Argument | list[Argument]) -> str:
    """Of a list as matrices, equal ones counted: 64x216+3*256x2304; of many different ones only how many values."""
    if isinstance(value, Argument):
        return "x".join(map(str, value.shape))
    counts = Counter("x".join(map(str, [*v.shape[:1], *([prod(v.shape[1:])] if v.shape[1:] else [])])) for v in value)
    if len(counts) > 4:
        return f"{len(value)}-tensors-{sum(v.numel for v in value)}"
    return "+".join(f"{n}*{name}" if n > 1 else name for name, n in counts.items())


def case_of(op: str, *sizes, **keywords) -> Case:
    """A call of `op` at these sizes, as its file's `arguments` takes them; other keywords are options of the call."""
    known = OPS[op]
    own = inspect.signature(known.arguments).parameters
    made = known.arguments(*sizes, **{name: keywords.pop(name) for name in list(keywords) if name in own})
    stated = {name: value for name, value in made.items() if isinstance(value, Argument | list) or value is None}
    options = known.options | keywords | {name: value for name, value in made.items() if name not in stated}
    return Case(op, stated, options)
