"""The training step: what it counts, that phases freeze what they should, and on a GPU its graph and its asynchrony."""

import gc
import weakref
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import pytest
import torch

from blink.experiments import stem
from blink.experiments.plans import narrowed
from blink.kernels.environment import has_cxx_compiler
from blink.model import backend
from blink.training import graph, precision
from blink.training.budget import plan_budget
from blink.training.listener import Listener
from blink.training.loop import train, train_epoch
from blink.training.recipes import AIR, HLB, Resolution, freezing
from blink.training.trainer import Trainer
from tests.oracle import DEVICE
from tests.small import small_dataset

# every block that makes phases of a run: smaller images, frozen layers, images that sit out
PHASED = freezing(replace(AIR, name="phased", resolutions=(Resolution(0.4, 0.75),), keep=0.75, tta_fraction=0.3), 0, 6)
RECIPES = pytest.mark.parametrize("recipe", [HLB, AIR, PHASED], ids=lambda recipe: recipe.name)


@pytest.fixture(autouse=True)
def _repeatable(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)


@pytest.fixture(scope="module")
def dataset():
    return small_dataset(64, 32, side=16).to(DEVICE)


def make(recipe, dataset, which, captured=False, dtype="fp32", **options):
    budget = plan_budget(recipe, len(dataset.train_images), 16, **options)
    return Trainer(recipe, dataset, budget, which, precision.choose(dtype, DEVICE, True), captured)


@RECIPES
def test_runs_of_one_trainer_are_those_of_fresh_ones(recipe, dataset):
    """Nothing of a run is left in the tensors that the next one uses: same seed, same bits."""
    trainer = make(recipe, dataset, backend.reference(), steps=6)
    first, other, again = (train(trainer, seed, validate=0) for seed in (3, 4, 3))
    assert again.losses == first.losses != other.losses
    fresh = train(make(recipe, dataset, backend.reference(), steps=6), 3, validate=0)
    assert fresh.losses == first.losses and fresh.accuracy == first.accuracy
    assert all(torch.equal(fresh.state[name], value) for name, value in first.state.items())


@RECIPES
def test_a_warm_up_meets_every_phase_and_leaves_nothing(recipe, dataset, monkeypatch):
    """A step of each phase and the evaluation, on labels that are not the data set's; no bit of a run changes."""
    plain = train(make(recipe, dataset, backend.reference(), steps=9), 3, validate=0)
    trainer = make(recipe, dataset, backend.reference(), steps=9)
    do_step, final_logits, seen = trainer.do_step, trainer.final_logits, []
    monkeypatch.setattr(trainer, "do_step", lambda phase: (seen.append(phase), do_step(phase)))
    monkeypatch.setattr(trainer, "final_logits", lambda: (seen.append("evaluated"), final_logits())[1])
    trainer.warm_up(3)
    assert seen == [*trainer.phases(), "evaluated"]
    assert not torch.equal(trainer.batches.labels, dataset.train_labels)
    warm = train(trainer, 3, validate=0)
    assert warm.losses == plain.losses and warm.accuracy == plain.accuracy
    assert all(torch.equal(warm.state[name], value) for name, value in plain.state.items())


@pytest.mark.skipif(not has_cxx_compiler(), reason="torch.compile needs a C++ compiler on a CPU")
def test_nothing_is_compiled_after_a_warm_up(dataset):
    # one group of convolutions: the compiler's time grows with them
    network = replace(PHASED.network, conv_groups=PHASED.network.conv_groups[:1])
    trainer = make(narrowed(replace(PHASED, network=network), 0.1), dataset, backend.compiled(), steps=9)
    trainer.warm_up(0)
    with torch.compiler.set_stance("fail_on_recompile"):
        assert torch.tensor(train(trainer, 0, validate=0).losses).isfinite().all()


def test_a_dropped_trainer_is_freed_at_once(dataset):
    """Its graphs' memory would otherwise stay until the garbage collector happens to run."""
    trainer = make(AIR, dataset, backend.reference(), steps=1)
    train(trainer, 0, validate=0)
    kept = weakref.ref(trainer)
    gc.disable()
    try:
        del trainer
        assert kept() is None
    finally:
        gc.enable()


def test_a_stem_can_be_timed_after_a_warm_up_that_froze_it(dataset, monkeypatch):
    monkeypatch.setattr(stem, "_SECONDS", 0.01)
    trainer = make(PHASED, dataset, backend.reference(), steps=9)
    trainer.warm_up(0)
    assert not trainer.network.stem.bias.requires_grad
    assert stem.milliseconds(trainer) > 0


def test_training_accuracy_counts_the_epochs_right_answers(dataset):
    """With rates of 0 the network of every step is the same, so that each epoch's count can be done by hand."""
    recipe = replace(
        AIR, param_groups=tuple(replace(g, lr=0.0, rule="sgd") for g in AIR.param_groups), flip="none", translation=0
    )
    recipe = replace(recipe, network=replace(recipe.network, norm_momentum=0.0))
    trainer = make(recipe, dataset, backend.reference(), epochs=2)
    rows = train(trainer, 0, validate=0).epochs
    generator = torch.Generator(DEVICE).manual_seed(0)
    for row in rows:
        order = torch.randperm(64, generator=generator, device=DEVICE)
        for _ in range(2):
            torch.randint(0, 1, (4, 16), generator=generator, device=DEVICE)
        right = 0
        trainer.network.train()
        for index in order.view(4, 16):
            logits = trainer.network(dataset.train_images[index].permute(0, 3, 1, 2))
            right += (logits.argmax(1) == dataset.train_labels[index]).sum().item()
        assert row.train_accuracy == right / 64


def test_a_frozen_groups_parameters_stay_and_its_gradient_is_not_computed(dataset):
    recipe = replace(AIR, param_groups=(replace(AIR.param_groups[0], epochs=4), *AIR.param_groups[1:]))
    trainer = make(recipe, dataset, backend.reference(), steps=4)
    seen = []
    train(trainer, 1, Listener(on_step=lambda done, losses: seen.append(trainer.network.stem.bias.detach().clone())), 0)
    assert not torch.equal(seen[0], seen[1]) and torch.equal(seen[1], seen[2]) and torch.equal(seen[2], seen[3])
    assert not trainer.network.stem.bias.requires_grad


def test_a_frozen_layer_stays_and_nothing_is_propagated_to_it(dataset):
    recipe = freezing(replace(AIR, param_groups=(replace(AIR.param_groups[0], epochs=2), *AIR.param_groups[1:])), 0, 4)
    trainer = make(recipe, dataset, backend.reference(), steps=4)
    names = [name for name, _ in trainer.network.named_parameters() if name.startswith(("groups.0.", "stem.bias"))]
    assert len(names) == 5
    seen, wanted = [], []

    def look(done, losses):
        seen.append({name: p.detach().clone() for name, p in trainer.network.named_parameters()})
        wanted.append({name for name, p in trainer.network.named_parameters() if p.requires_grad})

    train(trainer, 1, Listener(on_step=look), 0)
    for name in names:
        assert torch.equal(seen[1][name], seen[3][name]), name
        assert name not in wanted[2]
    assert not torch.equal(seen[0]["groups.0.conv1.weight"], seen[1]["groups.0.conv1.weight"])
    assert not torch.equal(seen[2]["groups.1.conv1.weight"], seen[3]["groups.1.conv1.weight"])
    assert wanted[3] == set(seen[3]) - set(names) - {"stem.whiten.weight"}


def test_the_first_steps_are_on_smaller_images(dataset):
    recipe = replace(AIR, resolutions=(Resolution(0.25, 0.6), Resolution(0.5, 0.75)))
    trainer = make(recipe, dataset, backend.reference(), steps=8)
    seen = []
    trainer.network.stem.register_forward_pre_hook(lambda module, inputs: seen.append(tuple(inputs[0].shape[2:])))
    train(trainer, 0, validate=0)
    assert seen[:8] == [(10, 10)] * 2 + [(12, 12)] * 2 + [(16, 16)] * 4
    # too small for three poolings: the least that the network takes
    assert replace(AIR, resolutions=(Resolution(1.0, 0.1),)).image_sizes((16, 16)) == {(9, 9), (16, 16)}


def test_losses_of_single_images_choose_who_sits_out(dataset):
    trainer = make(replace(AIR, keep=0.5), dataset, backend.reference(), epochs=2)
    assert trainer.budget.steps_per_epoch == 2
    trainer.prepare(0)
    generator, batches = torch.Generator(DEVICE).manual_seed(0), trainer.batches
    train_epoch(trainer, 0, generator)
    hardness = batches.hardness.clone()
    taken = batches.index.flatten()
    sat_out = torch.ones(64, dtype=torch.bool, device=DEVICE)
    sat_out[taken] = False
    assert hardness[taken].max() < 100 and (hardness[sat_out] == hardness.max()).all()
    means = trainer.progress.losses[:2]
    # without smoothing the loss differs from the one trained on, but not by much before anything is learnt
    assert hardness[taken].mean().item() == pytest.approx(means.mean().item(), rel=0.2)
    batches.draw(generator, 1)
    assert set(batches.index.flatten().tolist()) == set(sat_out.nonzero()[:, 0].tolist())


def test_cutout_and_jitter_reach_the_network(dataset):
    """Each changes the losses, by as much as it is strong."""
    base = replace(AIR, flip="none", translation=0)
    variants = (base, replace(base, cutout=6), replace(base, jitter=(0.3, 0.2)), replace(base, jitter=(0.0, 0.0)))
    plain, cut, jittered, unjittered = (
        train(make(recipe, dataset, backend.reference(), steps=2), 0, validate=0).losses for recipe in variants
    )
    assert cut[0] != plain[0] and jittered[0] != plain[0]
    assert unjittered == pytest.approx(plain, rel=1e-4)


class FakeCuda:
    """What a capture uses of torch.cuda, on the CPU: a capture runs the call too, but takes its effects back."""

    def __init__(self, state):
        self.state, self.replays = state, 0
        self.made, self.warmed_up_on, self.captured_on = [], [], []

    def Stream(self, device):
        self.made.append(self.current_stream())
        return self.made[-1]

    def current_stream(self):
        return SimpleNamespace(wait_stream=lambda other: None)

    def current_device(self):
        return 0

    def stream(self, stream):
        self.warmed_up_on.append(stream)
        return nullcontext()

    def CUDAGraph(self):
        return SimpleNamespace(replay=lambda: self.replay())

    def replay(self):
        self.replays += 1
        self.state += 1

    @contextmanager
    def graph(self, graph, pool, stream):
        self.captured_on.append(stream)
        before = self.state.clone()
        yield
        self.state.copy_(before)


@pytest.fixture
def fake(monkeypatch):
    fake = FakeCuda(torch.tensor([7]))
    monkeypatch.setattr(
        graph, "torch", SimpleNamespace(cuda=fake, no_grad=torch.no_grad, _foreach_copy_=torch._foreach_copy_)
    )
    # none of the fake's streams may be found by a later test
    monkeypatch.setattr(graph, "_side_stream", cache(graph._side_stream.__wrapped__))
    return fake


def test_warm_up_calls_of_a_capture_all_start_from_where_the_first_use_does(fake):
    """At the last step of an epoch there is no next batch to warm up with."""
    count, seen = fake.state, []

    def call():
        seen.append(count.item())
        count.add_(1)

    replay = graph.captured(call, [count])
    assert count.item() == 7
    replay()
    assert seen == [7] * (graph._WARM_UP_CALLS + 1) and count.item() == 8 and fake.replays == 1
    replay()
    assert len(seen) == graph._WARM_UP_CALLS + 1 and count.item() == 9 and fake.replays == 2


def test_all_captures_share_one_stream(fake):
    """A stream of its own would keep each capture's workspaces and what its warm-up freed."""
    for _ in range(2):
        graph.captured(lambda: None, [torch.zeros(1)])
    (stream,) = fake.made
    assert fake.warmed_up_on == fake.captured_on == [stream] * 2


gpu = pytest.mark.gpu


@gpu
@RECIPES
@pytest.mark.parametrize("which", [backend.fused, backend.reference], ids=["fused", "reference"])
def test_graph_gives_the_bits_of_the_step_without_one(recipe, which, dataset):
    plain, graphed = (make(recipe, dataset, which(), captured, "fp16", steps=9) for captured in (False, True))
    for seed in (3, 4):
        want, got = train(plain, seed, validate=0), train(graphed, seed, validate=0)
        assert got.losses == want.losses
        assert all(torch.equal(got.state[name], value) for name, value in want.state.items())


@gpu
@RECIPES
@pytest.mark.parametrize("captured", [False, True], ids=["eager", "graph"])
def test_nothing_waits_for_the_device_inside_an_epoch(recipe, captured, dataset):
    trainer = make(recipe, dataset, backend.fused(), captured, "fp16", epochs=2)
    train(trainer, 0, validate=0)
    trainer.prepare(1)
    generator = torch.Generator(DEVICE).manual_seed(1)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for epoch in range(2):
            train_epoch(trainer, epoch, generator)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert trainer.progress.losses.isfinite().all()
