"""What an op requires of its tensors, checked once at its boundary, so that kernels take no strides.

Images, logits and what is updated in place are refused where their memory is not what the kernels read; of everything
smaller a contiguous copy is taken. Lazily negated arguments are resolved by the dispatcher before an operator runs.
"""

import torch
from torch import Tensor

from . import launching
from .differentiation import transformed
from .gather import Gather
from .reference import ACTIVATIONS, GATES

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def device(op: str, *tensors: Tensor | None) -> None:
    """All on one device, and one that the kernels run on, as they cannot under a torch.func transform."""
    if transformed():
        raise RuntimeError(
            f"{op}: the kernels take no torch.func transform and no forward-mode AD; blink.kernels.{op} and "
            f"reference.{op} do, in plain PyTorch"
        )
    present = [t for t in tensors if t is not None]
    where = present[0].device
    for t in present:
        if t.device != where:
            raise ValueError(f"{op}: all tensors must be on one device, found {where} and {t.device}")
    if where.type == "cuda" or launching.capturing():
        return
    if not launching.interpreting():
        raise RuntimeError(
            f"{op}: the kernels need a GPU and the tensors are on {where}; use the reference ops, "
            "or set TRITON_INTERPRET=1 before importing to interpret the kernels"
        )
    if any(t.dtype == torch.bfloat16 for t in present):
        raise RuntimeError(f"{op}: Triton's interpreter computes bfloat16 wrongly; use float32 or float16 there")


def activation(op: str, name: str | None) -> None:
    if name not in ACTIVATIONS:
        raise ValueError(f"{op}: unknown activation {name!r}; expected one of {', '.join(map(str, ACTIVATIONS))}")


def gate_activation(op: str, name: str) -> None:
    if name not in GATES:
        raise ValueError(f"{op}: unknown gate_activation {name!r}; expected one of {', '.join(GATES)}")


def tensor(op: str, name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, found {type(x).__name__}")


def matches(op: str, name: str, x: Tensor, expected: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> None:
    """x is a tensor of this shape and one of these dtypes."""
    tensor(op, name, x)
    shape(op, name, x, expected)
    dtype(op, name, x, dtypes)


def operand(op: str, name: str, x: Tensor, expected: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> Tensor:
    """x, which `matches`, in contiguous memory: a copy, which autograd sees, if it is strided or expanded."""
    matches(op, name, x, expected, dtypes)
    return x.contiguous()


def affine(op: str, bias: Tensor, weight: Tensor | None, channels: int) -> tuple[Tensor, Tensor | None]:
    """A normalization's shift, and its scale if there is one: `operand`s [channels]."""
    bias = operand(op, "bias", bias, (channels,), FLOATS)
    return bias, None if weight is None else operand(op, "weight", weight, (channels,), FLOATS)


def constant(op: str, **tensors: Tensor | None) -> None:
    """None of these requires a gradient, which the op would not give."""
    for name, x in tensors.items():
        if x is not None and x.requires_grad:
            raise ValueError(f"{op}: {name} gets no gradient; detach it")


def images(op: str, name: str, x: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    """[B, C, H, W], not empty, channels_last."""
    tensor(op, name, x)
    if x.dim() != 4:
        raise ValueError(f"{op}: {name} must be [B, C, H, W], found {x.dim()} dimensions {tuple(x.shape)}")
    if x.numel() == 0:
        raise ValueError(f"{op}: {name} is empty: {tuple(x.shape)}")
    dtype(op, name, x, dtypes)
    if not x.is_contiguous(memory_format=torch.channels_last):
        raise ValueError(
            f"{op}: {name} must be in channels_last memory; call {name}.contiguous(memory_format=torch.channels_last)"
        )


def dtype(op: str, name: str, x: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    if x.dtype not in dtypes:
        expected = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"{op}: {name} must be {expected}, found {str(x.dtype).removeprefix('torch.')}")


def shape(op: str, name: str, x: Tensor, expected: tuple[int, ...]) -> None:
    if tuple(x.shape) != tuple(expected):
        raise ValueError(f"{op}: {name} must be {list(expected)}, found {list(x.shape)}")


def filters(op: str, name: str, weight: Tensor, images: Tensor) -> Tensor:
    """weight [O, C_in, k, k], contiguous, not empty, of at most the images' size."""
    tensor(op, name, weight)
    if weight.dim() != 4 or weight.shape[1] != images.shape[1] or weight.shape[2] != weight.shape[3]:
        raise ValueError(
            f"{op}: {name} must be [O, {images.shape[1]}, k, k] for these images, found {list(weight.shape)}"
        )
    height, width, kernel = *images.shape[2:], weight.shape[2]
    if min(height, width) < kernel:
        raise ValueError(f"{op}: images of {height}x{width} hold no {kernel}x{kernel} patch")
    return _not_empty(op, name, operand(op, name, weight, weight.shape, FLOATS))


def pointwise(op: str, name: str, weight: Tensor, expected: tuple[int | None, int]) -> Tensor:
    """weight [O, C], or the same as a 1x1 convolution, as a contiguous matrix; not empty, and O any if None."""
    tensor(op, name, weight)
    out, inner = expected
    if weight.dim() < 2:
        raise ValueError(f"{op}: {name} must be [{out or 'O'}, {inner}], found {list(weight.shape)}")
    out = weight.shape[0] if out is None else out
    tail = (1,) * (weight.dim() - 2)
    return _not_empty(op, name, operand(op, name, weight, (out, inner, *tail), FLOATS)).flatten(1)


def _not_empty(op: str, name: str, x: Tensor) -> Tensor:
    if x.numel() == 0:
        raise ValueError(f"{op}: {name} is empty: {tuple(x.shape)}")
    return x


def gather(op: str, value: Gather | None, data: Tensor) -> tuple:
    """A gather's fields in order, contiguous, as operators take them; for None, no tensors.

    Values are not looked at: that would wait for the device.
    """
    if value is None:
        return (None,) * 5 + (0,)
    if not isinstance(value, Gather):
        raise TypeError(f"{op}: gather must be a Gather, found {type(value).__name__}")
    if data.dtype != torch.uint8:
        raise TypeError(f"{op}: gather needs uint8 images, found {str(data.dtype).removeprefix('torch.')}")
    index = value.index
    tensor(op, "gather.index", index)
    if index.dim() != 1 or len(index) == 0:
        raise ValueError(f"{op}: gather.index must be [B] and not empty, found {list(index.shape)}")
    dtype(op, "gather.index", index, (torch.int64,))
    pair, batch = (len(index), 2), (len(index),)
    allowed = {
        "translation": (pair, (torch.int64, torch.int32)),
        "flip": (batch, (torch.bool,)),
        "jitter": (pair, (torch.float32,)),
        "cutout": (pair, (torch.int64,)),
    }
    fields = []
    for name, (expected, dtypes) in allowed.items():
        field = getattr(value, name)
        fields.append(None if field is None else operand(op, f"gather.{name}", field, expected, dtypes))
    if (value.cutout is None) != (value.cutout_size == 0) or value.cutout_size < 0:
        raise ValueError(f"{op}: gather.cutout and a positive cutout_size are given together or not at all")
    constant(op, **{"gather.jitter": value.jitter})
    return index.contiguous(), *fields, value.cutout_size


def not_negated(op: str, name: str, x: Tensor) -> None:
    """x holds its values as they are, as memory that is updated in place must. While torch.compile traces, which
    cannot branch on it, nothing is looked at."""
    if not torch.compiler.is_compiling() and x.is_neg():
        raise ValueError(f"{op}: {name} is negated lazily and cannot be updated in place; call {name}.resolve_neg()")


def running_statistics(
    op: str, running_mean: Tensor | None, running_var: Tensor | None, channels: int, training: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """(running mean and variance to update, mean and variance to normalize by): one pair is None, in evaluation the
    first, in training the second, so that an operator updates nothing that it only reads.
    """
    if (running_mean is None) != (running_var is None):
        raise ValueError(f"{op}: running_mean and running_var are given together or not at all")
    if running_mean is None:
        if not training:
            raise ValueError(f"{op}: evaluation mode needs running_mean and running_var")
        return (None,) * 4
    for name, value in (("running_mean", running_mean), ("running_var", running_var)):
        matches(op, name, value, (channels,), (torch.float32,))
        if not value.is_contiguous():
            raise ValueError(f"{op}: {name} must be contiguous")
        constant(op, **{name: value})
        not_negated(op, name, value)
    statistics, nothing = (running_mean, running_var), (None, None)
    return (*statistics, *nothing) if training else (*nothing, *statistics)


def enough_values(op: str, count: int, training: bool) -> None:
    """As PyTorch: one value per channel has no variance to train with."""
    if training and count < 2:
        raise ValueError(f"{op}: training needs more than 1 value per channel, found {count}")


def separate(op: str, updated: dict[str, Tensor | None], read: dict[str, Tensor | None]) -> None:
    """What is updated in place shares no memory with anything else that the op is given. All are dense.

    For operators, not for the functions that call them: memory has addresses there under torch.compile too.
    """
    if all(x is None for x in updated.values()):
        return
    spans = [
        (x.data_ptr(), x.data_ptr() + x.numel() * x.element_size(), name, writes)
        for values, writes in ((updated, True), (read, False))
        for name, x in values.items()
        if x is not None and x.numel() > 0
    ]
    # the furthest end so far of anything, and of what is updated
    last, last_updated = (0, ""), (0, "")
    for start, end, name, writes in sorted(spans):
        _, other = reached = last if writes else last_updated
        if start < reached[0]:
            raise ValueError(
                f"{op}: {other} and {name} share memory, which the op updates in place; pass tensors of their own"
            )
        last = max(last, (end, name))
        if writes:
            last_updated = max(last_updated, (end, name))
