"""The ops compiled for this machine's processor by its own C++ compiler: what a CPU trains with.

Same names and signatures as `reference`, which is called for what the compiled kernels do not take (other devices,
dtypes and layouts, a call under torch.func or torch.compile), for ops that have none, and everywhere if there is no
compiler. Needs no triton.
"""

from .. import reference
from ..reference import OPS
from . import batch_norm, optimizers, stem

__all__ = [*OPS]

globals().update({name: getattr(reference, name) for name in OPS})
for _module in (batch_norm, stem, optimizers):
    globals().update({name: getattr(_module, name) for name in OPS if hasattr(_module, name)})
