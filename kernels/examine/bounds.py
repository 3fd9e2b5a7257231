"""What bounds a kernel on a GPU that is not here, by what it is made of: for each launch, the instructions that all its
warps issue, by the unit that runs them, and the bytes that must move, over the GPU's published rates.

The instructions are those of the machine code, each as often as its loop runs (`control_flow`); what a condition guards
counts as run, the slow path of a division does not. A unit's time is its own if nothing else made it wait; the largest
of all is the bound. Left out are latency and conflicts of shared memory, which cost time, and the L2 cache, which
saves some where one kernel reads what the one before it wrote.
Sources: NVIDIA's CUDA C++ Programming Guide (throughput of native instructions) and the GPUs' data sheets.
"""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil, prod

import torch

from ..launching import Launch, leaves, specialized
from .ahead_of_time import Resources
from .control_flow import Loop, Program, loops, memory_of
from .machine_code import PROCESSORS

# programs of a launch that are followed; the others are taken to be like their mean
_MOST_FOLLOWED = 128
# bytes a clock that an SM can take from the L2 cache
_SM_BYTES = 64
_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);")
_LANES = 32


@dataclass(frozen=True)
class Gpu:
    """target: what is compiled for it; sms; clock: its boost clock in Hz; bandwidth: of its memory in B/s."""

    target: str
    sms: int
    clock: float
    bandwidth: float


GPUS = {
    "A100": Gpu("sm_80", 108, 1.41e9, 2.039e12),
    "H100": Gpu("sm_90", 132, 1.755e9, 3.35e12),
    "H200": Gpu("sm_90", 132, 1.755e9, 4.8e12),
    "4090": Gpu("sm_89", 128, 2.52e9, 1.008e12),
    "5090": Gpu("sm_120", 170, 2.41e9, 1.792e12),
}

# of each unit: which instructions it runs, the first that matches; and of an SM how many lanes a clock
_UNITS = (
    ("tensor", r"[HIDBQO]G?MMA\b"),
    ("sfu", r"MUFU|F2F\.|I2F\.|F2I\.|FRND|POPC"),
    ("fp64", r"D(?:FMA|ADD|MUL|SETP)\b"),
    ("lsu", r"(?:LD|ST)[GSL]?\b|ATOM[GS]?\b|RED\b|SHFL|LDSM|STSM|UBLKCP|LDGSTS"),
    ("fma", r"FFMA|FMUL|FADD|HFMA2|HADD2|HMUL2|IMAD"),
    (
        "alu",
        r"(?!U[A-Z]|BRA|BAR|NOP|EXIT|BSSY|BSYNC|S2R|CS2R|DEPBAR|LDGDEPBAR|WARP|CALL|RET|MEMBAR|FENCE|BREAK|LDC)[A-Z]",
    ),
)
_LANES_A_CLOCK = {"sfu": 16, "lsu": 32, "fma": 128, "alu": 64, "fp64": 64}
_OTHER_LANES = {"sm_80": {"fma": 64, "fp64": 32}} | {t: {"fp64": 2} for t in ("sm_89", "sm_120")}
# integer products take the wider half of the unit alone
_SLOW_FMA = re.compile(r"IMAD(?!\.MOV|\.SHL|\.IADD)")
_FAST_HALF = re.compile(r"H(?:FMA2|ADD2|MUL2)")
# float16 multiply-adds a clock of an SM's tensor cores, by warps and, where there is another way, by groups of four
_TENSOR = {"sm_80": 1024, "sm_89": 256, "sm_90": 1280, "sm_120": 256}
_GROUP_TENSOR = 2048


@dataclass(frozen=True)
class Work:
    """What a launch makes a GPU do. resident: programs that fit on an SM at once; cycles: of one SM, by unit, if it
    ran all programs; bytes: moved from and to memory, each tensor's at most once either way; guessed: the machine
    code's loops are not the PTX's, so that all of them count as often as the PTX's in the mean.
    """

    programs: int
    resident: int
    cycles: dict[str, float]
    bytes: int
    guessed: bool

    def waves(self, gpu: Gpu) -> float:
        """How often the programs fill the GPU."""
        return self.programs / (gpu.sms * self.resident)

    def times(self, gpu: Gpu) -> dict[str, float]:
        """Seconds that each unit takes at least, "memory" among them, on as many SMs as there are programs for."""
        sms = min(gpu.sms, self.programs)
        found = {unit: cycles / (sms * gpu.clock) for unit, cycles in self.cycles.items()}
        found["memory"] = self.bytes / min(gpu.bandwidth, sms * _SM_BYTES * gpu.clock)
        return found

    def bound(self, gpu: Gpu) -> tuple[str, float]:
        """(the unit that takes longest, seconds with the last wave counted as a full one)."""
        times, waves = self.times(gpu), self.waves(gpu)
        unit = max(times, key=times.__getitem__)
        if self.programs <= gpu.sms:
            # each has an SM to itself, and the times are of as many SMs
            return unit, times[unit]
        # in one wave the SM with most programs ends last
        idle = ceil(waves) / waves if waves > 1 else ceil(self.programs / gpu.sms) * gpu.sms / self.programs
        return unit, times[unit] * idle


def work(launch: Launch, ptx: str, compiled: Resources, limits: dict[int, int]) -> Work:
    """Of a launch compiled for an NVIDIA target, its PTX and what else the compiler made.

    limits: bytes that can be read or written at most of the tensor at an address, where that is not all of it.
    """
    program = Program(ptx)
    arguments = [value for _, value in leaves(launch.arguments) if specialized(value)[0] != "constexpr"]
    tensors = [value for value in arguments if isinstance(value, torch.Tensor)]
    values = [v.data_ptr() if isinstance(v, torch.Tensor) else v if isinstance(v, int) else None for v in arguments]
    load = memory_of((t.data_ptr(), t.numel() * t.element_size()) for t in tensors)
    threads, programs = launch.num_warps * _LANES, prod(launch.grid)
    followed = list(_evenly(programs, _MOST_FOLLOWED))
    counts = [0.0] * len(program.instructions)
    for number in followed:
        for at, count in enumerate(program.run(values, _place(number, launch.grid), launch.grid, threads, load)):
            counts[at] += count / len(followed)
    instructions, again = machine_loops(compiled.assembly)
    alike = [loop.parent for loop in again] == [loop.parent for loop in program.loops]
    if alike:
        often = [counts[loop.first] for loop in program.loops]
    else:
        # of all that is in loops, as often as the PTX's loops run in the mean
        inside = [at for loop in program.loops for at in range(loop.first, loop.last + 1)]
        mean = sum(counts[at] for at in inside) / len(inside) if inside else 1.0
        often = [mean] * len(again)
    cycles: Counter[str] = Counter()
    for address, name in instructions:
        inner = [i for i, loop in enumerate(again) if loop.first <= address <= loop.last]
        times = (often[inner[-1]] if inner else 1.0) * launch.num_warps * programs
        cycles["issue"] += times / 4
        unit, each = cost(name, compiled.target)
        if unit is not None:
            cycles[unit] += times * each
    resident = max(1, round(compiled.occupancy * PROCESSORS[compiled.target].warps / launch.num_warps))
    moved = _bytes(program, counts, arguments, threads * programs, limits)
    return Work(programs, resident, dict(cycles), moved, not alike)


def _evenly(count: int, most: int) -> Iterator[int]:
    """At most so many of 0 ... count - 1, the first and the last among them."""
    chosen = min(count, most)
    return (i * (count - 1) // max(1, chosen - 1) for i in range(chosen))


def _place(number: int, grid: tuple[int, ...]) -> tuple[int, ...]:
    out = []
    for size in grid:
        out.append(number % size)
        number //= size
    return tuple(out)


def machine_loops(assembly: str) -> tuple[list[tuple[int, str]], list[Loop]]:
    """((address, name) of each instruction of NVIDIA's machine code but those of subroutines, its loops)."""
    found = [(int(address, 16), name, operands) for address, _, name, operands in _LINE.findall(assembly)]
    backward, called = [], set()
    for address, name, operands in found:
        if target := re.search(r"0x([0-9a-f]+)", operands):
            to = int(target[1], 16)
            if name.startswith("BRA") and to < address:
                backward.append((to, address))
            elif name.startswith("CALL"):
                called.add(to)
    # subroutines, the slow paths of divisions and square roots, stand behind all exits; a call may also be a mere jump
    exits = max((address for address, name, _ in found if name == "EXIT"), default=0)
    end = min((to for to in called if to > exits), default=found[-1][0])
    kept = [(address, name) for address, name, _ in found if address < end and name != "NOP"]
    return kept, loops(pair for pair in backward if pair[1] < end)


def cost(name: str, target: str) -> tuple[str | None, float]:
    """(the unit that runs an instruction of NVIDIA's machine code, clocks of one SM that a warp's takes it)."""
    unit = next((unit for unit, pattern in _UNITS if re.match(pattern, name)), None)
    if unit is None:
        return None, 0.0
    if unit == "tensor":
        return unit, _tensor_clocks(name, target)
    lanes = (_LANES_A_CLOCK | _OTHER_LANES.get(target, {}))[unit]
    clocks = _LANES / lanes
    if unit == "lsu":
        clocks *= max(1, _access_bytes(name) / 4)
    elif _SLOW_FMA.match(name):
        clocks = _LANES / 64
    elif _FAST_HALF.match(name):
        clocks = _LANES / 128
    return unit, clocks


def _access_bytes(name: str) -> int:
    """A thread's of a load or store."""
    bits = re.search(r"\.(64|128|256)\b", name)
    if name.startswith(("LDSM", "STSM")):
        return 4 * int((re.search(r"\.(\d)$", name) or ["", "1"])[1])
    return int(bits[1]) // 8 if bits else 4


def _tensor_clocks(name: str, target: str) -> float:
    """HMMA.16816 multiplies 16 x 16 by 16 x 8; HGMMA.64xNxK is of four warps, of which each issues one."""
    if group := re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)", name):
        half = 0.5 if ".TF32" in name else 1.0
        return prod(map(int, group.groups())) / (4 * _GROUP_TENSOR * half)
    shape = re.search(r"\.(16816|1688|1684)\b", name)
    size = {"16816": 16 * 8 * 16, "1688": 16 * 8 * 8, "1684": 16 * 8 * 4}[shape[1] if shape else "16816"]
    return size / (_TENSOR[target] * (0.5 if ".TF32" in name else 1.0))


def _bytes(program: Program, counts: list[float], arguments: list, threads: int, limits: dict[int, int]) -> int:
    """What all threads read and write of each tensor, at most all that is in it."""
    moved: Counter[tuple[str, frozenset[str]]] = Counter()
    for number, kind, size, of in program.accesses():
        moved[kind, of] += counts[number] * size * threads
    by_name = dict(zip(program.parameters, arguments))
    total = 0
    for (_, of), executed in moved.items():
        tensors = [by_name[name] for name in of if isinstance(by_name.get(name), torch.Tensor)]
        sizes = [limits.get(t.data_ptr(), t.numel() * t.element_size()) for t in tensors]
        total += min(executed, sum(sizes)) if sizes else executed
    return round(total)
