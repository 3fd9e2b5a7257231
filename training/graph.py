"""A function on memory that never moves, captured as a CUDA graph: after that, nothing is launched from Python."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

# cuDNN tries its algorithms and Triton compiles in the first call; the later ones find the allocator settled
_WARM_UP_CALLS = 3


@cache
def _side_stream(device: int) -> "torch.cuda.Stream":
    """The one stream that captures happen on: each stream keeps cuBLAS workspaces and freed memory of its own."""
    return torch.cuda.Stream(device)


@contextmanager
def restored(state: list[Tensor]) -> Iterator[None]:
    """Whatever is done to these tensors inside is undone afterwards."""
    saved = [t.detach().clone() for t in state]
    try:
        yield
    finally:
        with torch.no_grad():
            for t, value in zip(state, saved):
                t.copy_(value)


def captured(function: Callable[[], None], state: list[Tensor], pool: tuple | None = None) -> Callable[[], None]:
    """`function` captured as a CUDA graph: calling what is returned replays it. Capturing changes nothing.

    state: every tensor that a call changes and that outlives it; they are restored after each warm-up call that a
    capture needs. pool: memory that graphs may share which are not replayed at once and leave nothing but their state
    (`torch.cuda.graph_pool_handle()`).
    """
    stream = _side_stream(torch.cuda.current_device())
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UP_CALLS):
            # each by itself: a second call further on could run past the end of what the state counts
            with restored(state):
                function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # this records and runs nothing
    with torch.cuda.graph(graph, pool=pool, stream=stream):
        function()
    return graph.replay
