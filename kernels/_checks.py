"""What an op requires of its arguments, checked once at its boundary, so that kernels take no strides."""

import torch
from torch import Tensor

from . import _launch
from .gather import Gather
from .reference import ACTIVATIONS

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def device(op: str, *tensors: Tensor | None) -> None:
    """All on one device, and one that the kernels run on."""
    present = [t for t in tensors if t is not None]
    where = present[0].device
    for t in present:
        if t.device != where:
            raise ValueError(f"{op}: all tensors must be on one device, found {where} and {t.device}")
    if where.type == "cuda" or _launch.capturing():
        return
    if not _launch.interpreting():
        raise RuntimeError(
            f"{op}: the kernels need a GPU and the tensors are on {where}; use the reference ops, "
            "or set TRITON_INTERPRET=1 before importing to interpret the kernels"
        )
    if any(t.dtype == torch.bfloat16 for t in present):
        raise RuntimeError(f"{op}: Triton's interpreter computes bfloat16 wrongly; use float32 or float16 there")


def activation(op: str, name: str | None) -> str:
    """The constexpr name of an activation."""
    if name not in ACTIVATIONS:
        raise ValueError(f"{op}: unknown activation {name!r}; expected one of {', '.join(map(str, ACTIVATIONS))}")
    return name or "identity"


def images(op: str, name: str, x: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    """[B, C, H, W], not empty, channels_last."""
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
    if index.dim() != 1 or len(index) == 0:
        raise ValueError(f"{op}: gather.index must be [B] and not empty, found {list(index.shape)}")
    dtype(op, "gather.index", index, (torch.int64,))
    pair, batch = (len(index), 2), (len(index),)
    allowed = {
        "shift": (pair, (torch.int64, torch.int32)),
        "flip": (batch, (torch.bool,)),
        "jitter": (pair, (torch.float32,)),
        "cutout": (pair, (torch.int64,)),
    }
    for name, (expected, dtypes) in allowed.items():
        tensor = getattr(value, name)
        if tensor is not None:
            shape(op, f"gather.{name}", tensor, expected)
            dtype(op, f"gather.{name}", tensor, dtypes)
    if (value.cutout is None) != (value.cutout_size == 0) or value.cutout_size < 0:
        raise ValueError(f"{op}: gather.cutout and a positive cutout_size are given together or not at all")
    if value.jitter is not None and value.jitter.requires_grad:
        raise ValueError(f"{op}: gather.jitter gets no gradient; detach it")
    tensors = (index, value.shift, value.flip, value.jitter, value.cutout)
    return *(None if t is None else t.contiguous() for t in tensors), value.cutout_size


def running_statistics(
    op: str, running_mean: Tensor | None, running_var: Tensor | None, channels: int, training: bool
) -> None:
    if (running_mean is None) != (running_var is None):
        raise ValueError(f"{op}: running_mean and running_var are given together or not at all")
    if running_mean is None:
        if not training:
            raise ValueError(f"{op}: evaluation mode needs running_mean and running_var")
        return
    for name, value in (("running_mean", running_mean), ("running_var", running_var)):
        shape(op, name, value, (channels,))
        dtype(op, name, value, (torch.float32,))
        if not value.is_contiguous():
            raise ValueError(f"{op}: {name} must be contiguous")


def enough_values(op: str, count: int, training: bool) -> None:
    """As PyTorch: one value per channel has no variance to train with."""
    if training and count < 2:
        raise ValueError(f"{op}: training needs more than 1 value per channel, found {count}")
