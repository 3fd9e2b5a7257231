"""Compile recorded launches for a GPU that is not there, and read what the compiler made of them.

Signatures, specialization on 1 and divisibility by 16 are derived from the recorded arguments exactly as at a launch,
so the code examined is the code that would run. Needs no device; cannot work where TRITON_INTERPRET is set, which turns
kernels into plain functions.
"""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import _launch
from ._launch import Launch

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}

_TYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.uint8: "u8",
    torch.int32: "i32",
    torch.int64: "i64",
}
_DIVISIBLE = [["tt.divisibility", 16]]


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel takes: registers and spilled registers a thread, stack and shared memory in bytes."""

    kernel: str
    target: str
    registers: int
    spills: int
    stack: int
    shared: int
    assembly: str


def source_of(launch: Launch) -> ASTSource:
    """The compiler's input for a recorded launch, specialized as a launch with these arguments would be."""
    names = launch.kernel.arg_names
    runtime = names[: len(launch.arguments)]
    signature, constants, attributes = {}, dict(launch.constexprs), {}
    for index, (name, value) in enumerate(zip(runtime, launch.arguments)):
        if isinstance(value, torch.Tensor):
            signature[name] = "*" + _TYPES[value.dtype]
            if value.data_ptr() % 16 == 0:
                attributes[(index,)] = _DIVISIBLE
        elif isinstance(value, int) and value == 1:
            signature[name] = "constexpr"
            constants[name] = 1
        elif isinstance(value, int):
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(index,)] = _DIVISIBLE
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            raise TypeError(f"{launch.kernel.__name__}: cannot compile for an argument {name} of {type(value)}")
    for name in names[len(launch.arguments) :]:
        signature[name] = "constexpr"
    return ASTSource(launch.kernel, signature, constants, attributes)


def compile_launch(launch: Launch, target: str) -> Resources:
    """Compile for one of TARGETS and read the resources. Raises RuntimeError under the interpreter."""
    if _launch.interpreting():
        raise RuntimeError("kernels cannot be compiled where TRITON_INTERPRET is set; unset it in a new process")
    options = {"num_warps": launch.num_warps, "enable_fp_fusion": True}
    compiled = triton.compile(source_of(launch), target=TARGETS[target], options=options)
    name = launch.kernel.__name__
    if target.startswith("sm_"):
        usage, assembly = _cubin_report(compiled.asm["cubin"])
        # every load or store of local memory in the machine code is a spill: no kernel declares local arrays
        spills = len(re.findall(r"\b(?:LDL|STL)\b", assembly))
        return Resources(
            name, target, usage["REG"], spills, usage["STACK"] + usage["LOCAL"], compiled.metadata.shared, assembly
        )
    assembly = compiled.asm["amdgcn"]

    def field(key: str) -> int:
        found = re.search(rf"\.{key}:\s*(\d+)", assembly)
        return int(found.group(1)) if found else 0

    spills = field("vgpr_spill_count") + field("sgpr_spill_count")
    return Resources(
        name,
        target,
        field("vgpr_count"),
        spills,
        field("private_segment_fixed_size"),
        compiled.metadata.shared,
        assembly,
    )


def _cubin_report(cubin: bytes) -> tuple[dict[str, int], str]:
    """Resource usage and machine code, by the tools that ship with triton."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _run(tools / "cuobjdump", "--dump-resource-usage", file.name)
        assembly = _run(tools / "nvdisasm", "-c", file.name)
    return {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}, assembly


def _run(*command) -> str:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True).stdout
