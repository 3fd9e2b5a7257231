"""Optimizer: which group trains a parameter and at which rate, SGD against PyTorch's, and the weight average."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from blink.model.backend import reference
from blink.model.network import Group, Network, NetworkConfig
from blink.training.budget import Budget
from blink.training.optimizer import Optimizer, WeightAverage, group_parameters
from blink.training.recipes import AIR, HLB, ParamGroup, Resolution, Schedule, freezing, gated

TINY = NetworkConfig(stem_channels=4, conv_groups=(Group(8), Group(8, depth=0), Group(8)), se_reduction=4)


def tiny_network(classes=10, size=12, config=TINY):
    return Network(config, classes, (3, size, size), reference())


@pytest.mark.parametrize("batch_size", [512, 128])
def test_hlb_optimizer_has_the_published_rates(batch_size):
    biases, weights = (g for g in HLB.param_groups)
    lr, decay = 1.5525 / batch_size, 0.85 * 4.8e-4 * batch_size
    assert weights.lr / batch_size == pytest.approx(lr) and weights.decay * batch_size == pytest.approx(decay)
    assert biases.lr / batch_size == pytest.approx(lr * 32) and biases.decay * batch_size == pytest.approx(decay / 32)
    assert {(g.rule, g.momentum, g.mean_lr) for g in HLB.param_groups} == {("sgd", 0.85, True)}
    optimizer = Optimizer(tiny_network(), HLB, Budget(batch_size, 10, 100), reference())
    factors = [HLB.schedule.factor(step, 100) for step in range(100)]
    expected = [[lr * 32 * f for f in factors], [lr * f for f in factors]]
    torch.testing.assert_close(optimizer.rates(range(100)), torch.tensor(expected).t())


def names_of(network, recipe):
    names = {id(p): name for name, p in network.named_parameters()}
    return [{names[id(p)] for p in members} for members in group_parameters(network, recipe.param_groups)]


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
    config = replace(
        AIR.network, conv_groups=tuple(Group(8, depth=1, residual=False) for _ in range(3)), se_reduction=4
    )
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
        group_parameters(network, tuple(g for g in AIR.param_groups if g.params != "head"))


def test_a_group_stops_after_its_epochs_and_its_rate_reaches_0_there():
    network = tiny_network(config=AIR.network)
    optimizer = Optimizer(network, AIR, Budget(10, 20, 160), reference())
    assert optimizer.steps == [60, 160, 160, 160]
    assert optimizer.active(59) == (0, 1, 2, 3) and optimizer.active(60) == (1, 2, 3)
    bias = optimizer.rates(range(160))[:, 0].tolist()
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
        network, recipe, Budget(10, 20, 160), replace(reference(), sgd_nesterov=rule("sgd"), muon=rule("muon"))
    )
    for step, calls, still in ((0, 3, 14), (70, 3, 13), (100, 3, 9)):
        active = optimizer.active(step)
        params = optimizer.parameters(active)
        grads = [torch.full_like(p, float(i)) for i, p in enumerate(params)]
        seen.clear()
        optimizer.start_epoch(range(step - step % 20, step - step % 20 + 20))
        optimizer.update(grads, active, torch.tensor([step % 20]))
        assert len(seen) == calls and sum(len(ps) for _, ps, *_ in seen) == len(params) == still
        own = {id(p): (i, g) for i in active for p, g in zip(optimizer.params[i], optimizer.buffers[i])}
        for name, ps, gs, bs, lr, options in seen:
            assert len(ps) == len(gs) == len(bs) == len(lr) and lr.is_contiguous()
            for p, g, b, rate in zip(ps, gs, bs, lr):
                index = next(i for i, other in enumerate(params) if other is p)
                group = optimizer.param_groups[own[id(p)][0]]
                assert g.flatten()[0] == index and b is own[id(p)][1]
                assert rate == optimizer.rates(range(step, step + 1))[0, own[id(p)][0]] > 0
                assert (group.rule, group.momentum) == (name, options["momentum"])
                assert options["weight_decay"] == pytest.approx(group.decay * 10)


def test_updates_are_those_of_torch_sgd():
    """Five steps with a schedule, decay and Nesterov momentum, two groups; then again after a reset."""
    recipe = replace(
        HLB,
        schedule=Schedule(peak=0.5, final=0.1, hold=0.2),
        param_groups=(
            ParamGroup("biases", "sgd", 0.3, 0.7, 0.01),
            ParamGroup("weights", "sgd", 0.8, 0.9, 0.02, mean_lr=True),
        ),
    )
    ours, theirs = tiny_network(), tiny_network()
    theirs.load_state_dict(ours.state_dict())
    start = {name: value.clone() for name, value in ours.state_dict().items()}
    optimizer = Optimizer(ours, recipe, Budget(4, 5, 5), reference())
    biases, weights = group_parameters(theirs, recipe.param_groups)
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


def test_weight_average_starts_anew_after_a_reset_in_the_memory_it_had():
    """Taken in the middle of a run, it would split blocks that the run's evaluation needs whole."""
    network = averaged_network()
    average = WeightAverage(network, 0.5)
    average.update()
    before = list(average._average)
    average.reset()
    with pytest.raises(RuntimeError, match="never updated"), average.applied():
        pass
    disturb(network)
    average.update()
    assert average.started and all(new is old for new, old in zip(average._average, before))
    expected = floats(network)
    with average.applied():
        assert_state(network, expected)


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
