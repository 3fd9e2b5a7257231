"""In a process of its own: one peer's script, its number of runs changed in memory, with our clock beside its own.

`python -m blink.experiments.race.launch PEER SCRIPT RUNS OUT DEVICE` runs it in the current folder and writes to OUT,
as JSON lines, each counted run when it ends, and last what the process used. On a CPU, which no peer was written for,
what names CUDA is turned to the CPU, half precision to bfloat16, nothing is compiled, and so no run is for a warm-up,
which would be a whole training; the files are not touched.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from blink.experiments import records
from blink.experiments.race.peers import PEERS, Rows, with_runs, without_warm_up


def timed_event(seconds: list[float], event_type: type | None, synchronize) -> type:
    """A torch.cuda.Event that also notes the wall clock, the device idle; event_type None: only that.

    seconds: what gets the time between two events whenever a script asks for it.
    """

    class Event:
        def __init__(self, *args, **kwargs):
            self._event = event_type(*args, **kwargs) if event_type else None

        def record(self, *args) -> None:
            synchronize()
            self.at = time.perf_counter()
            if self._event is not None:
                self._event.record(*args)

        def elapsed_time(self, end: "Event") -> float:
            ours = end.at - self.at
            seconds.append(ours)
            return self._event.elapsed_time(end._event) if self._event is not None else 1e3 * ours

        def synchronize(self) -> None:
            synchronize()

        def query(self) -> bool:
            return self._event.query() if self._event is not None else True

    return Event


@contextmanager
def lent_to(namespace: dict, event: type) -> Iterator[None]:
    """Inside, `torch.cuda.Event` is `event` in code whose globals are `namespace`, and PyTorch's own everywhere else.

    Compilers time their candidates with it and Dynamo knows it by identity: what they time is none of the script's
    seconds, and must not wait for the device either.
    """
    kind, own = type(torch.cuda), torch.cuda.Event

    class Lending(kind):
        @property
        def Event(self) -> type:
            return event if sys._getframe(1).f_globals is namespace else own

    torch.cuda.__class__ = Lending
    try:
        yield
    finally:
        torch.cuda.__class__ = kind


class OnCpu(TorchFunctionMode):
    """Turns every device to the CPU and every float16 to bfloat16, in arguments and methods alike."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (torch.Tensor.cuda, torch.Tensor.pin_memory):
            return args[0]
        if func is torch.Tensor.half:
            return args[0].bfloat16()
        return func(*tree_map(self._turned, args), **tree_map(self._turned, kwargs or {}))

    @staticmethod
    def _turned(value):
        if value is torch.float16:
            return torch.bfloat16
        if isinstance(value, torch.device) and value.type == "cuda":
            return torch.device("cpu")
        return "cpu" if isinstance(value, str) and value.split(":")[0] == "cuda" else value


def turn_to_cpu() -> None:
    """What a script calls outside of tensors, made harmless on a machine without CUDA."""
    for name in ("synchronize", "empty_cache", "_sleep", "reset_peak_memory_stats"):
        setattr(torch.cuda, name, lambda *args, **kwargs: None)
    load = torch.load
    torch.load = lambda *args, **kwargs: load(*args, **{**kwargs, "map_location": "cpu"})
    torch.compile = lambda model=None, **options: model if model is not None else (lambda function: function)
    torch.nn.Module.compile = lambda self, *args, **kwargs: None


class Tee:
    """Standard output, which is also read line by line."""

    def __init__(self, stream, on_line):
        self._stream, self._on_line, self._line = stream, on_line, ""

    def write(self, text: str) -> int:
        *lines, self._line = (self._line + text).split("\n")
        for line in lines:
            self._on_line(line)
        return self._stream.write(text)

    def flush(self) -> None:
        self._stream.flush()


def main(name: str, script: str, runs: str, out: str, device: str) -> None:
    peer, path, on_gpu = PEERS[name], Path(script), device == "cuda"
    text = with_runs(peer, path.read_text(), int(runs), path)
    rows, measured, ended = Rows(peer), [], 0

    def on_line(line: str) -> None:
        nonlocal ended
        for accuracy, seconds in rows.read(line):
            ours = sum(measured)
            measured.clear()
            # on a GPU the first is the warm-up: the script's own, or the one more that was asked for
            if ended or not on_gpu:
                records.append(Path(out), {"accuracy": accuracy, "seconds": seconds, "our_seconds": ours})
            ended += 1

    if not on_gpu:
        text = without_warm_up(text, path)
        turn_to_cpu()
    event = timed_event(measured, torch.cuda.Event if on_gpu else None, torch.cuda.synchronize)
    sys.argv = [str(path)]
    sys.path.insert(0, str(path.parent))
    namespace = {"__name__": "__main__", "__file__": str(path)}
    try:
        with redirect_stdout(Tee(sys.stdout, on_line)), lent_to(namespace, event), nullcontext() if on_gpu else OnCpu():
            exec(compile(text, str(path), "exec"), namespace)
    finally:
        peak = torch.cuda.max_memory_allocated() if on_gpu else None
        records.append(Path(out), {"peak_bytes": peak, "torch": torch.__version__})


if __name__ == "__main__":
    main(*sys.argv[1:])
