"""Compile recorded launches for a GPU that is not there, and read what the compiler made of them.

Signatures, specialization on 1 and divisibility by 16 are derived from the recorded arguments exactly as at a launch,
so the code examined is the code that would run. Needs no device; cannot work where TRITON_INTERPRET is set, which turns
kernels into plain functions.
"""

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from blink import kernels

from .. import launching
from ..launching import Launch, captured_launches, leaves, mapped, specialized
from ..registry import Argument
from .cases import Case
from .cases import mapped as each
from .machine_code import PROCESSORS, Instructions, count_amdgcn, count_sass, fused_shuffles, occupancy

TARGETS = {f"sm_{capability}": GPUTarget("cuda", capability, 32) for capability in (75, 80, 86, 89, 90, 100, 120)} | {
    "gfx942": GPUTarget("hip", "gfx942", 64),
}

_DIVISIBLE = [["tt.divisibility", 16]]


# a tensor smaller than this need not be moved in 16-byte pieces
_LARGE_BYTES = 64 * 1024


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel takes: registers and spilled registers a thread, stack and shared memory in bytes.

    occupancy: the bound on resident warps as a fraction of the processor's; limited_by: what sets it. shared_limit: the
    shared memory that a block may use. fused_shuffles: see `machine_code`; 0 on AMD.
    """

    kernel: str
    target: str
    num_warps: int
    registers: int
    spills: int
    stack: int
    shared: int
    shared_limit: int
    fused_shuffles: int
    occupancy: float
    limited_by: str
    instructions: Instructions
    assembly: str


def source_of(launch: Launch) -> ASTSource:
    """The compiler's input for a recorded launch, specialized as a launch with these arguments would be."""
    signature = dict.fromkeys(launch.kernel.arg_names, "constexpr")
    signature |= zip(signature, mapped(lambda value: specialized(value)[0], launch.arguments))
    constants, attributes = dict(launch.constexprs), {}
    for path, value in leaves(launch.arguments):
        kind, divisible = specialized(value)
        if kind == "constexpr":
            constants[path] = value
        elif divisible:
            attributes[path] = _DIVISIBLE
    return ASTSource(launch.kernel, signature, constants, attributes)


def compile_launch(launch: Launch, target: str) -> Resources:
    """Compile for one of TARGETS and read the resources. Raises RuntimeError under the interpreter."""
    if launching.interpreting():
        raise RuntimeError("kernels cannot be compiled where TRITON_INTERPRET is set; unset it in a new process")
    compiled = triton.compile(source_of(launch), target=TARGETS[target], options=launch.compile_options)
    fused = 0
    if target.startswith("sm_"):
        fused = fused_shuffles(compiled.asm["ptx"])
        usage, assembly = _cubin_report(compiled.asm["cubin"])
        instructions = count_sass(assembly)
        registers, stack = usage["REG"], usage["STACK"] + usage["LOCAL"]
        # every load or store of local memory in the machine code is a spill: no kernel declares local arrays
        spills = instructions.local_loads + instructions.local_stores
    else:
        assembly = compiled.asm["amdgcn"]
        instructions = count_amdgcn(assembly)
        fields = {key: int(value) for key, value in re.findall(r"^ +\.(\w+): +(\d+)$", assembly, re.MULTILINE)}
        # this target's vgpr_count includes the accumulation registers
        registers, stack = fields["vgpr_count"], fields["private_segment_fixed_size"]
        spills = fields["vgpr_spill_count"] + fields["sgpr_spill_count"]
    shared, tensor_memory = compiled.metadata.shared, getattr(compiled.metadata, "tmem_size", None) or 0
    processor = PROCESSORS[target]
    bound, limit = occupancy(processor, registers, shared, launch.num_warps, tensor_memory)
    return Resources(
        launch.kernel.__name__, target, launch.num_warps, registers, spills, stack, shared, processor.shared_limit,
        fused, bound, limit, instructions, assembly,
    )  # fmt: skip


def innermost_bytes(tensor: torch.Tensor) -> int:
    """Bytes of the dimension that runs through memory (channels for channels_last); 0 where none is contiguous."""
    sizes = [size for size, stride in zip(tensor.shape, tensor.stride()) if size > 1 and stride == 1]
    return sizes[0] * tensor.element_size() if sizes else 0


def wide_argument(launch: Launch) -> str | None:
    """The first tensor argument of 64 KiB or more whose innermost dimension is a multiple of 16 bytes, or None."""
    for (index, *_), value in leaves(launch.arguments):
        if isinstance(value, torch.Tensor) and value.numel() * value.element_size() >= _LARGE_BYTES:
            innermost = innermost_bytes(value)
            if innermost and innermost % 16 == 0:
                return launch.kernel.arg_names[index]
    return None


def kernel_name(launch: Launch) -> str:
    """`module._name_kernel`, the module without the package's name."""
    return f"{launch.kernel.fn.__module__.removeprefix('blink.kernels.')}.{launch.kernel.__name__}"


def capture(case: Case, dtype: torch.dtype) -> list[Launch]:
    """Every launch of a call of a case, and of its backward pass if it has one, recorded on the CPU without running."""

    def unfilled(argument: Argument) -> torch.Tensor:
        # memory that is never touched takes no time
        layout = torch.channels_last if len(argument.shape) == 4 else torch.contiguous_format
        return torch.empty(argument.shape, dtype=argument.dtype or dtype, memory_format=layout)

    tensors = {name: each(unfilled, argument) for name, argument in case.arguments.items()}
    for name in case.differentiable:
        tensors[name].requires_grad_()
    with captured_launches() as launches:
        outputs = case.call(kernels, tensors, dtype)
        if case.differentiable:
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            outputs = [y for y in outputs if y is not None and y.requires_grad]
            torch.autograd.backward(outputs, [torch.empty_like(y) for y in outputs])
    return launches


def identity(launch: Launch) -> tuple:
    """Equal for two launches that run the same machine code."""
    return launch.num_warps, launch.maxnreg, source_of(launch).hash()


def tile(launch: Launch) -> tuple:
    """Equal for two launches of a kernel that differ only in sizes that its tiles do not depend on."""

    def chosen(values: dict) -> Iterator[tuple[str, object]]:
        for name, value in values.items():
            if hasattr(value, "_asdict"):
                yield from chosen(value._asdict())
            elif name.startswith("BLOCK_") or name in _SHAPING or not isinstance(value, int | tuple) or value is True:
                yield name, str(value)

    kinds = [kind for kind, _ in groupby(specialized(value)[0] for _, value in leaves(launch.arguments))]
    return kernel_name(launch), launch.num_warps, launch.maxnreg, *chosen(launch.constexprs), *kinds


# sizes that change what a tile's code is: a patch's side, and its features
_SHAPING = ("K", "F_PAD")


def examine(job: tuple[Case, list[int], str, str]) -> list[dict]:
    """Compile kernels of one case: job is (case, which of its launches, dtype's name, target).

    One row of plain values a launch; a kernel that does not compile has the compiler's message as `error`.
    """
    case, chosen, dtype, target = job
    launches, rows = capture(case, getattr(torch, dtype)), []
    for launch in (launches[at] for at in chosen):
        # a module can state why a kernel, or a kernel on one target, stays without 16-byte accesses
        reasons = getattr(sys.modules[launch.kernel.fn.__module__], "NARROW_ACCESS", {})
        name = launch.kernel.__name__
        row = {
            "op": case.op,
            "case": case.label,
            "dtype": dtype,
            "target": target,
            "kernel": kernel_name(launch),
            "wide_argument": wide_argument(launch),
            "narrow_reason": reasons.get(name) or reasons.get(f"{name}:{target}"),
            "error": None,
        }
        try:
            numbers = asdict(compile_launch(launch, target))
        except Exception as error:
            # one kernel's failure must not hide what became of the others
            rows.append({**row, "error": f"{type(error).__name__}: {error.__cause__ or error}"})
            continue
        instructions = numbers.pop("instructions")
        rows.append({**numbers, **instructions, **row})
    return rows


def jobs(cases: list[Case], dtypes: list[str], targets: list[str], tiles: bool) -> list[tuple]:
    """For `examine`: every launch of these cases, for each target once what compiles to the same code; tiles: once what
    differs only in sizes that its tiles do not depend on.
    """
    planned, seen = [], set()
    for dtype in dtypes:
        for case in cases:
            chosen = []
            for at, launch in enumerate(capture(case, getattr(torch, dtype))):
                key = tile(launch) if tiles else identity(launch)
                if key not in seen:
                    seen.add(key)
                    chosen.append(at)
            planned += [(case, chosen, dtype, target) for target in targets if chosen]
    # as they are printed
    return sorted(planned, key=lambda job: (targets.index(job[3]), dtypes.index(job[2])))


def _cubin_report(cubin: bytes) -> tuple[dict[str, int], str]:
    """Resource usage and machine code, by the tools that ship with triton."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _run(tools / "cuobjdump", "--dump-resource-usage", file.name)
        # without data flow analysis, which only resolves indirect branches and takes a third of the time
        assembly = _run(tools / "nvdisasm", "-c", "-ndf", file.name)
    return {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}, assembly


def _run(*command) -> str:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True).stdout
