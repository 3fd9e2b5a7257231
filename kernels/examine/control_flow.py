"""How often a program runs each loop of its kernel, found without a GPU: of the PTX only what branches depend on is
executed, which in these kernels is integer arithmetic on sizes, program numbers and tables of sizes.

Triton's programs branch as one, so one thread stands for all. What cannot be known (a value that was computed from data
or came through shared memory) is None; a branch on it is not taken, so that a loop ends and a condition's body runs.
"""

import ctypes
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from operator import and_, eq, ge, gt, le, lt, ne, or_, xor

# blocks run before a program is given up as one that does not end
_MOST_BLOCKS = 1_000_000
_LABEL = re.compile(r"(\$\w+):")
_REGISTER = re.compile(r"%(?:p|rs|rd|r|f|fd)\d+\b")
_INSTRUCTION = re.compile(r"\s*(?:@(!?)(%p\d+)\s+)?([a-z][\w.:]*)\s*(.*?);")
_TWO = {"and": and_, "or": or_, "xor": xor, "min": min, "max": max}
_COMPARISONS = {"eq": eq, "ne": ne, "lt": lt, "le": le, "gt": gt, "ge": ge, "lo": lt, "ls": le, "hi": gt, "hs": ge}
_ACCESS = re.compile(r"(ld|st)\.global(?:\.\w+(?:::\w+)?)*?(?:\.v(\d))?\.[bfsu](\d+)\b")


@dataclass(frozen=True)
class Instruction:
    """One of PTX: predicate as (negated, register) or None, name with its suffixes, operands, what is in {} as one."""

    predicate: tuple[bool, str] | None
    name: str
    operands: tuple[str, ...]

    @property
    def written(self) -> list[str]:
        if self.name.startswith(("st.", "bra", "ret", "bar", "cp.", "red.", "fence")) or not self.operands:
            return []
        return _REGISTER.findall(self.operands[0])

    @property
    def read(self) -> list[str]:
        guard = [self.predicate[1]] if self.predicate else []
        # a register that is written under a predicate keeps its value otherwise
        kept = self.written if self.predicate else []
        return guard + kept + [r for operand in self.operands[bool(self.written) :] for r in _REGISTER.findall(operand)]


@dataclass(frozen=True)
class Loop:
    """From the first to the last of a kernel's instructions, or addresses, that a branch back runs again; parent: its
    number in the list that it is of, or None.
    """

    first: int
    last: int
    parent: int | None


def loops(backward: Iterable[tuple[int, int]]) -> list[Loop]:
    """Of (target, branch) pairs, those with one target as one; outer ones first, in order of their beginnings."""
    ends: dict[int, int] = {}
    for target, branch in backward:
        ends[target] = max(branch, ends.get(target, -1))
    found: list[Loop] = []
    for first, last in sorted(ends.items(), key=lambda loop: (loop[0], -loop[1])):
        around = [i for i, outer in enumerate(found) if outer.first <= first and last <= outer.last]
        found.append(Loop(first, last, around[-1] if around else None))
    return found


class Program:
    """The PTX of one kernel. loops: of its instructions' numbers."""

    def __init__(self, ptx: str):
        self.instructions: list[Instruction] = []
        self._labels: dict[str, int] = {}
        self.parameters = re.findall(r"\.param \.[^,\n]*?(\w+_param_\d+)", ptx)
        for line in ptx[ptx.index("{") :].splitlines():
            if label := _LABEL.match(line):
                self._labels[label[1]] = len(self.instructions)
            elif match := _INSTRUCTION.match(line.split("//")[0]):
                guard = (bool(match[1]), match[2]) if match[2] else None
                operands = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", match[4])
                self.instructions.append(Instruction(guard, match[3], tuple(operands)))
        branches = [(self._target(i), at) for at, i in enumerate(self.instructions) if i.name.startswith("bra")]
        self.loops = loops((target, at) for target, at in branches if target <= at)
        begins = {0, *(target for target, _ in branches), *(at + 1 for _, at in branches)}
        self._begins = sorted(b for b in begins if b < len(self.instructions))
        self._needed = self._slice()

    def _target(self, branch: Instruction) -> int:
        return self._labels[branch.operands[0]]

    def _slice(self) -> list[bool]:
        """Which instructions the branches depend on."""
        wanted: set[str] = set()
        grown = {i.predicate[1] for i in self.instructions if i.predicate and i.name[:3] in ("bra", "ret")}
        while grown - wanted:
            wanted |= grown
            grown = {r for i in self.instructions if wanted & set(i.written) for r in i.read}
        return [bool(wanted & set(i.written)) for i in self.instructions]

    def accesses(self) -> list[tuple[int, str, int, frozenset[str]]]:
        """(its number, "ld" or "st", bytes a thread, the pointer parameters that its address comes from) of every
        instruction that accesses global memory.
        """
        sources: dict[str, frozenset[str]] = {}
        pointers = set(self.parameters)
        changed = True
        while changed:
            changed = False
            for i in self.instructions:
                if i.name.startswith("ld.global"):
                    # a pointer that is loaded from a table is none of the parameters
                    continue
                found = frozenset(name for o in i.operands[1:] for name in re.findall(r"\w+_param_\d+", o))
                found = found & pointers | frozenset().union(*(sources.get(r, frozenset()) for r in i.read))
                for register in i.written:
                    if register.startswith("%rd") and not found <= sources.get(register, frozenset()):
                        sources[register], changed = sources.get(register, frozenset()) | found, True
        out = []
        for number, i in enumerate(self.instructions):
            if i.name.startswith("cp.async") and ".shared.global" in i.name:
                kind, size, address = "ld", int(i.operands[2], 0), i.operands[1]
            elif match := _ACCESS.match(i.name):
                kind, size = match[1], int(match[2] or 1) * int(match[3]) // 8
                address = i.operands[0 if kind == "st" else 1]
            else:
                continue
            of = frozenset().union(*(sources.get(r, frozenset()) for r in _REGISTER.findall(address)))
            out.append((number, kind, size, of))
        return out

    def run(
        self, arguments: Sequence[int | None], program: tuple[int, ...], grid: tuple[int, ...], threads: int,
        load: Callable[[int, int], int | None] = lambda address, size: None,
    ) -> list[int]:  # fmt: skip
        """How often each instruction is reached when one program runs.

        arguments: values of the parameters, pointers as addresses; None: not known. load(address, bytes): what global
        memory holds there, unsigned, or None. Raises RuntimeError for a program that does not end.
        """
        state = _State(dict(zip(self.parameters, arguments)), program, grid, threads, load)
        counts, at, length = Counter(), 0, len(self.instructions)
        while at < length:
            counts[at] += 1
            if counts.total() > _MOST_BLOCKS:
                raise RuntimeError(f"no end after {_MOST_BLOCKS} pieces of program {program}")
            at = self._block(at, state)
        of_blocks = [counts.get(begin, 0) for begin in self._begins]
        return [of_blocks[bisect_right(self._begins, at) - 1] for at in range(length)]

    def _block(self, at: int, state: "_State") -> int:
        """Run from the beginning of a block to where the next one begins."""
        number = bisect_right(self._begins, at)
        end = self._begins[number] if number < len(self._begins) else len(self.instructions)
        for i in range(at, end):
            instruction = self.instructions[i]
            if instruction.name in ("ret", "exit") and state.holds(instruction.predicate):
                return len(self.instructions)
            if instruction.name.startswith("bra") and state.holds(instruction.predicate):
                return self._target(instruction)
            if self._needed[i]:
                state.execute(instruction)
        return end


class _State:
    """One thread's registers, unsigned; what is not there or None is not known."""

    def __init__(self, parameters: dict, program: tuple, grid: tuple, threads: int, load: Callable):
        self._parameters, self._load, self._registers = parameters, load, {}
        self._special = {"%tid.x": 0, "%ntid.x": threads, "%laneid": 0, "%warpid": 0}
        for axis, (p, n) in zip("xyz", zip((*program, 0, 0), (*grid, 1, 1))):
            self._special |= {f"%ctaid.{axis}": p, f"%nctaid.{axis}": n}

    def holds(self, predicate: tuple[bool, str] | None) -> bool:
        """Whether what is under it runs; not where that is not known."""
        if predicate is None:
            return True
        negated, register = predicate
        value = self._registers.get(register)
        return value is not None and bool(value) != negated

    def value(self, operand: str, bits: int) -> int | None:
        """An operand's, unsigned, of so many bits."""
        if operand.startswith("%"):
            value = self._special.get(operand, self._registers.get(operand))
        elif operand.startswith(("0f", "0d")):
            value = int(operand[2:], 16)
        elif re.fullmatch(r"-?(0x)?[0-9a-fA-F]+", operand):
            value = int(operand, 0)
        else:
            value = None
        return None if value is None else value & ((1 << bits) - 1)

    def execute(self, instruction: Instruction) -> None:
        if instruction.predicate is not None and self._registers.get(instruction.predicate[1]) is None:
            for register in instruction.written:
                self._registers[register] = None
        elif self.holds(instruction.predicate):
            written = instruction.written
            value = self._result(instruction) if len(written) == 1 else None
            for register in written:
                self._registers[register] = value

    def _result(self, instruction: Instruction) -> int | None:
        kind, *suffixes = instruction.name.split(".")
        type_ = suffixes[-1] if suffixes else "b32"
        if type_[0] == "f" or (type_[1:] and not type_[1:].isdigit() and type_ != "pred"):
            return None
        bits = 1 if type_ == "pred" else int(type_[1:])
        operands = instruction.operands[1:]
        if kind == "ld":
            return self._loaded(operands[0], suffixes, bits)
        if kind == "cvt":
            return _signed(self.value(operands[0], bits), bits, type_) if suffixes[0][0] != "f" else None
        if kind == "selp":
            chosen = self.value(operands[2], 1)
            return None if chosen is None else self.value(operands[1 - chosen], bits)
        values = [_signed(self.value(operand, bits), bits, type_) for operand in operands]
        if kind in ("shl", "shr") and values[1] is not None:
            values[1] = self.value(operands[1], 32)
        if None in values:
            return None
        wide = 2 * bits if "wide" in suffixes else bits
        if kind == "mad" and wide > bits:
            values[2] = _signed(self.value(operands[2], wide), wide, type_)
            if values[2] is None:
                return None
        found = _compute(kind, suffixes, values, bits)
        return None if found is None else found & ((1 << wide) - 1)

    def _loaded(self, address: str, suffixes: list[str], bits: int) -> int | None:
        inside = address.strip("[] ")
        if suffixes[0] == "param":
            return self._parameters.get(inside)
        base, _, offset = inside.replace(" ", "").partition("+")
        start = self.value(base, 64)
        if suffixes[0] != "global" or start is None:
            return None
        return self._load(start + int(offset or 0), bits // 8)


def _signed(value: int | None, bits: int, type_: str) -> int | None:
    """Unsigned bits as the number that this type reads in them."""
    return value - (1 << bits) if value is not None and type_[0] == "s" and value >> (bits - 1) else value


def _compute(kind: str, suffixes: list[str], values: list[int], bits: int) -> int | None:
    a, *rest = values
    match kind:
        case "mov":
            return a
        case "not":
            return ~a
        case "neg":
            return -a
        case "abs":
            return abs(a)
        case "popc":
            return a.bit_count()
        case "add":
            return a + rest[0]
        case "sub":
            return a - rest[0]
        case "mul":
            return (a * rest[0]) >> bits if "hi" in suffixes else a * rest[0]
        case "mad":
            return a * rest[0] + rest[1]
        case "div" | "rem" if rest[0]:
            quotient = abs(a) // abs(rest[0]) * (1 if (a < 0) == (rest[0] < 0) else -1)
            return quotient if kind == "div" else a - quotient * rest[0]
        case "shl":
            return a << rest[0] if rest[0] < bits else 0
        case "shr":
            return a >> min(rest[0], bits)
        case "setp" if len(suffixes) == 2 and suffixes[0] in _COMPARISONS:
            return int(_COMPARISONS[suffixes[0]](a, rest[0]))
        case _ if kind in _TWO:
            return _TWO[kind](a, rest[0])
    return None


def memory_of(regions: Iterable[tuple[int, int]]) -> Callable[[int, int], int | None]:
    """load(address, bytes) from these (address, size in bytes) of this process's memory, and of nothing else."""
    known = sorted(regions)

    def load(address: int, size: int) -> int | None:
        number = bisect_right(known, (address, 1 << 62)) - 1
        if number < 0 or address + size > sum(known[number]):
            return None
        return int.from_bytes(ctypes.string_at(address, size), "little")

    return load
