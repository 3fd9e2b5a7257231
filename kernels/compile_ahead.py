"""Compile kernels in parallel before their first launch, which would compile them one after another.

Most of a compilation is spent outside of Python, where threads do run side by side.
"""

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import Tensor
from triton.runtime import driver

from .launching import Launch, mapped, on_device, recorded, specialized


@contextmanager
def compiled_ahead() -> Iterator[None]:
    """Inside, no kernel of this package runs (outputs are left as allocated); all are compiled when it ends.

    For tensors on a GPU. Raises what the compiler raises.
    """
    distinct: dict[tuple, Launch] = {}

    def record(launch: Launch) -> None:
        key = specialization(launch)
        if key not in distinct:
            distinct[key] = without_data(launch)

    with recorded(record):
        yield
    compile_launches(distinct.values())


def compile_launches(launches: Iterable[Launch]) -> None:
    """Compile what these launches would run and load it, a thread for each of the machine's cores."""
    launches = list(launches)
    if any(launch.device.type == "cuda" for launch in launches):
        # its first use builds it, which all threads would begin at once
        _ = driver.active
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for _ in pool.map(_compile, launches):
            pass


def _compile(launch: Launch) -> None:
    # the current device is a thread's own
    with on_device(launch.device):
        compiled = launch.kernel.warmup(*launch.arguments, grid=(1,), **launch.options)
        # what a first launch would otherwise build and load
        _ = compiled.run


def without_data(launch: Launch) -> Launch:
    """The same specialization with tensors of a few bytes, so that nothing of a step outlives it."""

    def stand_in(value):
        if not isinstance(value, Tensor):
            return value
        room = torch.empty(2, dtype=value.dtype, device=value.device)
        return room[:1] if specialized(value)[1] else room[1:]

    return launch._replace(arguments=mapped(stand_in, launch.arguments))


def specialization(launch: Launch) -> tuple:
    """Equal for two launches that run the same machine code on the same device."""
    constexprs = tuple(sorted(launch.constexprs.items()))
    arguments = mapped(specialized, launch.arguments)
    return launch.kernel, launch.device, launch.num_warps, launch.maxnreg, constexprs, arguments
