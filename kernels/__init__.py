"""Fused Triton ops for small-image classifiers, and nn.Modules over them.

Each op runs on its kernels on a GPU and in plain PyTorch elsewhere: `backend` says which. The two by themselves are
`fused`, which needs triton and a GPU (or TRITON_INTERPRET=1, to run in Triton's interpreter on a CPU), and `reference`.
"""

from typing import Any

if __name__ == "kernels":
    raise ImportError("this package is blink.kernels: from blink.kernels import ...")

from . import dispatch, reference
from .dispatch import HAS_TRITON, backend, interpreting
from .gather import Gather
from .layers import Whiten
from .modules import NormAct, PoolNormAct, WhiteningConv2d, convert
from .optimizers import SGD, Muon, split_parameters
from .squeeze_excitation import SqueezeExcite, replace_squeeze_excitation

__all__ = [
    "HAS_TRITON",
    "SGD",
    "Gather",
    "Muon",
    "NormAct",
    "PoolNormAct",
    "SqueezeExcite",
    "Whiten",
    "backend",
    "WhiteningConv2d",
    "convert",
    "interpreting",
    "reference",
    "replace_squeeze_excitation",
    "split_parameters",
    *reference.OPS,
]


def __getattr__(name: str) -> Any:
    """For type checkers, which do not see names that come with the files."""
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


# in place of the modules of their names, which importing has put here
globals().update({name: getattr(dispatch, name) for name in reference.OPS})
