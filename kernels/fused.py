"""The fused ops by themselves: what `blink.kernels` calls on tensors that the kernels take, and refuses nothing for.

Same names and signatures as `reference`. Importing it needs triton, calling an op a GPU or Triton's interpreter.
"""

from importlib import import_module
from importlib.util import find_spec

from .registry import NAMES

if find_spec("triton") is None:
    raise ImportError(f"{__name__} needs triton, which is not installed; blink.kernels and its reference do not")

globals().update({name: getattr(import_module(f".{name}", __package__), name) for name in NAMES})

__all__ = [*NAMES]
