"""Schedule, optimizer groups, weight average, budget, precision, and the report's numbers and files."""

import json
import os
from contextlib import nullcontext
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from model.backend import reference
from model.network import Group, Network, NetworkConfig
from training import precision
from training.errors import UserError
from training.loop import Budget, check_finite, plan_budget
from training.optimizer import WeightAverage, lr_factor, make_optimizer, set_lr
from training.recipes import HLB
from training.report import spread, write_json

TINY = NetworkConfig(stem_channels=4, groups=(Group(8), Group(8, short=True), Group(8)), se_reduction=4)


def tiny_network(classes=10, size=12):
    return Network(TINY, classes, (3, size, size), reference())


def factors(total, recipe=HLB):
    return [lr_factor(step, total, recipe) for step in range(total)]


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
    recipe = replace(HLB, peak_fraction=0.5, final_lr_fraction=0.02, ema_fraction=0.3)
    values = factors(100, recipe)
    assert values[49] == 1 and values[48] < 1 and values[69:] == [0.02] * 31 and values[68] > 0.02


@pytest.mark.parametrize("batch_size", [512, 128])
def test_optimizer_has_the_recipes_two_groups(batch_size):
    network = tiny_network()
    optimizer = make_optimizer(network, HLB, batch_size)
    weights, biases = optimizer.param_groups
    lr, decay = 1.5525 / batch_size, 0.85 * 4.8e-4 * batch_size
    assert weights["peak_lr"] == pytest.approx(lr) and weights["weight_decay"] == pytest.approx(decay)
    assert biases["peak_lr"] == pytest.approx(lr * 32) and biases["weight_decay"] == pytest.approx(decay / 32)
    for group in optimizer.param_groups:
        assert group["momentum"] == 0.85 and group["nesterov"] is True and group["dampening"] == 0
    set_lr(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([lr / 4, lr * 8])


def test_every_trained_parameter_is_in_exactly_one_group():
    network = tiny_network()
    weights, biases = ({id(p) for p in g["params"]} for g in make_optimizer(network, HLB, 64).param_groups)
    names = {id(p): name for name, p in network.named_parameters()}
    assert not weights & biases
    assert {names[i] for i in weights | biases} == set(names.values()) - {"stem.whiten.weight"}
    assert {names[i] for i in biases} == {name for name in names.values() if name.endswith(".bias")}
    assert {"groups.0.se.fc1.bias", "groups.2.se.fc2.bias", "stem.norm.bias"} <= {names[i] for i in biases}
    assert {"groups.0.se.fc1.weight", "stem.project.weight", "head.weight"} <= {names[i] for i in weights}


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
    monkeypatch.setattr(precision, "cpu_has_bf16", lambda: bf16)
    chosen = precision.choose(name, torch.device(device), interpreted)
    assert (chosen.name, chosen.compute, chosen.weights) == expected
    context = chosen.autocast(torch.device(device)) if device == "cpu" else None
    if context is not None:
        assert isinstance(context, nullcontext) == (chosen.compute == chosen.weights)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("processor: 0\nflags\t: fpu avx2 avx512_bf16 sse\n", True),
        ("flags\t: fpu avx2 sse\n", False),
        ("Features\t: fp asimd bf16\n", True),
        ("", False),
        (None, False),
    ],
    ids=["x86 with", "x86 without", "Arm with", "empty", "no such file"],
)
def test_bf16_is_read_from_the_processors_flags(monkeypatch, text, expected):
    def read(self):
        if text is None:
            raise FileNotFoundError(self)
        return text

    monkeypatch.setattr(Path, "read_text", read)
    assert precision.cpu_has_bf16() is expected
