"""Fused Triton ops for small-image classifiers, each with a plain PyTorch reference in `reference`.

The ops need triton and a GPU (or TRITON_INTERPRET=1, to run
them in Triton's interpreter on a CPU); `reference` needs neither.
"""

from importlib import import_module
from importlib.util import find_spec
from pkgutil import iter_modules

if __name__ == "kernels":
    raise ImportError("this package is blink.kernels: from blink.kernels import ...")

from . import reference
from .gather import Gather
from .modules import NormAct, PoolNormAct, WhiteningConv2d, convert
from .optimizers import SGD, Muon, split_parameters

HAS_TRITON = find_spec("triton") is not None

# an op is a public function in a file of its name, with a reference of the same name
_OPS = [module.name for module in iter_modules(__path__) if callable(getattr(reference, module.name, None))]

__all__ = [
    "HAS_TRITON", "SGD", "Gather", "Muon", "NormAct", "PoolNormAct", "SqueezeExcite", "Whiten", "WhiteningConv2d",
    "convert", "interpreting", "reference", "split_parameters", *_OPS,
]  # fmt: skip

if HAS_TRITON:
    from .launching import interpreting
    from .layers import SqueezeExcite, Whiten

    # by hand they would be known twice
    globals().update({name: getattr(import_module(f".{name}", __name__), name) for name in _OPS})
else:

    def __getattr__(name: str):
        if name in __all__:
            raise ImportError(f"{__name__}.{name} needs triton, which is not installed; {__name__}.reference does not")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
