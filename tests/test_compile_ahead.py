"""Compiling ahead: every kernel that a run launches is among those compiled, each once, and nothing else changes."""

import threading
from types import SimpleNamespace

import pytest
import torch

from blink.experiments.plans import narrowed, stretched
from blink.experiments.profile.measure import Stepper
from blink.kernels import compile_ahead, launching
from blink.kernels.launching import Launch
from blink.model import backend
from blink.training import precision
from blink.training.budget import plan_budget
from blink.training.loop import train
from blink.training.recipes import AIR, HLB, Recipe
from blink.training.trainer import Trainer
from tests.oracle import DEVICE
from tests.small import small_dataset
from tests.test_training_step import PHASED


def make(recipe: Recipe) -> Trainer:
    recipe = narrowed(recipe, 0.05)
    dataset = small_dataset(16, 16, side=12).to(DEVICE)
    budget = plan_budget(recipe, len(dataset.train_images), 8, steps=2)
    return Trainer(recipe, dataset, budget, backend.fused(), precision.choose("fp32", DEVICE, True), False)


@pytest.fixture
def launched(monkeypatch) -> list[Launch]:
    """Every launch, whether it runs or is recorded."""
    seen = []

    def noted(*fields):
        seen.append(Launch(*fields))
        return seen[-1]

    monkeypatch.setattr(launching, "Launch", noted)
    return seen


# two steps of the last: one of small images with all layers trained, one of whole images with the first frozen
@pytest.mark.parametrize("recipe", [HLB, AIR, stretched(PHASED, 1 / 6)], ids=lambda recipe: recipe.name)
def test_a_run_launches_nothing_that_was_not_compiled_ahead(recipe, launched, monkeypatch, poisoned_memory):
    ahead = []
    monkeypatch.setattr(compile_ahead, "compile_launches", ahead.extend)
    trainer = make(recipe)
    assert len(trainer.phases()) == (1 if recipe.name == "hlb" else 2)
    trainer.compile_ahead(seed=3)
    # the whitening statistics, which the rest depends on, were launched for good
    ready = {compile_ahead.specialization(launch) for launch in launched}
    assert ready >= {compile_ahead.specialization(launch) for launch in ahead} and len(ahead) > 20
    launched.clear()
    if recipe.name == "hlb":
        losses = train(trainer, 3, validate=0).losses
        assert losses == train(make(recipe), 3, validate=0).losses and torch.tensor(losses).isfinite().all()
    else:
        # what a launch is compiled for does not depend on what the others computed
        monkeypatch.setattr("blink.training.loop.check_finite", lambda *arguments: None)
        with launching.recorded(lambda launch: None):
            train(trainer, 3, validate=0)
    assert len(launched) > 20 and {compile_ahead.specialization(launch) for launch in launched} <= ready


def test_a_profiled_step_launches_nothing_that_was_not_compiled_ahead(launched, monkeypatch):
    """Compiling one after another takes longer than all that is timed."""
    ahead = []
    monkeypatch.setattr(compile_ahead, "compile_launches", ahead.extend)
    monkeypatch.setattr(Trainer, "compiles_ahead", True)
    stepper = Stepper(make(HLB), seed=3)
    ready = {compile_ahead.specialization(launch) for launch in ahead}
    launched.clear()
    stepper()
    assert len(launched) > 10 and {compile_ahead.specialization(launch) for launch in launched} <= ready


class Kernel:
    """A stand-in that notes what it is warmed up with, once `together` threads are at it."""

    arg_names = ("x_ptr",)

    def __init__(self, together: int = 1):
        self.calls, self._barrier = [], threading.Barrier(together)

    def warmup(self, *arguments, grid, **options):
        self._barrier.wait(timeout=30)
        self.calls.append((arguments, options))
        return SimpleNamespace(run=None)


def test_each_specialization_is_compiled_once():
    """From tensors of its own, so that none of the launch's stay alive."""
    kernel, x = Kernel(), torch.zeros(64)
    options = {"BLOCK": 16}
    same = [Launch(kernel, (x, (x, 32)), options, 4), Launch(kernel, (torch.zeros(8), (x, 48)), options, 4)]
    others = [
        Launch(kernel, (x.double(), (x, 32)), options, 4),
        Launch(kernel, (x[1:], (x, 32)), options, 4),
        Launch(kernel, (x, (x, 33)), options, 4),
        Launch(kernel, (x, (x, 1)), options, 4),
        Launch(kernel, (x, (x, 2**32)), options, 4),
        Launch(kernel, (x, (x, None)), options, 4),
        Launch(kernel, (None, (x, 32)), options, 4),
        Launch(kernel, (x, (x, 32.0)), options, 4),
        Launch(kernel, (x, (x, 32)), {"BLOCK": 32}, 4),
        Launch(kernel, (x, (x, 32)), options, 8),
        Launch(Kernel(), (x, (x, 32)), options, 4),
    ]
    assert len({compile_ahead.specialization(launch) for launch in same}) == 1
    assert len({compile_ahead.specialization(launch) for launch in same + others}) == 1 + len(others)
    for first in same:
        stand_in = compile_ahead.without_data(first)
        assert compile_ahead.specialization(stand_in) == compile_ahead.specialization(first)
        assert all(t.untyped_storage().nbytes() <= 16 for t in (stand_in.arguments[0], stand_in.arguments[1][0]))
    assert not compile_ahead.specialization(compile_ahead.without_data(others[1]))[-1][0][1]
    with compile_ahead.compiled_ahead():
        for launch in same:
            launching.launch(launch.kernel, (1,), *launch.arguments, **options)
    ((arguments, given),) = kernel.calls
    assert given == {"num_warps": 4, "enable_fp_fusion": True, "BLOCK": 16}
    assert arguments[0].data_ptr() != x.data_ptr() and arguments[1][1] == 32


def test_kernels_compile_side_by_side_and_a_failure_is_told(monkeypatch):
    monkeypatch.setattr(compile_ahead.os, "cpu_count", lambda: 2)
    kernel, x = Kernel(together=2), torch.zeros(64)
    compile_ahead.compile_launches([Launch(kernel, (x,), {"BLOCK": n}, 4) for n in (16, 32)])
    assert len(kernel.calls) == 2

    class Failing(Kernel):
        def warmup(self, *arguments, grid, **options):
            raise RuntimeError("does not fit")

    with pytest.raises(RuntimeError, match="does not fit"):
        compile_ahead.compile_launches([Launch(Failing(), (x,), {}, 4)])
