"""What `blink.kernels` exports: every op, on the fused kernels where they take the call, else in plain PyTorch.

Chosen anew by each call, from its tensors. A network that has chosen before calls `fused` or `reference` itself.
"""

import functools
import inspect
import os
import warnings
from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor

from blink.errors import UserError

from . import reference
from .differentiation import transformed
from .environment import has_c_compiler

HAS_TRITON = find_spec("triton") is not None
VARIABLE = "BLINK_KERNELS"

if HAS_TRITON:
    from . import fused, launching
    from .launching import interpreting
else:

    def interpreting() -> bool:
        """Whether kernels run in Triton's interpreter, which is not installed."""
        return False


_CHOICE = os.environ.get(VARIABLE) or None
# found once: a search through folders is more than a call costs
_HAS_C_COMPILER = has_c_compiler()

# what kernels read in one layout only; of everything else they take a copy themselves
_LAYOUTS = {
    "x": torch.channels_last,
    "residual": torch.channels_last,
    "images": torch.channels_last,
    "logits": torch.contiguous_format,
}


def backend(device: torch.device | str | None = None) -> str:
    """'fused' or 'reference': what the ops of this package run on tensors of this device, by default a GPU's if there
    is one.

    On a GPU (CUDA or ROCm) the fused kernels, if triton and the C compiler that it needs are installed; elsewhere the
    reference, but for the CPU under TRITON_INTERPRET=1. BLINK_KERNELS=fused or reference in the environment, when this
    package is imported, forces either. A call's own tensors and surroundings can still ask for the reference: see
    `dispatched`. Raises UserError for another value of BLINK_KERNELS, or fused without triton.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return "fused" if _runs_fused(torch.device(device).type) else "reference"


def _runs_fused(device: str) -> bool:
    if _CHOICE not in (None, "fused", "reference"):
        raise UserError(f"{VARIABLE} must be fused or reference, found {_CHOICE!r}")
    if _CHOICE == "fused" and not HAS_TRITON:
        raise UserError(f"{VARIABLE}=fused needs triton, which is not installed; unset it")
    if _CHOICE is not None:
        return _CHOICE == "fused"
    if not HAS_TRITON:
        return False
    if device == "cuda":
        if not _HAS_C_COMPILER:
            say_once("Triton finds no C compiler (gcc, clang or $CC): plain PyTorch runs in place of the fused kernels")
        return _HAS_C_COMPILER
    return launching.capturing() or (device == "cpu" and interpreting())


def _asks_for_reference(tensors: list[Tensor]) -> bool:
    """Whether the kernels do not take these tensors, or not where the call is made: see `dispatched`."""
    if torch.compiler.is_exporting() or torch.jit.is_tracing() or transformed() or tensors[0].numel() == 0:
        return True
    dtypes = [tensor.dtype for tensor in tensors]
    # which Triton's interpreter computes wrongly
    return torch.float64 in dtypes or (interpreting() and not launching.capturing() and torch.bfloat16 in dtypes)


def say_once(message: str) -> None:
    """A UserWarning, once a process whatever the filters repeat; not while torch.compile traces, which cannot warn."""
    if not torch.compiler.is_compiling():
        _say(message)


@functools.cache
def _say(message: str) -> None:
    warnings.warn(message, stacklevel=2)


def _in_layout(op: str, arguments: dict) -> dict:
    """The arguments as the kernels read them."""
    for name, layout in _LAYOUTS.items():
        value = arguments.get(name)
        if not isinstance(value, Tensor) or (layout is torch.channels_last and value.dim() != 4):
            continue
        if not value.is_contiguous(memory_format=layout):
            wanted = str(layout).removeprefix("torch.")
            say_once(f"{op}: {name} is copied into {wanted} memory at every call; give it so, and no copy is made")
            arguments = {**arguments, name: value.contiguous(memory_format=layout)}
    return arguments


def _as_given(result, first: Tensor):
    """Images in contiguous memory if the first argument's were, as PyTorch's own ops would give them."""
    if isinstance(result, tuple):
        return tuple(_as_given(value, first) for value in result)
    images = isinstance(result, Tensor) and result.dim() == 4
    as_first = images and first.is_contiguous() and not first.is_contiguous(memory_format=torch.channels_last)
    return result.contiguous() if as_first else result


def dispatched(name: str) -> Callable:
    """The op `name`: a call goes to `fused` where `backend` says so for the device of its first argument, and else to
    `reference`.

    To the reference go also: float64, and bfloat16 in the interpreter; an empty first argument; a call under a
    torch.func transform or with forward-mode AD; what torch.jit.trace or torch.export records, for any machine; and
    `differentiable_twice=True`, where gradients are to be differentiated again. On the kernels' way, images that are
    not channels_last are copied (said once) and the result is contiguous if they were.
    squeeze_excite also takes a single image [C, H, W].
    """
    plain, kernel = getattr(reference, name), getattr(fused, name) if HAS_TRITON else None
    signature = inspect.signature(plain)
    names = tuple(signature.parameters)
    # ops on lists of tensors have no gradient
    differentiable = signature.parameters[names[0]].annotation is Tensor
    unbatched = name == "squeeze_excite"

    def call(arguments: dict, differentiable_twice: bool):
        first = arguments[names[0]]
        if not isinstance(first, Tensor if differentiable else (list, tuple)):
            what = "a tensor" if differentiable else "a list of tensors"
            raise TypeError(f"{name}: {names[0]} must be {what}, found {type(first).__name__}")
        values = (first, *arguments.values()) if differentiable else first
        tensors = [value for value in values if isinstance(value, Tensor)]
        if not tensors or not _runs_fused(tensors[0].device.type):
            return plain(**arguments)
        if _CHOICE is None and (differentiable_twice or _asks_for_reference(tensors)):
            return plain(**arguments)
        return _as_given(kernel(**_in_layout(name, arguments)), first) if differentiable else kernel(**arguments)

    @functools.wraps(kernel or plain)
    def op(*positional, **arguments):
        twice = arguments.pop("differentiable_twice", False) if differentiable else False
        placed = names[: len(positional)]
        if len(positional) > len(names) or names[0] not in (*placed, *arguments) or any(n in arguments for n in placed):
            # Python's own words for it
            return plain(*positional, **arguments)
        arguments = {**dict(zip(names, positional)), **arguments}
        first = arguments[names[0]]
        if unbatched and isinstance(first, Tensor) and first.dim() == 3:
            return call({**arguments, names[0]: first[None]}, twice)[0]
        return call(arguments, twice)

    if differentiable:
        twice = inspect.Parameter("differentiable_twice", inspect.Parameter.KEYWORD_ONLY, default=False)
        op.__signature__ = signature.replace(parameters=[*signature.parameters.values(), twice])
    return op


globals().update({name: dispatched(name) for name in reference.OPS})
