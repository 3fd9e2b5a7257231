"""The fused ops by themselves: what `blink.kernels` calls on tensors that the kernels take, and refuses nothing for.

Same names and signatures as `reference`. Importing it needs triton, calling an op a GPU or Triton's interpreter.
"""

from importlib.util import find_spec

if find_spec("triton") is None:
    raise ImportError(f"{__name__} needs triton, which is not installed; blink.kernels and its reference do not")

from .cross_entropy import cross_entropy
from .excite_norm_act_add import excite_norm_act_add
from .muon import muon
from .newton_schulz import newton_schulz
from .norm_act import norm_act
from .pool_norm_act import pool_norm_act
from .se_gate import se_gate
from .sgd_nesterov import sgd_nesterov
from .squeeze_excite import squeeze_excite
from .whiten import whiten
from .whiten_project_norm_act import whiten_project_norm_act

__all__ = [
    "cross_entropy",
    "excite_norm_act_add",
    "muon",
    "newton_schulz",
    "norm_act",
    "pool_norm_act",
    "se_gate",
    "sgd_nesterov",
    "squeeze_excite",
    "whiten",
    "whiten_project_norm_act",
]
