"""What a kernel's machine code says: which instructions it holds, and how many of its warps fit on a processor at once.

Pure functions of text and numbers. SASS is NVIDIA's machine code as nvdisasm prints it; amdgcn is AMD's assembly text.
"""

import re
from collections import Counter
from dataclasses import dataclass


@dataclass(frozen=True)
class Instructions:
    """Instruction counts of one kernel as compiled (static: a loop's body counts once), and its size in bytes.

    loads, stores: of global memory; wide_*: those that move 16 bytes or more a thread, or bulk copies.
    local_*: of local (scratch) memory; fp32: float32 add, multiply and fused multiply-add, two-wide ones as one;
    special: exp, rcp, rsq, sqrt, log, sin, cos units; tensor_core: count by instruction.
    """

    tensor_core: dict[str, int]
    loads: int
    wide_loads: int
    stores: int
    wide_stores: int
    local_loads: int
    local_stores: int
    fp32: int
    special: int
    code_bytes: int


_SASS_LINE = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*)", re.MULTILINE)
_SASS_BYTES = 16
# a bulk copy names source and destination: .S.G reads global memory, .G.S writes it
_SASS = {
    "loads": r"LDG\b|LDGSTS\b|UBLKCP\.S\.G|UTMALDG\b",
    "wide_loads": r"LDG\.(?:.*\.)?(?:128|256)\b|LDGSTS\.(?:.*\.)?128\b|UBLKCP\.S\.G|UTMALDG\b",
    "stores": r"STG\b|UBLKCP\.G\.S|UTMASTG\b",
    "wide_stores": r"STG\.(?:.*\.)?(?:128|256)\b|UBLKCP\.G\.S|UTMASTG\b",
    "local_loads": r"LDL\b",
    "local_stores": r"STL\b",
    "fp32": r"(?:FFMA|FADD|FMUL)(?:2|32I)?(?:\.|$)",
    "special": r"MUFU\b",
}
_SASS_TENSOR = r"(?:UTC(?:MX)?)?[HIDBQO]G?MMA\b"

_AMDGCN_LINE = re.compile(r"^[ \t]+([a-z]\w+)(.*)", re.MULTILINE)
_AMDGCN = {
    "loads": r"(?:global|buffer|flat)_load_",
    "wide_loads": r"(?:global|buffer|flat)_load_(?:\w+_)?(?:dwordx4|b128)\b",
    "stores": r"(?:global|buffer|flat)_store_",
    "wide_stores": r"(?:global|buffer|flat)_store_(?:dwordx4|b128)\b",
    "local_loads": r"scratch_load_",
    "local_stores": r"scratch_store_",
    "fp32": r"v_(?:pk_)?(?:fma|fmac|fmaak|fmamk|mad|mac|add|sub|subrev|mul)_(?:legacy_)?f32",
    "special": r"v_(?:exp|log|rcp|rsq|sqrt|sin|cos)_",
}
_AMDGCN_TENSOR = r"v_s?mfmac?_"


def count_sass(text: str) -> Instructions:
    """Counts of nvdisasm's listing of one kernel; the size includes the padding behind the last instruction."""
    names = [name for name, _ in _SASS_LINE.findall(text)]
    return _count(names, _SASS, _SASS_TENSOR, _SASS_BYTES * len(names))


def count_amdgcn(text: str) -> Instructions:
    """Counts of LLVM's assembly of one kernel, up to its end of function; the size is the one LLVM states, else 0."""
    stated = re.search(r"codeLenInByte = (\d+)", text)
    names = [name for name, _ in _AMDGCN_LINE.findall(text)]
    return _count(names, _AMDGCN, _AMDGCN_TENSOR, int(stated.group(1)) if stated else 0)


_PTX_SHUFFLE = re.compile(r"shfl\.sync\.bfly\.b32\s+(%\w+)")
_PTX_MOVE = re.compile(r"mov\.b(?:32|64)\s+(%\w+),\s*(.*);")
_PTX_FUSED = re.compile(r"fma\.rn\.f(?:32|64)\s+%\w+,[^,]+,[^,]+,\s*(%\w+);")


def fused_shuffles(ptx: str) -> int:
    """How often a product is fused with what another lane sends while lanes add up values.

    Each lane then rounds its own product less often than the others' and copies of one sum differ in the last bit.
    """
    received, found = set(), 0
    for line in ptx.splitlines():
        if shuffle := _PTX_SHUFFLE.search(line):
            received.add(shuffle[1])
        elif move := _PTX_MOVE.search(line):
            if received & set(re.findall(r"%\w+", move[2])):
                received.add(move[1])
        elif (fused := _PTX_FUSED.search(line)) and fused[1] in received:
            found += 1
    return found


def _count(names: list[str], patterns: dict[str, str], tensor: str, code_bytes: int) -> Instructions:
    by_name = Counter(names)

    def matching(pattern: str) -> dict[str, int]:
        return {name: count for name, count in sorted(by_name.items()) if re.match(pattern, name)}

    totals = {field: sum(matching(pattern).values()) for field, pattern in patterns.items()}
    return Instructions(tensor_core=matching(tensor), code_bytes=code_bytes, **totals)


@dataclass(frozen=True)
class Processor:
    """What one SM (NVIDIA) or CU (AMD) holds: warps, blocks, bytes of shared memory, columns of tensor memory.

    shared_limit: the bytes of it that one block may use.

    Both have 4 partitions with 512 registers a lane each, handed out in eights. AMD's scalar registers are left out:
    they bind only above 100 a wave, and then take 1 wave of 8.
    """

    warps: int
    blocks: int
    shared: int
    shared_unit: int
    # bytes of shared memory that the system keeps for itself a block
    shared_reserved: int = 0
    tensor_memory: int = 0

    @property
    def shared_limit(self) -> int:
        return self.shared - self.shared_reserved


_PARTITIONS, _PARTITION_REGISTERS, _REGISTER_UNIT = 4, 512, 8

PROCESSORS = {
    "sm_75": Processor(warps=32, blocks=16, shared=64 * 1024, shared_unit=256),
    "sm_80": Processor(warps=64, blocks=32, shared=164 * 1024, shared_unit=128, shared_reserved=1024),
    "sm_86": Processor(warps=48, blocks=16, shared=100 * 1024, shared_unit=128, shared_reserved=1024),
    "sm_89": Processor(warps=48, blocks=24, shared=100 * 1024, shared_unit=128, shared_reserved=1024),
    "sm_90": Processor(warps=64, blocks=32, shared=228 * 1024, shared_unit=128, shared_reserved=1024),
    "sm_100": Processor(
        warps=64, blocks=32, shared=228 * 1024, shared_unit=128, shared_reserved=1024, tensor_memory=512
    ),
    "sm_120": Processor(warps=48, blocks=24, shared=100 * 1024, shared_unit=128, shared_reserved=1024),
    "gfx942": Processor(warps=32, blocks=32, shared=64 * 1024, shared_unit=512),
}


def occupancy(
    processor: Processor, registers: int, shared: int, num_warps: int, tensor_memory: int = 0
) -> tuple[float, str]:
    """The bound on resident warps as a fraction of the processor's, and which resource sets it.

    registers: a thread's (AMD: vector and accumulation registers together); shared: bytes a block; tensor_memory:
    columns a block. 0.0 where not even one block fits. Of resources that bind equally, warps is named first.
    """
    per_thread = _round_up(max(registers, 1), _REGISTER_UNIT)
    per_partition = min(_PARTITION_REGISTERS // per_thread, processor.warps // _PARTITIONS)
    fitting = {
        "warps": processor.warps // num_warps,
        "registers": _PARTITIONS * per_partition // num_warps,
        "blocks": processor.blocks,
    }
    reserved = _round_up(shared + processor.shared_reserved, processor.shared_unit)
    if reserved:
        fitting["shared"] = processor.shared // reserved
    if tensor_memory:
        fitting["tensor"] = processor.tensor_memory // tensor_memory
    # min takes the first of equals
    limit = min(fitting, key=fitting.__getitem__)
    return fitting[limit] * num_warps / processor.warps, limit


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit
