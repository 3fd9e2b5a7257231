"""The run's clock: CUDA events on a GPU, perf_counter elsewhere, summed over the segments that count."""

import time

import torch


class Stopwatch:
    """Sums the time between start() and stop(); on a GPU nothing waits until `seconds` is read."""

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self._before = 0.0
        self._segments: list[tuple] = []

    def _now(self):
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def start(self) -> None:
        self._begin = self._now()

    def stop(self) -> None:
        self._segments.append((self._begin, self._now()))

    def go_on_from(self, seconds: float) -> None:
        """As if what was summed so far were these seconds, running if it ran."""
        self._before = seconds
        self._segments.clear()
        self._begin = self._now()

    @property
    def seconds(self) -> float:
        if not self._cuda:
            return self._before + sum(end - begin for begin, end in self._segments)
        torch.cuda.synchronize()
        return self._before + sum(begin.elapsed_time(end) for begin, end in self._segments) / 1000
