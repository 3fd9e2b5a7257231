"""Runs training steps under the profiler, and the same steps without it, alternating with plain eager PyTorch."""

import gzip
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from blink.experiments.profile.costs import step_costs
from blink.experiments.profile.trace import PART, STEP, Step, Work, steps_of
from blink.kernels.examine.bench.measure import copy_time, matmul_rate
from blink.kernels.examine.cases import layers_of
from blink.kernels.registry import Cost
from blink.model.backend import Backend
from blink.training.step import Phase
from blink.training.trainer import Trainer

PROFILED_STEPS = 3
_GPU_STEPS, _CPU_ROUNDS = 30, 5
_ROOF_SECONDS = 0.3
_COPY_BYTES = 1 << 28


@dataclass(frozen=True)
class Row:
    """One part of a step in one pass: milliseconds, what it must do, and the least time the hardware allows for that.

    bytes, flops and floor_ms are None where nothing is counted.
    """

    part: str
    passed: str
    ms: float
    bytes: int | None
    flops: int | None
    floor_ms: float | None


@dataclass(frozen=True)
class Profile:
    """A step's parts. step_ms: its median length without the profiler; profiled_ms: with it; idle_ms: gaps between
    pieces of work; bytes, flops, floor_ms: of everything that is counted, whether or not it is a row (a compiled step
    has no parts); copy_rate in bytes/s, matmul_rate in FLOP/s: the roofs, measured in the same call.
    """

    rows: list[Row]
    bytes: int
    flops: int
    floor_ms: float
    idle_ms: float
    profiled_ms: float
    step_ms: float
    copy_rate: float
    matmul_rate: float

    @property
    def parts_ms(self) -> float:
        """The sum of all parts, idle included."""
        return sum(row.ms for row in self.rows) + self.idle_ms


@dataclass(frozen=True)
class Comparison:
    """Median milliseconds of a step against plain eager PyTorch, alternating; what the convolutions' share allows."""

    ms: float
    eager_ms: float
    eager_convolution_ms: float
    eager_profiled_ms: float
    rounds: int

    @property
    def speedup(self) -> float:
        return self.eager_ms / self.ms

    @property
    def allowed(self) -> float:
        """The speed-up if everything but eager's convolutions took no time."""
        return self.eager_profiled_ms / self.eager_convolution_ms


def in_region(part: str, call: Callable) -> Callable:
    def wrapped(*args, **kwargs):
        with record_function(PART + part):
            return call(*args, **kwargs)

    return wrapped


def instrumented(backend: Backend) -> Backend:
    """The backend with its loss and its updates in regions of their own."""
    updates = {name: in_region("optimizer", getattr(backend, name)) for name in ("sgd_nesterov", "muon")}
    if backend.compile:
        return replace(backend, **updates)
    return replace(backend, cross_entropy=in_region("loss", backend.cross_entropy), **updates)


def add_regions(trainer: Trainer, layers: bool) -> None:
    """Give each layer of the network, and the batch, a region of its own; a compiled network keeps its layers fused."""
    trainer.batches.take = in_region("batch", trainer.batches.take)
    if not layers:
        return
    for name, module in layers_of(trainer.network):
        _hook(module, name)


def _hook(module: nn.Module, name: str) -> None:
    open_regions: list[record_function] = []

    def enter(*_):
        region = record_function(PART + name)
        region.__enter__()
        open_regions.append(region)

    def leave(*_):
        open_regions.pop().__exit__(None, None, None)

    module.register_forward_pre_hook(enter)
    module.register_forward_hook(leave)


class Stepper:
    """Steps of one trainer, one after another, through as many epochs as are asked for."""

    def __init__(self, trainer: Trainer, seed: int):
        self.trainer = trainer
        self._generator = torch.Generator(trainer.device).manual_seed(seed)
        self._count = 0
        if trainer.compiles_ahead:
            trainer.compile_ahead(seed)
        trainer.prepare(seed)

    def __call__(self) -> None:
        trainer, budget = self.trainer, self.trainer.budget
        if self._count % budget.steps_per_epoch == 0:
            trainer.start_epoch(self._count // budget.steps_per_epoch, self._generator)
        if self._count % budget.total_steps == 0:
            trainer.rewind()
        # always the costliest phase: everything is trained, on whole images
        trainer.do_step(Phase(tuple(range(len(trainer.optimizer.groups))), trainer.batches.size))
        self._count += 1


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _timed(stepper: Stepper, steps: int) -> float:
    """Milliseconds a step."""
    device = stepper.trainer.device
    _synchronize(device)
    begin = time.perf_counter()
    for _ in range(steps):
        stepper()
    _synchronize(device)
    return (time.perf_counter() - begin) * 1e3 / steps


def trace_steps(stepper: Stepper, path: Path, eager: list[Work] | None = None) -> list[Step]:
    """Profile a few steps, write their chrome trace to `path` (gzipped) and read it.

    Raises UserError where the profiler did not record the device's work.
    """
    cuda = stepper.trainer.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities) as profiler:
        for _ in range(PROFILED_STEPS + 1):
            with record_function(STEP):
                stepper()
        _synchronize(stepper.trainer.device)
    profiler.export_chrome_trace(str(path))
    with gzip.open(path, "rt") as file:
        return steps_of(json.load(file), cuda, eager)


def measure(make_trainer: Callable[[bool, bool], Trainer], layers: bool, seed: int, folder: Path) -> Profile:
    """Profile the steps of make_trainer(instrumented, graph); the traces go to `folder`.

    With a graph, the same step is profiled without one first, which tells the part that each kernel belongs to.
    """
    plain = Stepper(make_trainer(False, True), seed)
    device, graph = plain.trainer.device, plain.trainer.graph
    for _ in range(2):
        plain()
    rounds = [_timed(plain, _GPU_STEPS if device.type == "cuda" else 1) for _ in range(_CPU_ROUNDS)]

    trainer = make_trainer(True, False)
    add_regions(trainer, layers)
    stepper = Stepper(trainer, seed)
    stepper()
    steps = trace_steps(stepper, folder / "trace.json.gz")
    if graph:
        steps = trace_steps(plain, folder / "trace-graph.json.gz", eager=steps[-1].work)

    trainer = stepper.trainer
    classes, weight = len(trainer.dataset.classes), trainer.network.head.weight
    costs = step_costs(trainer.recipe, trainer.budget.batch_size, classes, trainer.image_shape, weight.element_size())
    dtype = weight.dtype if device.type == "cuda" else torch.float32
    copy_rate = _COPY_BYTES / (copy_time(_COPY_BYTES, device, _ROOF_SECONDS).best * 1e-6)
    product_rate = matmul_rate(dtype, device, _ROOF_SECONDS)
    mean: dict[tuple[str, str], float] = defaultdict(float)
    for step in steps:
        for owner, microseconds in step.by_owner().items():
            mean[owner] += microseconds / len(steps) / 1e3
    order = {owner: i for i, owner in enumerate(costs)}
    rows = []
    for owner in sorted(mean, key=lambda o: (order.get(o, len(order)), o)):
        cost = costs.get(owner)
        floor = None if cost is None else _floor_ms(cost, copy_rate, product_rate)
        counted = (None, None) if cost is None else (cost.bytes, cost.flops)
        rows.append(Row(*owner, mean[owner], *counted, floor))
    return Profile(
        rows,
        sum(cost.bytes for cost in costs.values()),
        sum(cost.flops for cost in costs.values()),
        sum(_floor_ms(cost, copy_rate, product_rate) for cost in costs.values()),
        statistics.fmean(step.idle for step in steps) / 1e3,
        statistics.fmean(step.length for step in steps) / 1e3,
        statistics.median(rounds),
        copy_rate,
        product_rate,
    )


def _floor_ms(cost: Cost, copy_rate: float, product_rate: float) -> float:
    return max(cost.bytes / copy_rate, cost.flops / product_rate) * 1e3


def compare(
    make_trainer: Callable[[], Trainer], make_eager: Callable[[bool], Trainer], seed: int, folder: Path
) -> Comparison:
    """Alternate steps with those of plain eager PyTorch, then profile the latter for its convolutions' share."""
    ours, theirs = Stepper(make_trainer(), seed), Stepper(make_eager(False), seed)
    steps = _GPU_STEPS if ours.trainer.device.type == "cuda" else 1
    for stepper in (ours, theirs):
        for _ in range(2):
            stepper()
    pairs = [(_timed(ours, steps), _timed(theirs, steps)) for _ in range(_CPU_ROUNDS)]
    del ours, theirs
    trainer = make_eager(True)
    add_regions(trainer, layers=True)
    stepper = Stepper(trainer, seed)
    stepper()
    profiled = trace_steps(stepper, folder / "trace-eager.json.gz")
    convolutions = statistics.fmean(
        sum(ms for (part, _), ms in step.by_owner().items() if ".conv" in part) for step in profiled
    )
    length = statistics.fmean(step.length for step in profiled)
    medians = (statistics.median(times) for times in zip(*pairs))
    return Comparison(*medians, convolutions / 1e3, length / 1e3, len(pairs))
