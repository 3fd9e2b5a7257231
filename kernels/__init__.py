"""Fused Triton ops for small-image classifiers, and nn.Modules over them.

Each op runs on its kernels on a GPU and in plain PyTorch elsewhere: `backend` says which. The two by themselves are
`fused`, which needs triton and a GPU (or TRITON_INTERPRET=1, to run in Triton's interpreter on a CPU), and `reference`.
"""

if __name__ == "kernels":
    raise ImportError("this package is blink.kernels: from blink.kernels import ...")

from . import reference
from .dispatch import (
    HAS_TRITON,
    backend,
    cross_entropy,
    excite_norm_act_add,
    interpreting,
    muon,
    newton_schulz,
    norm_act,
    pool_norm_act,
    se_gate,
    sgd_nesterov,
    squeeze_excite,
    whiten,
    whiten_project_norm_act,
)
from .gather import Gather
from .layers import Whiten
from .squeeze_excitation import SqueezeExcite, replace_squeeze_excitation

__all__ = [
    "HAS_TRITON",
    "Gather",
    "SqueezeExcite",
    "Whiten",
    "backend",
    "cross_entropy",
    "excite_norm_act_add",
    "interpreting",
    "muon",
    "newton_schulz",
    "norm_act",
    "pool_norm_act",
    "reference",
    "replace_squeeze_excitation",
    "se_gate",
    "sgd_nesterov",
    "squeeze_excite",
    "whiten",
    "whiten_project_norm_act",
]
