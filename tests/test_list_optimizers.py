"""SGD and Muon as torch.optim.Optimizers: steps against torch.optim and airbench in float64, and what they refuse."""

import warnings
from functools import partial

import pytest
import torch
from torch import nn

from blink.kernels import SGD, Muon, split_parameters
from tests.oracle import DEVICE
from tests.stepping import (
    EVERY,
    MATRICES,
    SHAPES,
    assert_close,
    clones,
    every_optimizer,
    iteration_in_float64,
    parameters,
    set_grads,
)


def both(ours, theirs, make, other, tolerance, steps=4, before=lambda step, ours, theirs: None):
    """Two optimizers over the same parameters and gradients, compared after every step."""
    ours_by, theirs_by = make(ours), other(theirs)
    for step in range(steps):
        set_grads(ours, theirs, missing=[step % 3] if step else ())
        before(step, ours_by, theirs_by)
        ours_by.step()
        theirs_by.step()
        assert_close(ours, theirs, tolerance)
    return ours_by, theirs_by


PRECISIONS = pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=["float64", "float32"]
)


@PRECISIONS
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_sgd_is_torchs(nesterov, weight_decay, dtype, tolerance):
    """Of a rate that float32 holds: with missing gradients, and another rate and momentum on the way."""
    options = dict(lr=0.125, momentum=0.9, nesterov=nesterov, weight_decay=weight_decay)
    ours = parameters([*SHAPES, (7,), ()], dtype)

    def change(step, *optimizers):
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = 0.125 / (step + 1)
            optimizer.param_groups[0]["momentum"] = 0.9 - 0.1 * step

    both(ours, clones(ours, torch.float64), partial(SGD, **options), partial(torch.optim.SGD, **options), tolerance,
         before=change)  # fmt: skip


def test_sgd_without_momentum_is_torchs():
    ours = parameters()
    both(ours, clones(ours, torch.float64), partial(SGD, lr=0.125), partial(torch.optim.SGD, lr=0.125), 1e-6)


@PRECISIONS
@pytest.mark.parametrize("factor", [None, "original", "match_rms_adamw", "spectral_unclamped"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_is_torchs_on_matrices(factor, nesterov, dtype, tolerance, monkeypatch):
    """torch.optim.Muon itself in float64, but for the iteration, which it would do in bfloat16."""
    monkeypatch.setattr("torch.optim._muon._zeropower_via_newtonschulz", iteration_in_float64)
    if factor == "spectral_unclamped" and "spectral" not in (torch.optim.Muon.__doc__ or ""):
        pytest.skip("this torch has no such factor")
    options = dict(lr=0.125, momentum=0.9, nesterov=nesterov, weight_decay=0.25, ns_steps=4)
    ours = parameters(MATRICES, dtype)

    def change(step, *optimizers):
        for optimizer in optimizers:
            optimizer.param_groups[0].update(momentum=0.9 - 0.1 * step, lr=0.125 / (step + 1))

    # theirs takes None for "original"
    make = partial(Muon, shape_factor=factor or "original", **options)
    other = partial(torch.optim.Muon, adjust_lr_fn=factor, **options)
    # the norm is clamped at eps there, and has it added here
    both(ours, clones(ours, torch.float64), make, other, max(tolerance, 2e-7), before=change)


def test_muon_is_torchs_as_it_comes():
    """By the defaults of both, within bfloat16's rounding of a rate of 0.1."""
    ours = parameters(MATRICES)
    both(ours, clones(ours), partial(Muon, lr=0.1), partial(torch.optim.Muon, lr=0.1), 0.1 * 0.05)


class Airbench(torch.optim.Optimizer):
    """The step of airbench94_muon's Muon, in the parameters' dtype."""

    def __init__(self, params, lr, momentum):
        super().__init__(params, dict(lr=lr, momentum=momentum))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                buffer = state.setdefault("momentum_buffer", torch.zeros_like(p.grad))
                buffer.mul_(group["momentum"]).add_(p.grad)
                g = p.grad.add(buffer, alpha=group["momentum"])
                p.mul_(len(p) ** 0.5 / p.norm())
                x = g.reshape(len(g), -1)
                x = x.T if len(x) > x.shape[1] else x
                x = x / (x.norm() + 1e-7)
                for _ in range(3):
                    a = x @ x.T
                    x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
                x = x.T if len(g) > g[0].numel() else x
                p.add_(x.view(g.shape), alpha=-group["lr"])


@PRECISIONS
def test_muon_is_airbenchs_on_filters(dtype, tolerance):
    options = dict(weight_decay=0.0, ns_steps=3, shape_factor=None, renormalize=True, averaged=False)
    ours = parameters([(8, 3, 3, 3), (5, 2, 3, 3), (40, 3, 2, 2)], dtype)
    ours[1].data = ours[1].data.contiguous(memory_format=torch.channels_last)
    theirs = [nn.Parameter(p.detach().double().contiguous()) for p in ours]
    both(ours, theirs, partial(Muon, lr=0.25, momentum=0.6, **options),
         partial(Airbench, lr=0.25, momentum=0.6), tolerance)  # fmt: skip


def test_the_iterations_knobs_arrive():
    ours = parameters([(6, 4)])
    results = []
    for options in (
        {},
        {"ns_steps": 2},
        {"ns_coefficients": (2.0, -1.5, 0.5)},
        {"eps": 0.5},
        {"ns_dtype": torch.float16},
    ):
        own = clones(ours)
        own[0].grad = torch.ones_like(own[0]) + torch.eye(6, 4, device=DEVICE)
        Muon(own, lr=0.5, **options).step()
        assert all(not torch.equal(own[0], other) for other in results), options
        results.append(own[0].detach())


@every_optimizer
def test_a_number_as_rate_becomes_a_tensor_that_stays(make):
    """In one place for good, for a captured graph's sake, whoever sets the rate and how."""
    params = parameters()
    optimizer = make(params)
    rate = optimizer.param_groups[0]["lr"]
    assert rate.device == params[0].device and rate.dtype == torch.float32 and rate == pytest.approx(0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))
    for step in range(3):
        set_grads(params)
        optimizer.step()
        schedule.step()
        assert optimizer.param_groups[0]["lr"] is rate and rate == pytest.approx(0.1 / (step + 2))
    optimizer.param_groups[0]["lr"] = 0.5
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.param_groups[0]["lr"] is rate and rate == 0.5


@pytest.mark.parametrize(
    "schedule",
    [
        partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=0.2, total_steps=6),
        partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=6),
        partial(torch.optim.lr_scheduler.StepLR, step_size=2),
        lambda o: torch.optim.lr_scheduler.SequentialLR(
            o, [torch.optim.lr_scheduler.LinearLR(o), torch.optim.lr_scheduler.ExponentialLR(o, 0.5)], [2]
        ),
    ],
    ids=["OneCycleLR", "CosineAnnealingLR", "StepLR", "SequentialLR"],
)
def test_schedulers_do_what_they_do_to_torchs(schedule):
    """Rates, and momenta where they are scheduled too, of two groups."""
    ours, options = parameters(), dict(lr=0.1, momentum=0.9, nesterov=True)
    theirs = clones(ours)
    pair = []
    for kind, params in ((SGD, ours), (torch.optim.SGD, theirs)):
        optimizer = kind([{"params": params[:1]}, {"params": params[1:], "lr": 0.05}], **options)
        pair.append((optimizer, schedule(optimizer)))
    for _ in range(5):
        set_grads(ours, theirs)
        with warnings.catch_warnings():
            # SequentialLR's own use of a deprecated argument
            warnings.simplefilter("ignore", UserWarning)
            for optimizer, scheduler in pair:
                optimizer.step()
                scheduler.step()
        assert_close(ours, theirs, 1e-5)
        for group, other in zip(*(optimizer.param_groups for optimizer, _ in pair)):
            assert float(group["lr"]) == pytest.approx(other["lr"], rel=1e-5)


@every_optimizer
def test_a_given_rate_tensor_is_read_at_every_step(make):
    ours = parameters()
    theirs = clones(ours)
    rate = torch.tensor(0.1, device=DEVICE)
    pair = make(ours, lr=rate), make(theirs)
    assert pair[0].param_groups[0]["lr"] is rate
    for value in (0.1, 0.3):
        set_grads(ours, theirs)
        rate.fill_(value)
        pair[1].param_groups[0]["lr"] = value
        for optimizer in pair:
            optimizer.step()
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs))


def test_a_rate_tensor_of_two_groups_is_not_filled_by_a_number_for_one():
    params, rate = parameters(), torch.tensor(0.1, device=DEVICE)
    optimizer = SGD([{"params": params[:1]}, {"params": params[1:]}], lr=rate)
    optimizer.param_groups[0]["lr"] = 0.5
    set_grads(params)
    optimizer.step()
    assert rate == pytest.approx(0.1) and optimizer.param_groups[0]["lr"] == 0.5


@every_optimizer
def test_closures_run_with_gradients_and_their_loss_is_returned(make):
    (p,) = parameters([(4, 3)])
    optimizer = make([p])

    def closure():
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    before = p.detach().clone()
    assert optimizer.step(closure) == before.square().sum() and not torch.equal(p, before)


@every_optimizer
def test_parameters_without_gradients_have_no_state(make):
    params = parameters()
    optimizer = make(params)
    optimizer.step()
    assert not optimizer.state
    set_grads(params, missing=[1])
    before = params[1].detach().clone()
    optimizer.step()
    assert set(optimizer.state) == {params[0], params[2]} and torch.equal(params[1], before)


@every_optimizer
def test_a_group_added_later_is_trained_by_its_own_options(make):
    params = parameters()
    optimizer = make(params[:2])
    set_grads(params)
    optimizer.step()
    optimizer.add_param_group({"params": params[2], "lr": 0.0, "weight_decay": 0.0})
    before = [p.detach().clone() for p in params]
    optimizer.step()
    assert [torch.equal(p, old) for p, old in zip(params, before)] == [False, False, True]
    assert "momentum_buffer" in optimizer.state[params[2]]


@every_optimizer
def test_the_same_parameter_twice_is_refused(make):
    params = parameters()
    twice = r"params\[0\] and params\[2\] are the same parameter"
    with pytest.raises(ValueError, match=twice):
        make([params[0], params[1], params[0]])
    with pytest.raises(ValueError, match=twice):
        make([("a.weight", params[0]), ("b.weight", params[1]), ("tied.weight", params[0])])
    optimizer = make(params)
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": [params[1]]})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (SGD, {"lr": -1.0}, "SGD: lr must be 0 or more and finite in float32, found -1.0"),
        (SGD, {"lr": torch.ones(2, device=DEVICE)}, r"SGD: lr must be a number or .* one element .*, found .*\[2\]"),
        (SGD, {"lr": torch.ones((), dtype=torch.float16, device=DEVICE)}, "found torch.float16"),
        (SGD, {"lr": torch.ones((), device="meta")}, "on meta"),
        (SGD, {"momentum": -0.1}, "SGD: momentum must be 0 or more"),
        (Muon, {"weight_decay": float("nan")}, "Muon: weight_decay must be 0 or more"),
        (Muon, {"ns_steps": 0}, "Muon: steps must be an integer of at least 1, found 0"),
        (Muon, {"ns_coefficients": (1.0, 2.0)}, "Muon: coefficients must be three finite numbers"),
        (Muon, {"eps": 0.0}, "Muon: eps must be positive"),
        (Muon, {"shape_factor": "wide"}, "Muon: shape_factor must be one of original, .*, None, found 'wide'"),
    ],
)
def test_impossible_options_are_refused(kind, options, message):
    with pytest.raises(ValueError, match=message):
        kind(parameters(), **options)


def test_parameters_of_no_use_are_refused():
    whole = nn.Parameter(torch.zeros(2, 2, dtype=torch.int64, device=DEVICE), requires_grad=False)
    for make in EVERY:
        with pytest.raises(TypeError, match=r"params\[0\] must be floating, found int64"):
            make([whole])
        (p,) = parameters([(4, 3)])
        p.grad = torch.ones(4, 3, device=DEVICE).to_sparse()
        with pytest.raises(RuntimeError, match="a gradient is sparse"):
            make([p]).step()


def test_vectors_and_embeddings_are_refused_by_muon_with_advice():
    advice = r"give it to another optimizer, such as AdamW: split_parameters\(model\)"
    with pytest.raises(ValueError, match=rf"params\[1\] \[4\] is a vector.*{advice}"):
        Muon(parameters([(4, 3), (4,)]))
    model = nn.ModuleDict(
        {"tok_embeddings": nn.Embedding(5, 4), "patch_embed": nn.ModuleDict({"proj": nn.Conv2d(3, 4, 2)})}
    )
    with pytest.raises(ValueError, match=rf"tok_embeddings.weight \[5, 4\] is an embedding by its name.*{advice}"):
        Muon([("tok_embeddings.weight", model["tok_embeddings"].weight)])
    optimizer = Muon([("patch_embed.proj.weight", model["patch_embed"]["proj"].weight)])
    with pytest.raises(ValueError, match="is a vector"):
        optimizer.add_param_group({"params": [("patch_embed.proj.bias", model["patch_embed"]["proj"].bias)]})
    assert len(optimizer.param_groups) == 1


def test_parameters_are_split_into_matrices_and_all_else():
    model = nn.ModuleDict(
        {
            "embed": nn.Embedding(7, 6),
            "conv": nn.Conv2d(3, 6, 3),
            "norm": nn.LayerNorm((6, 4)),
            "batch": nn.BatchNorm2d(6),
            "attention": nn.MultiheadAttention(6, 2),
            "one": nn.Linear(6, 1),
            "frozen": nn.Linear(6, 6),
            "head": nn.Linear(6, 7, bias=False),
        }
    )
    model.frozen.requires_grad_(False)
    names = {id(p): name for name, p in model.named_parameters()}
    matrices, rest = split_parameters(model)
    named = [names[id(p)] for p in matrices]
    assert named == ["conv.weight", "attention.in_proj_weight", "attention.out_proj.weight", "head.weight"]
    assert {names[id(p)] for p in rest} == set(names.values()) - set(named) - {"frozen.weight", "frozen.bias"}
    without, _ = split_parameters(model, exclude=["head", "attention.in_proj_weight"])
    assert [names[id(p)] for p in without] == ["conv.weight", "attention.out_proj.weight"]
    with pytest.raises(ValueError, match="no module or parameter 'fc'"):
        split_parameters(model, exclude=["fc"])
    # tied to the embedding, it is one
    model.head.weight = model.embed.weight
    matrices, rest = split_parameters(model)
    assert all(p is not model.head.weight for p in matrices) and sum(p is model.head.weight for p in rest) == 1
    Muon(matrices), SGD(rest)
