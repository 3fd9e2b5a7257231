"""Compile kernels in parallel before their first launch, which would compile them one after another.

Most of a compilation is spent outside of Python, where threads do run side by side.
"""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from ._launch import Launch, captured_launches, on_device, specialized


@contextmanager
def compiled_ahead() -> Iterator[None]:
    """Inside, no kernel of this package runs (outputs are left as allocated); all are compiled when it ends.

    For tensors on a GPU. Raises what the compiler raises.
    """
    with captured_launches() as launches:
        yield
    compile_launches(launches)


def compile_launches(launches: list[Launch]) -> None:
    """Compile what these launches would run, each specialization once, a thread for each of the machine's cores."""
    distinct = {specialization(launch): launch for launch in launches}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for _ in pool.map(_compile, distinct.values()):
            pass


def _compile(launch: Launch) -> None:
    # the current device is a thread's own
    with on_device(launch.device):
        launch.kernel.warmup(*launch.arguments, grid=(1,), **launch.options)


def specialization(launch: Launch) -> tuple:
    """Equal for two launches that run the same machine code on the same device."""
    arguments = tuple(
        tuple(map(specialized, value)) if isinstance(value, tuple) else specialized(value) for value in launch.arguments
    )
    return launch.kernel, launch.device, launch.num_warps, tuple(sorted(launch.constexprs.items())), arguments
