"""Schedule, optimizer groups, weight average, budget, precision, and the report's numbers and files."""

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from model import convolution
from model.backend import reference
from model.network import Group, Network, NetworkConfig
from training import precision
from training.errors import UserError
from training.loop import Budget, check_finite, plan_budget
from training.optimizer import Optimizer, WeightAverage, group_parameters
from training.recipes import AIR, HLB, ParamGroup, Resolution, Schedule, freezing, gated
from training.report import spread, write_json

ROOT = Path(convolution.__file__).resolve().parent.parent
TINY = NetworkConfig(stem_channels=4, groups=(Group(8), Group(8, depth=0), Group(8)), se_reduction=4)


def tiny_network(classes=10, size=12, config=TINY):
    return Network(config, classes, (3, size, size), reference())


def factors(total, recipe=HLB):
    return [recipe.schedule.factor(step, total) for step in range(total)]


@pytest.mark.parametrize("total", [10, 50, 100, 240, 970, 1000])
def test_schedule_rises_from_0_to_1_at_a_fifth_and_ends_constant(total):
    values = factors(total)
    peak = total // 5 - 1
    assert values[0] == 0 and values[peak] == pytest.approx(1, abs=1e-12)
    rises = [b - a for a, b in pairwise(values[: peak + 1])]
    assert rises == pytest.approx([1 / peak] * peak)
    tail = values[total - total // 5 :]
    assert tail == [0.135] * (total // 5)
    assert all(a > b for a, b in pairwise(values[peak : total - total // 5]))
    assert sum(value == 0.135 for value in values) == total // 5 + 1


@given(st.integers(1, 3000))
@settings(deadline=None, max_examples=60)
def test_schedule_stays_within_0_and_1_and_turns_once(total):
    values = factors(total)
    assert all(0 <= value <= 1 for value in values)
    top = values.index(max(values))
    assert values[:top] == sorted(values[:top])
    assert values[top:] == sorted(values[top:], reverse=True)


@pytest.mark.parametrize("total", range(1, 11))
def test_short_schedules_train(total):
    values = factors(total)
    assert len(values) == total and all(0 <= value <= 1 for value in values)
    assert sum(values) > 0.5


def test_schedule_follows_the_recipe():
    recipe = replace(HLB, schedule=Schedule(peak=0.5, final=0.02, hold=0.3))
    values = factors(100, recipe)
    assert values[49] == 1 and values[48] < 1 and values[69:] == [0.02] * 31 and values[68] > 0.02


def test_a_schedule_without_a_hold_falls_linearly_to_just_above_0():
    assert factors(8, AIR) == pytest.approx([1 - step / 8 for step in range(8)])


@pytest.mark.parametrize("batch_size", [512, 128])
def test_hlb_optimizer_has_the_published_rates(batch_size):
    biases, weights = (g for g in HLB.groups)
    lr, decay = 1.5525 / batch_size, 0.85 * 4.8e-4 * batch_size
    assert weights.lr / batch_size == pytest.approx(lr) and weights.decay * batch_size == pytest.approx(decay)
    assert biases.lr / batch_size == pytest.approx(lr * 32) and biases.decay * batch_size == pytest.approx(decay / 32)
    assert {(g.rule, g.momentum, g.mean_lr) for g in HLB.groups} == {("sgd", 0.85, True)}
    optimizer = Optimizer(tiny_network(), HLB, batch_size, 10, 100, reference())
    expected = [[lr * 32 * f for f in factors(100)], [lr * f for f in factors(100)]]
    torch.testing.assert_close(optimizer.rates, torch.tensor(expected).t())


def names_of(network, recipe):
    names = {id(p): name for name, p in network.named_parameters()}
    return [{names[id(p)] for p in members} for members in group_parameters(network, recipe.groups)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(keep=0.0), "keep is a fraction above 0"),
        (dict(tta_fraction=1.1), "tta_fraction is a fraction"),
        (dict(resolutions=(Resolution(0.5, 0.5), Resolution(0.5, 0.75))), "rising ends"),
        (dict(resolutions=(Resolution(0.5, 0.0),)), "scales up to 1"),
    ],
)
def test_impossible_recipes_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(AIR, **changes)


def test_groups_of_gates_and_of_single_layers():
    gates = ParamGroup("gates", "sgd", 0.1, 0.9)
    config = replace(AIR.network, groups=tuple(Group(8, depth=1, residual=False) for _ in range(3)), se_reduction=4)
    recipe = gated(freezing(replace(AIR, network=config), 1, 2), 4, (0, 2), gates)
    own, filters1, biases1, *_ = names_of(tiny_network(config=recipe.network), recipe)
    assert own == {f"groups.{i}.se.fc{j}.{kind}" for i in (0, 2) for j in (1, 2) for kind in ("weight", "bias")}
    assert {frozenset(filters1), frozenset(biases1)} == {
        frozenset({"groups.1.conv1.weight", "groups.1.conv2.weight"}),
        frozenset({"groups.1.norm1.bias", "groups.1.norm2.bias"}),
    }


def test_every_trained_parameter_is_in_exactly_one_group():
    network = tiny_network()
    biases, weights = names_of(network, HLB)
    everything = {name for name, _ in network.named_parameters()}
    assert not weights & biases and weights | biases == everything - {"stem.whiten.weight"}
    assert biases == {name for name in everything if name.endswith(".bias")}
    assert {"groups.0.se.fc1.bias", "groups.2.se.fc2.bias", "stem.norm.bias"} <= biases
    assert {"groups.0.se.fc1.weight", "stem.project.weight", "head.weight"} <= weights
    network = tiny_network(config=AIR.network)
    stem, biases, head, filters = names_of(network, AIR)
    assert (stem, head) == ({"stem.bias"}, {"head.weight"})
    assert biases == {f"groups.{i}.norm{j}.bias" for i in range(3) for j in (1, 2)}
    assert filters == {f"groups.{i}.conv{j}.weight" for i in range(3) for j in (1, 2)}
    with pytest.raises(ValueError, match=r"no parameter group of the recipe trains head\.weight"):
        group_parameters(network, tuple(g for g in AIR.groups if g.params != "head"))


def test_a_group_stops_after_its_epochs_and_its_rate_reaches_0_there():
    network = tiny_network(config=AIR.network)
    optimizer = Optimizer(network, AIR, 10, 20, 160, reference())
    assert optimizer.steps == [60, 160, 160, 160]
    assert optimizer.active(59) == (0, 1, 2, 3) and optimizer.active(60) == (1, 2, 3)
    bias = optimizer.rates[:, 0].tolist()
    assert bias[:60] == pytest.approx([0.053 * (1 - step / 60) for step in range(60)]) and bias[60:] == [0.0] * 100
    optimizer.freeze_all_but(optimizer.active(60))
    assert not network.stem.bias.requires_grad and network.head.weight.requires_grad
    optimizer.freeze_all_but(optimizer.active(0))
    assert network.stem.bias.requires_grad and not network.stem.whiten.weight.requires_grad


def test_groups_that_differ_in_their_rates_only_are_one_call():
    """Each call gets every parameter's own gradient, buffer and rate, before and after a group has ended."""
    recipe = freezing(AIR, 0, 4)
    network = tiny_network(config=AIR.network)
    seen = []

    def rule(name):
        return lambda ps, gs, bs, lr, **options: seen.append((name, ps, gs, bs, lr, options))

    optimizer = Optimizer(
        network, recipe, 10, 20, 160, replace(reference(), sgd_nesterov=rule("sgd"), muon=rule("muon"))
    )
    for step, calls, still in ((0, 3, 14), (70, 3, 13), (100, 3, 9)):
        active = optimizer.active(step)
        params = optimizer.parameters(active)
        grads = [torch.full_like(p, float(i)) for i, p in enumerate(params)]
        seen.clear()
        optimizer.update(grads, active, torch.tensor([step]))
        assert len(seen) == calls and sum(len(ps) for _, ps, *_ in seen) == len(params) == still
        own = {id(p): (i, g) for i in active for p, g in zip(optimizer.params[i], optimizer.buffers[i])}
        for name, ps, gs, bs, lr, options in seen:
            assert len(ps) == len(gs) == len(bs) == len(lr) and lr.is_contiguous()
            for p, g, b, rate in zip(ps, gs, bs, lr):
                index = next(i for i, other in enumerate(params) if other is p)
                group = optimizer.groups[own[id(p)][0]]
                assert g.flatten()[0] == index and b is own[id(p)][1]
                assert rate == optimizer.rates[step, own[id(p)][0]] > 0
                assert (group.rule, group.momentum) == (name, options["momentum"])
                assert options["weight_decay"] == pytest.approx(group.decay * 10)


def test_updates_are_those_of_torch_sgd():
    """Five steps with a schedule, decay and Nesterov momentum, two groups; then again after a reset."""
    recipe = replace(
        HLB,
        schedule=Schedule(peak=0.5, final=0.1, hold=0.2),
        groups=(
            ParamGroup("biases", "sgd", 0.3, 0.7, 0.01),
            ParamGroup("weights", "sgd", 0.8, 0.9, 0.02, mean_lr=True),
        ),
    )
    ours, theirs = tiny_network(), tiny_network()
    theirs.load_state_dict(ours.state_dict())
    start = {name: value.clone() for name, value in ours.state_dict().items()}
    optimizer = Optimizer(ours, recipe, 4, 5, 5, reference())
    biases, weights = group_parameters(theirs, recipe.groups)
    for _ in range(2):
        own = (dict(momentum=0.7, weight_decay=0.04), dict(momentum=0.9, weight_decay=0.08))
        groups = [dict(params=params, **options) for params, options in zip((biases, weights), own)]
        sgd = torch.optim.SGD(groups, lr=0.1, momentum=0.5, nesterov=True)
        for step in range(5):
            factor = recipe.schedule.factor(step, 5)
            for group, lr in zip(sgd.param_groups, (0.3 * factor, 0.2 * factor)):
                group["lr"] = lr
            active = optimizer.active(step)
            grads = [torch.randn_like(p) for p in optimizer.parameters(active)]
            for p, g in zip([*biases, *weights], grads):
                p.grad = g.clone()
            optimizer.update(grads, active, torch.tensor([step]))
            sgd.step()
        for (name, a), b in zip(ours.named_parameters(), theirs.parameters()):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=name)
        for network in (ours, theirs):
            network.load_state_dict(start)
        optimizer.reset()


def averaged_network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))


def floats(network):
    return {name: t.clone() for name, t in network.state_dict().items() if t.is_floating_point()}


def disturb(network):
    with torch.no_grad():
        for t in network.state_dict().values():
            t.copy_(t + torch.randn(t.shape) if t.is_floating_point() else t + 1)


def assert_state(network, expected):
    for name, value in expected.items():
        torch.testing.assert_close(network.state_dict()[name], value, rtol=1e-6, atol=1e-6)


def test_weight_average_starts_as_a_copy_and_follows_the_recurrence_buffers_included():
    network, decay = averaged_network(), 0.9
    average = WeightAverage(network, decay)
    assert not average.started
    with pytest.raises(RuntimeError, match="never updated"), average.applied():
        pass
    disturb(network)
    average.update()
    assert average.started
    expected = floats(network)
    assert "1.running_var" in expected and "1.num_batches_tracked" not in expected
    with average.applied():
        assert_state(network, expected)
    for _ in range(4):
        disturb(network)
        average.update()
        expected = {k: decay * expected[k] + (1 - decay) * v for k, v in floats(network).items()}
    live = floats(network)
    with average.applied():
        assert_state(network, expected)
    for name, value in floats(network).items():
        assert torch.equal(value, live[name])


def test_weight_average_is_taken_off_after_an_exception():
    network = averaged_network()
    average = WeightAverage(network, 0.5)
    average.update()
    disturb(network)
    live = floats(network)
    with pytest.raises(ZeroDivisionError), average.applied():
        assert not torch.equal(floats(network)["0.weight"], live["0.weight"])
        raise ZeroDivisionError
    for name, value in floats(network).items():
        assert torch.equal(value, live[name])


def test_weight_average_of_half_weights_is_kept_in_float32():
    network = nn.Linear(1, 1, bias=False).half()
    average = WeightAverage(network, 0.999)
    with torch.no_grad():
        network.weight.fill_(1.0)
        average.update()
        network.weight.fill_(2.0)
    for _ in range(1000):  # each step alone is below fp16's resolution at 1
        average.update()
    with average.applied():
        assert network.weight.item() == pytest.approx(2 - 0.999**1000, abs=2e-3)
    assert network.weight.item() == 2.0


@pytest.mark.parametrize(
    ("images", "options", "expected"),
    [
        pytest.param(1, {}, (1, 1, 10), id="1 image"),
        pytest.param(2, {}, (2, 1, 10), id="2 images"),
        pytest.param(20, {}, (2, 10, 100), id="20 images"),
        pytest.param(100, {}, (4, 25, 250), id="100 images"),
        pytest.param(3072, {}, (128, 24, 240), id="3072 images"),
        pytest.param(8192, {}, (512, 16, 160), id="8192 images"),
        pytest.param(50_000, {}, (512, 97, 970), id="CIFAR-10"),
        pytest.param(50_000, dict(batch_size=1000), (1000, 50, 500), id="explicit batch"),
        pytest.param(100, dict(batch_size=512), (100, 1, 10), id="explicit batch above the images"),
        pytest.param(100, dict(batch_size=64), (64, 1, 10), id="explicit batch above the clamp"),
        pytest.param(50_000, dict(epochs=0.5), (512, 97, 48), id="half an epoch"),
        pytest.param(20, dict(epochs=1e-9), (2, 10, 1), id="never zero steps"),
        pytest.param(50_000, dict(steps=7), (512, 97, 7), id="steps"),
        pytest.param(20, dict(steps=25), (2, 10, 25), id="steps over several epochs"),
    ],
)
def test_budget(images, options, expected):
    budget = plan_budget(HLB, images, **options)
    assert (budget.batch_size, budget.steps_per_epoch, budget.total_steps) == expected


@given(st.integers(1, 60_000), st.none() | st.integers(1, 70_000), st.none() | st.floats(1e-6, 20))
@settings(deadline=None, max_examples=60)
def test_budget_always_fits_the_data(images, batch_size, epochs):
    budget = plan_budget(HLB, images, batch_size, epochs)
    assert 1 <= budget.batch_size <= images
    assert budget.steps_per_epoch == images // budget.batch_size >= 1
    assert 1 <= budget.total_steps <= budget.epochs * budget.steps_per_epoch
    assert (budget.epochs - 1) * budget.steps_per_epoch < budget.total_steps


@pytest.mark.parametrize(
    ("bad", "text"), [(float("nan"), "nan"), (float("inf"), "inf")], ids=["not a number", "infinite"]
)
def test_check_finite_names_the_first_bad_step(bad, text):
    budget = Budget(batch_size=64, steps_per_epoch=10, total_steps=40)
    check_finite(torch.tensor([2.3, 1.0]), 20, budget)
    message = rf"became {text} at step 23 of 40 \(batch size 64\).*--dtype fp32"
    with pytest.raises(UserError, match=message) as raised:
        check_finite(torch.tensor([2.3, 1.0, bad, float("nan")]), 20, budget)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("values", "mean", "std", "ci95"),
    [
        ([0.94], 0.94, None, None),
        ([1.0, 3.0], 2.0, 2**0.5, 12.7062047),
        ([1.0, 2.0, 3.0], 2.0, 1.0, 4.3026527 / 3**0.5),
        ([5.0, 5.0, 5.0], 5.0, 0.0, 0.0),
    ],
    ids=["n=1", "n=2", "n=3", "equal"],
)
def test_spread_against_hand_values(values, mean, std, ci95):
    found = spread(values)
    assert found["n"] == len(values) and found["mean"] == pytest.approx(mean)
    assert found["std"] == (None if std is None else pytest.approx(std))
    assert found["ci95"] == (None if ci95 is None else pytest.approx(ci95))


def test_write_json_round_trips_and_replaces(tmp_path):
    path = tmp_path / "out.json"
    write_json(path, {"old": 1})
    write_json(path, {"runs": [0.5, None, "é"]})
    assert json.loads(path.read_text()) == {"runs": [0.5, None, "é"]}
    assert [p.name for p in tmp_path.iterdir()] == ["out.json"]


def _full_disk_while_writing(monkeypatch):
    write = Path.write_text

    def half(self, text, *args, **kwargs):
        write(self, text[: len(text) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", half)


def _full_disk_while_replacing(monkeypatch):
    def fail(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)


@pytest.mark.parametrize(
    "fail", [_full_disk_while_writing, _full_disk_while_replacing], ids=["while writing", "while replacing"]
)
def test_failed_write_json_leaves_the_old_file_whole(tmp_path, monkeypatch, fail):
    path = tmp_path / "out.json"
    write_json(path, {"old": 1})
    with monkeypatch.context() as patched:
        fail(patched)
        with pytest.raises(UserError, match=r"could not write .*out\.json \(No space left on device\)"):
            write_json(path, {"new": list(range(100))})
    assert json.loads(path.read_text()) == {"old": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["out.json"]


@pytest.mark.parametrize(
    ("name", "device", "bf16", "interpreted", "expected"),
    [
        (None, "cpu", False, False, ("fp32", torch.float32, torch.float32)),
        (None, "cpu", True, False, ("bf16", torch.bfloat16, torch.float32)),
        (None, "cpu", True, True, ("fp32", torch.float32, torch.float32)),
        (None, "cuda", False, False, ("fp16", torch.float16, torch.float16)),
        ("fp32", "cpu", True, False, ("fp32", torch.float32, torch.float32)),
        ("bf16", "cpu", False, False, ("bf16", torch.bfloat16, torch.float32)),
        ("fp16", "cpu", False, False, ("fp16", torch.float16, torch.float16)),
        ("fp32", "cuda", False, False, ("fp32", torch.float32, torch.float32)),
        ("bf16", "cuda", False, False, ("bf16", torch.bfloat16, torch.bfloat16)),
    ],
    ids=lambda value: None if isinstance(value, tuple) else str(value),
)
def test_precision(monkeypatch, name, device, bf16, interpreted, expected):
    monkeypatch.setattr(precision, "fast_bf16", lambda: bf16)
    chosen = precision.choose(name, torch.device(device), interpreted)
    assert (chosen.name, chosen.compute, chosen.weights) == expected
    context = chosen.autocast(torch.device(device)) if device == "cpu" else None
    if context is not None:
        assert isinstance(context, nullcontext) == (chosen.compute == chosen.weights)


AMD, INTEL = "vendor_id\t: AuthenticAMD\n", "vendor_id\t: GenuineIntel\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (AMD + "flags\t: fpu avx2 avx512_bf16 sse\n", True),
        (INTEL + "flags\t: fpu avx2 avx512_bf16 sse\n", False),
        (INTEL + "flags\t: fpu avx512_bf16 amx_bf16\n", True),
        (AMD + "flags\t: fpu avx2 sse\n", False),
        ("Features\t: fp asimd bf16\n", True),
        ("", False),
        (None, False),
    ],
    ids=["AMD with", "Intel with", "Intel with AMX", "x86 without", "Arm with", "empty", "no such file"],
)
def test_fast_bf16_is_read_from_the_processors_flags(monkeypatch, text, expected):
    def read(self):
        if text is None:
            raise FileNotFoundError(self)
        return text

    monkeypatch.setattr(Path, "read_text", read)
    convolution.cpu_flags.cache_clear()
    try:
        assert convolution.fast_bf16() is expected
    finally:
        convolution.cpu_flags.cache_clear()


def test_freed_memory_is_kept_in_a_process_that_asks_for_it():
    """The same 64 MB again and again soon cost no page faults; in a process of its own, because it is for good."""
    code = (
        "import resource, torch\n"
        "from training.allocator import keep_freed_memory\n"
        "assert keep_freed_memory()\n"
        "def faults():\n    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "for _ in range(10):\n    torch.ones(1 << 24)\n"
        "before = faults()\n"
        "for _ in range(10):\n    torch.ones(1 << 24)\n"
        "print(faults() - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    # one mapping of 64 MB is 16384 pages
    assert int(done.stdout) < 16384, done.stderr
