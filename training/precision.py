"""The compute dtype: what it means for weights and for autocast, and which is the default on a device."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from blink.model.convolution import fast_bf16

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Precision:
    """compute: what convolutions and activations run in; weights: what convolution and linear weights are kept in."""

    name: str
    compute: torch.dtype
    weights: torch.dtype

    def autocast(self, device: torch.device) -> AbstractContextManager:
        if self.compute == self.weights:
            return nullcontext()
        return torch.autocast(device.type, dtype=self.compute)


def choose(name: str | None, device: torch.device, interpreted: bool) -> Precision:
    """The default is fp16 on a GPU, bf16 on a CPU that is faster in it, else fp32; the interpreter computes in fp32.

    On a GPU the weights are kept in the compute dtype; on a CPU bf16 keeps fp32 weights under autocast.
    """
    if name is None:
        if device.type == "cuda":
            name = "fp16"
        else:
            name = "bf16" if device.type == "cpu" and fast_bf16() and not interpreted else "fp32"
    compute = DTYPES[name]
    keep_fp32 = device.type == "cpu" and name == "bf16"
    return Precision(name, compute, torch.float32 if keep_fp32 else compute)
