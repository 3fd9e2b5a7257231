"""Compile recorded launches for a GPU that is not there, and read what the compiler made of them.

Signatures, specialization on 1 and divisibility by 16 are derived from the recorded arguments exactly as at a launch,
so the code examined is the code that would run. Needs no device; cannot work where TRITON_INTERPRET is set, which turns
kernels into plain functions.
"""

import re
import struct
import subprocess
import sys
import tempfile
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from blink.kernels import fused

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


# enough to share what a job costs beside compiling, few enough that jobs of a recipe keep many cores busy
_KERNELS_A_JOB = 8


class Job(NamedTuple):
    """Cases, and of each which of its launches, to be compiled for one target in one dtype, by its name."""

    cases: list[tuple[Case, list[int]]]
    dtype: str
    target: str


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
    constants, attributes = launch.constants, {}
    for path, value in leaves(launch.arguments):
        kind, divisible = specialized(value)
        if kind == "constexpr":
            constants[path] = value
        elif divisible:
            attributes[path] = _DIVISIBLE
    return ASTSource(launch.kernel, signature, constants, attributes)


def compile_launch(launch: Launch, target: str) -> Resources:
    """Compile for one of TARGETS and read the resources. Raises RuntimeError under the interpreter."""
    return compile_fully(launch, target)[1]


def compile_fully(launch: Launch, target: str) -> tuple[CompiledKernel, Resources]:
    """Compile for one of TARGETS: what the compiler made, and the resources."""
    compiled = _compiled(launch, target)
    return compiled, _resources(launch, target, compiled, *_assemblies([compiled], target))


def _compiled(launch: Launch, target: str) -> CompiledKernel:
    if launching.interpreting():
        raise RuntimeError("kernels cannot be compiled where TRITON_INTERPRET is set; unset it in a new process")
    return triton.compile(source_of(launch), target=TARGETS[target], options=launch.compile_options)


def _resources(launch: Launch, target: str, compiled: CompiledKernel, assembly: str) -> Resources:
    fused = 0
    if target.startswith("sm_"):
        fused = fused_shuffles(compiled.asm["ptx"])
        usage = _resource_usage(compiled.asm["cubin"])
        instructions = count_sass(assembly)
        registers, stack = usage["REG"], usage["STACK"] + usage["LOCAL"]
        # every load or store of local memory in the machine code is a spill: no kernel declares local arrays
        spills = instructions.local_loads + instructions.local_stores
    else:
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
        outputs = case.call(fused, tensors, dtype)
        if case.differentiable:
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            outputs = [y for y in outputs if y is not None and y.requires_grad]
            torch.autograd.backward(outputs, [torch.empty_like(y) for y in outputs])
    return launches


def identity(launch: Launch) -> tuple:
    """Equal for two launches that run the same machine code."""
    return launch.num_warps, launch.maxnreg, source_of(launch).hash()


# what sizes a tile beside a BLOCK_*
_TILE_FIELDS = ("F_PAD", "DTYPE", "RUN", "ROWS", "RUNS", "IMAGES", "PARTS")


def tile(launch: Launch) -> tuple:
    """Equal for two launches of a kernel whose tiles have the same sizes, of the same dtypes and flags; what else they
    differ in are sizes that no tile depends on, activations, and arguments that are there or not.
    """

    def chosen(values: dict) -> Iterator[tuple[str, object]]:
        for name, value in values.items():
            if hasattr(value, "_asdict"):
                yield from chosen(value._asdict())
            elif name.startswith("BLOCK_") or name in _TILE_FIELDS or isinstance(value, bool):
                yield name, str(value)

    kinds = {specialized(value)[0] for _, value in leaves(launch.arguments)}
    return kernel_name(launch), *chosen(launch.constexprs), *sorted(kinds & set(_FLOATS))


# the types that activations come in
_FLOATS = ("*fp32", "*fp16", "*bf16")


def examine(job: Job) -> list[dict]:
    """Compile a job's kernels: one row of plain values a launch, with the compiler's message as `error` where a kernel
    does not compile.
    """
    rows: list[dict] = []
    built: list[tuple[dict, Launch, CompiledKernel]] = []
    for case, chosen in job.cases:
        with launching.assumed_tensor_cores(job.target != "sm_75"):
            launches = capture(case, getattr(torch, job.dtype))
        for launch in (launches[at] for at in chosen):
            # a module can state why a kernel, or a kernel on one target, stays without 16-byte accesses
            reasons = getattr(sys.modules[launch.kernel.fn.__module__], "NARROW_ACCESS", {})
            name = launch.kernel.__name__
            row = {
                "op": case.op,
                "case": case.label,
                "dtype": job.dtype,
                "target": job.target,
                "kernel": kernel_name(launch),
                "wide_argument": wide_argument(launch),
                "narrow_reason": reasons.get(name) or reasons.get(f"{name}:{job.target}"),
                "error": None,
            }
            rows.append(row)
            try:
                built.append((row, launch, _compiled(launch, job.target)))
            except Exception as error:
                # one kernel's failure must not hide what became of the others
                row["error"] = f"{type(error).__name__}: {error.__cause__ or error}"
    assemblies = _assemblies([compiled for *_, compiled in built], job.target)
    for (row, launch, compiled), assembly in zip(built, assemblies):
        numbers = asdict(_resources(launch, job.target, compiled, assembly))
        row |= {**numbers, **numbers.pop("instructions"), **row}
    return rows


def jobs(cases: list[Case], dtypes: list[str], targets: list[str], tiles: bool) -> list[Job]:
    """For `examine`: every launch of these cases, for each target once what compiles to the same code; tiles: of all
    that have the same, the one with the most tensors.
    """
    best: dict[tuple, tuple[int, tuple[str, int], int]] = {}
    for dtype in dtypes:
        for number, case in enumerate(cases):
            for at, launch in enumerate(capture(case, getattr(torch, dtype))):
                key = tile(launch) if tiles else identity(launch)
                tensors = sum(isinstance(value, torch.Tensor) for _, value in leaves(launch.arguments)) if tiles else 0
                if key not in best or tensors > best[key][0]:
                    best[key] = tensors, (dtype, number), at
    found: list[Job] = []
    for target in targets:
        for dtype in dtypes:
            chosen = defaultdict(list)
            for _, (of, number), at in best.values():
                if of == dtype:
                    chosen[number].append(at)
            parts = [(cases[number], sorted(chosen[number])) for number in sorted(chosen)]
            # several cases a job: the disassembler and the recording of a case take as long as a kernel
            while parts:
                sizes = accumulate(len(ats) for _, ats in parts)
                count = 1 + sum(size <= _KERNELS_A_JOB for size in list(sizes)[1:])
                found.append(Job(parts[:count], dtype, target))
                del parts[:count]
    return found


def _resource_usage(cubin: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _run("cuobjdump", "--dump-resource-usage", file.name)
    return {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}


def _assemblies(kernels: list[CompiledKernel], target: str) -> list[str]:
    """The machine code of each. NVIDIA's disassembler takes a quarter of a second to start: it is started once."""
    if not target.startswith("sm_"):
        return [kernel.asm["amdgcn"] for kernel in kernels]
    codes = [_code(kernel.asm["cubin"]) for kernel in kernels]
    if not codes:
        return []
    # what is compiled for these has instructions of one architecture only
    architecture = target.replace("sm_", "SM") + ("a" if int(target[3:]) >= 90 else "")
    with tempfile.NamedTemporaryFile(suffix=".bin") as file:
        file.write(b"".join(codes))
        file.flush()
        lines = _run("nvdisasm", "--binary", architecture, file.name).splitlines(keepends=True)
    ends, texts = list(accumulate(map(len, codes))), [""] * len(codes)
    at = 0
    for line in lines:
        address = re.match(r"\s+/\*([0-9a-f]+)\*/", line)
        at = int(address[1], 16) if address else at
        texts[bisect_right(ends, at)] += line
    return texts


def _code(cubin: bytes) -> bytes:
    """The sections of an ELF file, little-endian and of 64 bits, that hold machine code."""
    (table,), (count, names) = struct.unpack_from("<Q", cubin, 40), struct.unpack_from("<HH", cubin, 60)
    # name, type, flags, address, offset, size
    sections = [struct.unpack_from("<IIQQQQ", cubin, table + 64 * i) for i in range(count)]
    start = sections[names][4]
    return b"".join(
        cubin[offset : offset + size]
        for name, _, _, _, offset, size in sections
        if cubin.startswith(b".text.", start + name)
    )


def _run(tool: str, *arguments: str) -> str:
    """Of the tools that come with triton."""
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
    return subprocess.run([str(path), *arguments], capture_output=True, text=True, check=True).stdout
