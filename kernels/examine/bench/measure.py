"""How a call is timed: on a GPU with events, launches included, and again inside a CUDA graph; on a CPU by the clock.

Inputs rotate among enough sets to defeat the L2 cache; a timing is the median of many calls with its 20 and 80 %
quantiles.
"""

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

Call = Callable[[], object]
_MOST_SETS = 32


@dataclass(frozen=True)
class Timing:
    """Microseconds a call. graph: inside a CUDA graph, without launches; None off a GPU or where capture fails."""

    median: float
    low: float
    high: float
    samples: int
    graph: float | None = None
    note: str = ""

    @property
    def best(self) -> float:
        """What ratios are taken of: the graph's time where there is one, because the launches are not the op's."""
        return self.median if self.graph is None else self.graph


def summarize(microseconds: list[float], graph: float | None = None, note: str = "") -> Timing:
    low, high = (float(np.quantile(microseconds, q, method=m)) for q, m in ((0.2, "lower"), (0.8, "higher")))
    return Timing(statistics.median(microseconds), low, high, len(microseconds), graph, note)


def rotating_sets(bytes_moved: int, device: torch.device) -> int:
    """How many sets of arguments make a call find nothing of its own in the cache."""
    if device.type != "cuda":
        return 2
    cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 50 << 20)
    return max(2, min(_MOST_SETS, math.ceil(3 * cache / max(1, bytes_moved))))


def time_calls(prepare: Callable[[], list[Call]], device: torch.device, budget_seconds: float) -> Timing:
    """Time the calls that prepare() returns, in rotation, for about `budget_seconds`.

    prepare runs on the stream that the calls will run on, because a backward pass runs where its forward pass did.
    """
    if device.type != "cuda":
        calls = prepare()
        for call in calls:
            call()
        samples: list[float] = []
        end = time.perf_counter() + budget_seconds
        while len(samples) < 5 or (time.perf_counter() < end and len(samples) < 1000):
            begin = time.perf_counter()
            calls[len(samples) % len(calls)]()
            samples.append((time.perf_counter() - begin) * 1e6)
        return summarize(samples)
    samples = _time_events(prepare(), budget_seconds / 2)
    graph, note = _time_graph(prepare, budget_seconds / 2)
    return summarize(samples, graph, note)


def _time_events(calls: list[Call], budget_seconds: float) -> list[float]:
    for call in calls:
        call()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for call in calls:
        call()
    torch.cuda.synchronize()
    estimate = (time.perf_counter() - begin) / len(calls)
    repeats = max(20, min(1000, int(budget_seconds / estimate)))
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for i, (start, stop) in enumerate(pairs):
        start.record()
        calls[i % len(calls)]()
        stop.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(stop) * 1000 for start, stop in pairs]


def _time_graph(prepare: Callable[[], list[Call]], budget_seconds: float) -> tuple[float | None, str]:
    """Microseconds a call inside a captured graph of all sets, or None and the reason."""
    stream = torch.cuda.Stream()
    try:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            calls = prepare()
            for call in calls:
                call()
        torch.cuda.synchronize()
        rounds = max(1, 64 // len(calls))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(rounds):
                for call in calls:
                    call()
    except RuntimeError as error:
        torch.cuda.synchronize()
        return None, f"no graph: {str(error).splitlines()[0]}"
    count = rounds * len(calls)
    graph.replay()
    torch.cuda.synchronize()
    samples = []
    end = time.perf_counter() + budget_seconds
    while len(samples) < 5 or (time.perf_counter() < end and len(samples) < 200):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        samples.append(start.elapsed_time(stop) * 1000 / count)
    return statistics.median(samples), ""


def peak_extra_bytes(call: Call, device: torch.device) -> int | None:
    """Memory a call allocates beyond what is already there, at its peak; None off a GPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = call()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated(device) - before
    del result
    return peak


def copy_time(bytes_moved: int, device: torch.device, budget_seconds: float) -> Timing:
    """The memory roof: a device copy that reads half of the bytes and writes the other half, in the same harness."""
    half = max(1, bytes_moved // 2)
    sets = rotating_sets(bytes_moved, device)

    def prepare() -> list[Call]:
        pairs = [[torch.zeros(half, dtype=torch.uint8, device=device) for _ in range(2)] for _ in range(sets)]
        return [lambda a=a, b=b: b.copy_(a) for a, b in pairs]

    return time_calls(prepare, device, budget_seconds)


def matmul_rate(dtype: torch.dtype, device: torch.device, budget_seconds: float) -> float:
    """The arithmetic roof: FLOP/s of a large square product of random numbers in `dtype`."""
    size = 8192 if device.type == "cuda" else 2048

    def prepare() -> list[Call]:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        return [lambda: a @ b]

    return 2 * size**3 / (time_calls(prepare, device, budget_seconds).best * 1e-6)
