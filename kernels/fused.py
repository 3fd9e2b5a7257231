"""The fused ops by themselves, which `blink.kernels` calls with what their kernels take; all else they refuse.

Same names and signatures as `reference`. Importing it needs triton, calling an op a GPU or Triton's interpreter.
"""

from importlib import import_module
from importlib.util import find_spec

from .reference import OPS

if find_spec("triton") is None:
    raise ImportError(f"{__name__} needs triton, which is not installed; blink.kernels and its reference do not")

__all__ = [*OPS]

globals().update({name: getattr(import_module(f".{name}", __package__), name) for name in OPS})
