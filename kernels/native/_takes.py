"""What the compiled kernels read as it is. All else is the reference's, which also says what is wrong with it."""

import torch
from torch import Tensor

from .. import _options
from .._synchronized import sharing
from ..differentiation import transformed
from ..reference import ACTIVATIONS

FLOATS = (torch.float32, torch.bfloat16)
_PARAMETERS = (torch.float32, torch.bfloat16, torch.float16)


def plain_call() -> bool:
    """Whether nothing watches the call that could not see into a compiled kernel."""
    compiler = torch.compiler
    return not (compiler.is_compiling() or compiler.is_exporting() or torch.jit.is_tracing() or transformed())


def _plain(t: Tensor) -> bool:
    own = type(t) in (Tensor, torch.nn.Parameter)
    return own and t.device.type == "cpu" and t.layout is torch.strided and not t.is_neg()


def plain(*tensors: Tensor | None) -> bool:
    """Whether each is memory of this machine's, holding its values as they are."""
    return all(t is None or _plain(t) for t in tensors)


def images(x: Tensor, dtypes: tuple[torch.dtype, ...] = FLOATS) -> bool:
    """[B, C, H, W], not empty, channels_last."""
    whole = plain(x) and x.dim() == 4 and x.numel() > 0 and x.dtype in dtypes
    return whole and x.is_contiguous(memory_format=torch.channels_last)


def vector(t: Tensor | None, channels: int) -> bool:
    """[C] floating, or None."""
    return t is None or (plain(t) and t.shape == (channels,) and t.dtype in _PARAMETERS)


def _running(t: Tensor, channels: int) -> bool:
    float32 = plain(t) and t.shape == (channels,) and t.dtype == torch.float32
    return float32 and t.is_contiguous() and not t.requires_grad


def normalization(
    op: str, channels: int, count: int, bias: Tensor, weight: Tensor | None, running_mean: Tensor | None,
    running_var: Tensor | None, training: bool, momentum: float, eps: float, activation: str | None,
) -> bool:  # fmt: skip
    """What the normalizing ops share, of `count` values a channel. Raises as the reference does."""
    _options.batch_norm(op, momentum, eps)
    statistics = (running_mean, running_var)
    kept = [t for t in statistics if t is not None]
    return (
        activation in ACTIVATIONS
        and bias is not None
        and vector(bias, channels)
        and vector(weight, channels)
        and len(kept) == (2 if kept or not training else 0)
        and all(_running(t, channels) for t in kept)
        and (not training or (count > 1 and sharing() is None))
    )


def fp32(t: Tensor | None) -> Tensor | None:
    """As the kernels read a vector or a matrix of parameters."""
    return None if t is None else t.detach().float().contiguous()
