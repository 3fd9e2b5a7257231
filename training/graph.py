"""A call on memory that never moves, captured once as a CUDA graph and replayed: no launch from Python after that."""

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


class Replay:
    """`call()` by itself or, where `enabled`, as a graph that its first use captures.

    state: every tensor that the call changes and that outlives it; they are restored after each warm-up call that a
    capture needs, so that the first use changes them once, as every other. pool: memory that graphs may share which are
    not replayed at once and leave nothing but their state (`torch.cuda.graph_pool_handle()`).
    """

    def __init__(self, call: Callable[[], None], state: list[Tensor], enabled: bool, pool: tuple | None = None):
        self._call, self._state, self._enabled, self._pool = call, state, enabled, pool
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> None:
        if not self._enabled:
            self._call()
            return
        if self._graph is None:
            self._graph = self._capture()
        self._graph.replay()

    def _capture(self) -> "torch.cuda.CUDAGraph":
        stream = _side_stream(torch.cuda.current_device())
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP_CALLS):
                # each by itself: a second call further on could run past the end of what the state counts
                with restored(self._state):
                    self._call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # this records and runs nothing
        with torch.cuda.graph(graph, pool=self._pool, stream=stream):
            self._call()
        return graph
