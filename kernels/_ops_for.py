"""Which implementation of the ops takes given tensors. Needs no triton."""

from collections.abc import Sequence
from importlib.util import find_spec

import torch
from torch import Tensor

from . import reference

_HAS_TRITON = find_spec("triton") is not None


def ops_for(tensors: Sequence[Tensor]):
    """The kernels where they run and take these dtypes, else the reference; the tensors are on one device."""
    if not _HAS_TRITON or any(t.dtype == torch.float64 for t in tensors):
        return reference
    from blink import kernels

    if tensors[0].device.type == "cuda":
        return kernels
    whole = kernels.interpreting() and all(t.dtype != torch.bfloat16 for t in tensors)
    return kernels if whole else reference
