"""Fused Triton ops for small-image classifiers, each with a plain PyTorch reference in `reference`.

The ops need triton and a GPU (or TRITON_INTERPRET=1, to run
them in Triton's interpreter on a CPU); `reference` needs neither.
"""

from importlib.util import find_spec

if __name__ == "kernels":
    raise ImportError("this package is blink.kernels: from blink.kernels import ...")

from . import reference
from .gather import Gather
from .modules import NormAct, PoolNormAct, WhiteningConv2d, convert
from .optimizers import SGD, Muon, split_parameters

HAS_TRITON = find_spec("triton") is not None

__all__ = [
    "HAS_TRITON",
    "SGD",
    "Gather",
    "Muon",
    "NormAct",
    "PoolNormAct",
    "SqueezeExcite",
    "Whiten",
    "WhiteningConv2d",
    "convert",
    "cross_entropy",
    "excite_norm_act_add",
    "interpreting",
    "muon",
    "newton_schulz",
    "norm_act",
    "pool_norm_act",
    "reference",
    "se_gate",
    "sgd_nesterov",
    "split_parameters",
    "squeeze_excite",
    "whiten",
    "whiten_project_norm_act",
]

if HAS_TRITON:
    from .cross_entropy import cross_entropy
    from .excite_norm_act_add import excite_norm_act_add
    from .launching import interpreting
    from .layers import SqueezeExcite, Whiten
    from .muon import muon
    from .newton_schulz import newton_schulz
    from .norm_act import norm_act
    from .pool_norm_act import pool_norm_act
    from .se_gate import se_gate
    from .sgd_nesterov import sgd_nesterov
    from .squeeze_excite import squeeze_excite
    from .whiten import whiten
    from .whiten_project_norm_act import whiten_project_norm_act
else:

    def __getattr__(name: str):
        if name in __all__:
            raise ImportError(f"{__name__}.{name} needs triton, which is not installed; {__name__}.reference does not")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
