"""How kernels of this package are launched, and how torch.compile sees them.

Every launch goes through `launch`, so that the same launchers can also run "dry": inside `recorded` nothing runs
and each launch is handed on with its arguments, which is what compiling ahead works from.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import NamedTuple

import torch
import triton

_TYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.uint8: "u8",
    torch.int32: "i32",
    torch.int64: "i64",
}

# variables of the binder that Triton writes for each kernel, which hide arguments; and keywords of a launch
_TRITONS_OWN_NAMES = {
    *("params", "specialization", "options", "backend", "specialize_impl", "JITCallable"),
    *("grid", "warmup", "debug", "instrumentation_mode", "num_warps", "num_stages", "num_ctas", "maxnreg"),
    "enable_fp_fusion",
}

# the field of a constant tuple is a plain number, which a function of an older compiler does not take as an argument
_PLAIN_FIELDS = tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 8)

_record: Callable[["Launch"], None] | None = None


class Launch(NamedTuple):
    """One recorded launch: the kernel, its runtime arguments in order, its constexprs, its warps, the most registers
    that a thread may take (None: what NVIDIA's assembler thinks best), and its programs.
    """

    kernel: triton.JITFunction
    arguments: tuple
    constexprs: dict
    num_warps: int
    maxnreg: int | None = None
    grid: tuple[int, ...] = (1,)

    @property
    def compile_options(self) -> dict:
        # fusing a multiply and an add rounds once instead of twice; stated, because Triton's default is changing
        options = dict(num_warps=self.num_warps, enable_fp_fusion=True)
        # only NVIDIA's compiler knows this one
        return options if self.maxnreg is None or torch.version.hip else {**options, "maxnreg": self.maxnreg}

    @property
    def constants(self) -> dict:
        """The constexprs as this version of Triton compiles them."""
        return {name: _constant(value) for name, value in self.constexprs.items()}

    @property
    def options(self) -> dict:
        """The keywords of the launch."""
        return {**self.compile_options, **self.constants}

    @property
    def device(self) -> torch.device:
        """Of its tensors, which are all on one."""
        return next(value.device for _, value in leaves(self.arguments) if isinstance(value, torch.Tensor))


def _constant(value):
    if _PLAIN_FIELDS or _INTERPRETED or not isinstance(value, tuple):
        return value
    return mapped(triton.language.constexpr, value)


@contextmanager
def recorded(record: Callable[[Launch], None]) -> Iterator[None]:
    """Inside, launches are handed to `record` instead of running; outputs are left as allocated."""
    global _record
    before, _record = _record, record
    try:
        yield
    finally:
        _record = before


@contextmanager
def captured_launches() -> Iterator[list[Launch]]:
    """Collect launches, and their tensors with them, instead of running them."""
    launches: list[Launch] = []
    with recorded(launches.append):
        yield launches


def capturing() -> bool:
    return _record is not None


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, which was decided when this package was imported."""
    return _INTERPRETED


_INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


@cache
def check_argument_names(kernel) -> None:
    """Raises ValueError for an argument that Triton's binder would not see: only a real launch would show it."""
    for name in kernel.arg_names:
        if name in _TRITONS_OWN_NAMES:
            raise ValueError(
                f"{kernel.__name__} has an argument named {name!r}, which Triton uses itself at a launch; rename it"
            )


def launch(
    kernel, grid: tuple[int, ...], *arguments, num_warps: int = 4, maxnreg: int | None = None, **constexprs
) -> None:
    """Run `kernel` over `grid`. Tensor arguments, alone or in tuples, are dense and on one device; None is no tensor.

    Numbers that are multiplied with each other travel alone: those in a tuple the interpreter computes with in float64.

    maxnreg: see `Launch`; stated where the assembler would otherwise aim at few registers and spill some.
    """
    check_argument_names(kernel)
    this = Launch(kernel, arguments, constexprs, num_warps, maxnreg, grid)
    if _record is not None:
        _record(this)
        return
    with on_device(this.device):
        kernel[grid](*arguments, **this.options)


def leaves(arguments: tuple) -> Iterator[tuple[tuple[int, ...], object]]:
    """(path, value) of all that is in a tuple or in tuples inside of it; the path is the index at each level."""
    for index, value in enumerate(arguments):
        if isinstance(value, tuple):
            yield from (((index, *path), leaf) for path, leaf in leaves(value))
        else:
            yield (index,), value


def mapped(function: Callable, value):
    """function(value); of a tuple that of each element, in a tuple with the same names."""
    if not isinstance(value, tuple):
        return function(value)
    elements = (mapped(function, element) for element in value)
    return value._make(elements) if hasattr(value, "_make") else tuple(elements)


def specialized(value) -> tuple[str, bool | None]:
    """(type in the compiler's notation, whether 16 divides the value): what a launch compiles an argument for.

    None is a constant, and no number. Raises TypeError for what is no argument of a kernel.
    """
    if value is None:
        return "constexpr", None
    if isinstance(value, torch.Tensor):
        return "*" + _TYPES[value.dtype], value.data_ptr() % 16 == 0
    if isinstance(value, int):
        return "constexpr" if value == 1 else "i32" if -(2**31) <= value < 2**31 else "i64", value % 16 == 0
    if isinstance(value, float):
        return "fp32", False
    raise TypeError(f"cannot compile for an argument of {type(value)}")


def on_device(device: torch.device) -> AbstractContextManager:
    """Inside, Triton works for this device; nothing to do where it is the current one."""
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        return torch.cuda.device(device)
    return nullcontext()


# of a device that is not there: of the interpreter, and of a compilation ahead
_processors = 132


@contextmanager
def assumed_processors(count: int) -> Iterator[None]:
    """Inside, a device that is not there has so many processors (SMs, CUs)."""
    global _processors
    before, _processors = _processors, count
    try:
        yield
    finally:
        _processors = before


@cache
def _processors_of(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def resident(device: torch.device, programs: int) -> int:
    """As many programs as run at once, where `programs` share a processor: for kernels that loop over their tiles."""
    return programs * (_processors_of(device) if device.type == "cuda" else _processors)


_tensor_cores = True  # as `_processors`


@contextmanager
def assumed_tensor_cores(present: bool) -> Iterator[None]:
    """Inside, a device that is not there has tensor cores that Triton uses, or has none."""
    global _tensor_cores
    before, _tensor_cores = _tensor_cores, present
    try:
        yield
    finally:
        _tensor_cores = before


def tensor_cores(device: torch.device) -> bool:
    """Whether Triton multiplies on this device's tensor cores: NVIDIA's from compute capability 8.0 on, AMD's."""
    if device.type != "cuda":
        return _tensor_cores
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)


def opaque_op(name: str, mutates: tuple[str, ...] = ()) -> Callable:
    """Register a launcher as the operator `blink::<name>`; its shape rule is added with `.register_fake`."""
    return torch.library.custom_op(f"blink::{name}", mutates_args=mutates)
