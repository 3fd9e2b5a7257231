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
from torch.profiler import ProfilerActivity, profile, record_function

from blink.experiments.profile.costs import step_costs
from blink.experiments.profile.trace import PART, STEP, Step, Work, steps_of
from blink.kernels.examine.bench.measure import copy_time, matmul_rate
from blink.kernels.examine.cases import layers_of
from blink.kernels.registry import Cost
from blink.model.backend import Backend
from blink.model.convolution import arithmetic_dtype
from blink.training.precision import DTYPES
from blink.training.step import Phase
from blink.training.trainer import Trainer

PROFILED_STEPS = 3
_GPU_STEPS, _ROUNDS, _SETTLING = 30, 5, 3
_ROOF_SECONDS = 0.3
_COPY_BYTES = 1 << 28


@dataclass(frozen=True)
class Row:
    """One part of a step in one pass: milliseconds, what it must do, and the least time the hardware allows for that.

    bytes, flops and floor_ms are None where nothing is counted.
    """

    part: str
    direction: str
    ms: float
    bytes: int | None
    flops: int | None
    floor_ms: float | None


@dataclass(frozen=True)
class Profile:
    """A step's parts. step_ms: its median length without the profiler; profiled_ms: with it; idle_ms: gaps between
    pieces of work; bytes, flops, floor_ms: of everything that is counted, whether or not it is a row (a compiled step
    has no parts); copy_rate in bytes/s, matmul_rate in FLOP/s: the roofs, measured in the same call, the latter in
    matmul_dtype, which convolutions compute in.
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
    matmul_dtype: str

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
    for name, module in layers_of(trainer.network) if layers else ():
        module.forward = in_region(name, module.forward)


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
        done = self._count % budget.total_steps
        if done == 0:
            trainer.rewind()
        if done % budget.steps_per_epoch == 0:
            trainer.start_epoch(done // budget.steps_per_epoch, self._generator)
        # always the costliest phase: everything is trained, on whole images
        trainer.do_step(Phase(tuple(range(len(trainer.optimizer.param_groups))), trainer.batches.size))
        self._count += 1


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _rounds(*steppers: Stepper) -> list[list[float]]:
    """Of each, milliseconds a step in every round; rounds alternate, after two steps that nobody counts."""
    device = steppers[0].trainer.device
    steps = _GPU_STEPS if device.type == "cuda" else 1

    def timed(stepper: Stepper) -> float:
        _synchronize(device)
        begin = time.perf_counter()
        for _ in range(steps):
            stepper()
        _synchronize(device)
        return (time.perf_counter() - begin) * 1e3 / steps

    for stepper in (*steppers, *steppers):
        stepper()
    return list(map(list, zip(*([timed(stepper) for stepper in steppers] for _ in range(_ROUNDS)))))


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


def _traced_parts(trainer: Trainer, layers: bool, seed: int, path: Path) -> list[Step]:
    """The steps of an instrumented trainer, each layer in a region of its own if asked for."""
    add_regions(trainer, layers)
    stepper = Stepper(trainer, seed)
    # until what a step allocates lies where an earlier one's lay, pages come anew, in whichever part takes them
    for _ in range(_SETTLING):
        stepper()
    return trace_steps(stepper, path)


def measure(make_trainer: Callable[[bool, bool], Trainer], layers: bool, seed: int, folder: Path) -> Profile:
    """Profile the steps of make_trainer(instrumented, graph); the traces go to `folder`.

    With a graph, the same step is profiled without one first, which tells the part that each kernel belongs to.
    """
    plain = Stepper(make_trainer(False, True), seed)
    (rounds,) = _rounds(plain)
    steps = _traced_parts(make_trainer(True, False), layers, seed, folder / "trace.json.gz")
    trainer, device = plain.trainer, plain.trainer.device
    if trainer.graph:
        steps = trace_steps(plain, folder / "trace-graph.json.gz", eager=steps[-1].work)

    classes, weight = len(trainer.dataset.classes), trainer.network.head.weight
    costs = step_costs(trainer.recipe, trainer.budget.batch_size, classes, trainer.image_shape, weight.element_size())
    copy_rate = _COPY_BYTES / (copy_time(_COPY_BYTES, device, _ROOF_SECONDS).best * 1e-6)
    products = arithmetic_dtype(torch.empty(0, dtype=trainer.precision.compute, device=device))
    product_rate = matmul_rate(products, device, _ROOF_SECONDS)
    mean: dict[tuple[str, str], float] = defaultdict(float)
    for step in steps:
        for owner, microseconds in step.by_owner().items():
            mean[owner] += microseconds / len(steps) / 1e3
    order = {owner: i for i, owner in enumerate(costs)}
    rows = []
    for owner in sorted(mean, key=lambda o: (order.get(o, len(order)), o)):
        cost = costs.get(owner)
        counted = (cost.bytes, cost.flops, _floor_ms(cost, copy_rate, product_rate)) if cost else (None, None, None)
        rows.append(Row(*owner, mean[owner], *counted))
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
        next(name for name, dtype in DTYPES.items() if dtype == products),
    )


def _floor_ms(cost: Cost, copy_rate: float, product_rate: float) -> float:
    return max(cost.bytes / copy_rate, cost.flops / product_rate) * 1e3


def compare(
    make_trainer: Callable[[], Trainer], make_eager: Callable[[bool], Trainer], seed: int, folder: Path
) -> Comparison:
    """Alternate steps with those of plain eager PyTorch, then profile the latter for its convolutions' share."""
    medians = map(statistics.median, _rounds(Stepper(make_trainer(), seed), Stepper(make_eager(False), seed)))
    profiled = _traced_parts(make_eager(True), True, seed, folder / "trace-eager.json.gz")
    convolutions = statistics.fmean(
        sum(ms for (part, _), ms in step.by_owner().items() if ".conv" in part) for step in profiled
    )
    length = statistics.fmean(step.length for step in profiled)
    return Comparison(*medians, convolutions / 1e3, length / 1e3, _ROUNDS)
