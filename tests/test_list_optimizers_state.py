"""What SGD and Muon keep: state_dicts, copies, devices, captured graphs."""

import copy
import io
import pickle
from functools import partial
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from blink import kernels
from blink.kernels import SGD, Muon, launching, optimizers, reference
from tests.oracle import captured
from tests.stepping import (
    EVERY,
    MATRICES,
    assert_close,
    clones,
    every_optimizer,
    iteration_in_float64,
    parameters,
    set_grads,
)


def saved(optimizer) -> dict:
    """state_dict as it comes from a file, safely loaded."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


GROUPS = st.lists(
    st.fixed_dictionaries(
        {
            "shapes": st.lists(st.lists(st.integers(1, 5), min_size=2, max_size=4).map(tuple), min_size=1, max_size=2),
            "lr": st.floats(0, 0.5),
            "momentum": st.floats(0, 0.99),
            "weight_decay": st.sampled_from([0.0, 0.1]),
            "nesterov": st.booleans(),
        }
    ),
    min_size=1,
    max_size=2,
)


# by the reference, which is faster than interpreted kernels: what is kept is the same
@patch.object(optimizers, "dispatch", reference)
@settings(max_examples=30, deadline=None)
@given(
    groups=GROUPS,
    kind=st.sampled_from([SGD, Muon]),
    at=st.integers(0, 2),
    dtype=st.sampled_from([torch.float32, torch.float16]),
    gaps=st.lists(st.sets(st.integers(0, 3)), min_size=4, max_size=4),
    scheduled=st.booleans(),
    data=st.data(),
)
def test_a_loaded_state_goes_on_bitwise(groups, kind, at, dtype, gaps, scheduled, data):
    """Any groups, gradients missing anywhere, saved after any step, into an optimizer that has stepped or has not."""
    torch.manual_seed(data.draw(st.integers(0, 99)))
    lists = [parameters(group["shapes"], dtype) for group in groups]
    options = [{k: v for k, v in group.items() if k != "shapes"} for group in groups]

    def made(lists):
        optimizer = kind([{"params": ps, **own} for ps, own in zip(lists, options)])
        return optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7)

    params = [p for ps in lists for p in ps]
    optimizer, schedule = made(lists)
    for step in range(4):
        if step == at:
            copies = [clones(ps) for ps in lists]
            others = [p for ps in copies for p in ps]
            loaded, resumed = made(copies)
            if data.draw(st.booleans()):
                kept = [p.detach().clone() for p in others]
                set_grads(others)
                loaded.step()
                for p, value in zip(others, kept):
                    p.data.copy_(value)
            loaded.load_state_dict(saved(optimizer))
            resumed.load_state_dict(copy.deepcopy(schedule.state_dict()))
        set_grads(params, *([others] if step >= at else []), missing=gaps[step])
        pairs = ((optimizer, schedule), (loaded, resumed)) if step >= at else ((optimizer, schedule),)
        for own, own_schedule in pairs:
            own.step()
            if scheduled:
                own_schedule.step()
    assert all(torch.equal(a, b) for a, b in zip(params, others))
    for p, other in zip(params, others):
        mine = loaded.state.get(other)
        # one that had stepped before keeps its memory, zeroed
        want = optimizer.state[p]["momentum_buffer"] if p in optimizer.state else torch.zeros_like(p)
        assert mine is None or torch.equal(mine["momentum_buffer"], want)


@every_optimizer
def test_a_state_loads_across_devices_and_layouts(make):
    """Rates are numbers in it; momenta come to their parameters' devices, dtypes and memory."""
    params = parameters()
    optimizer = make(params)
    set_grads(params)
    optimizer.step()
    state = optimizer.state_dict()
    assert all(isinstance(group["lr"], float) for group in state["param_groups"])
    elsewhere = [nn.Parameter(torch.empty_like(p, device="meta", dtype=torch.float16)) for p in params]
    moved = make(elsewhere)
    moved.load_state_dict(state)
    for p in elsewhere:
        buffer = moved.state[p]["momentum_buffer"]
        assert (buffer.device.type, buffer.dtype) == ("meta", torch.float16)
    assert moved.param_groups[0]["lr"].device.type == "meta"
    other = clones(params)
    other[1].data = other[1].data.contiguous(memory_format=torch.channels_last)
    laid_out = make(other)
    laid_out.load_state_dict(state)
    set_grads(params, other)
    for one in (optimizer, laid_out):
        one.step()
    assert_close(other, params, 1e-5)
    # nothing is shared with what was loaded
    assert not torch.equal(laid_out.state[other[0]]["momentum_buffer"], torch.zeros_like(other[0]))
    assert torch.equal(laid_out.state[other[0]]["momentum_buffer"], optimizer.state[params[0]]["momentum_buffer"])


def test_parameters_of_several_devices_are_one_group():
    """Each device's in one call, with the rate there."""
    seen = []

    class Recording(SGD):
        def _update(self, params, grads, buffers, lr, group):
            seen.append(([p.device.type for p in params], {b.device.type for b in buffers}, lr.device.type))

    params = parameters([(2, 2)], device="cpu") + parameters([(3, 2)], device="meta") + parameters([(4,)], device="cpu")
    for p in params:
        p.grad = torch.ones_like(p)
    Recording(params).step()
    assert seen == [(["cpu", "cpu"], {"cpu"}, "cpu"), (["meta"], {"meta"}, "meta")]


def test_where_the_kernels_do_not_run_the_reference_does(monkeypatch):
    monkeypatch.setattr(kernels.dispatch, "interpreting", lambda: False)
    # not that nothing runs: a kernel off a GPU would fail
    monkeypatch.setattr(launching, "_INTERPRETED", False)
    assert kernels.backend("cpu") == "reference"
    for make in EVERY:
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            params = parameters(dtype=dtype, device="cpu")
            before = [p.detach().clone() for p in params]
            set_grads(params)
            make(params).step()
            assert not any(torch.equal(p, old) for p, old in zip(params, before))


@every_optimizer
def test_a_state_of_other_shapes_is_refused_and_changes_nothing(make):
    params, other = parameters([(4, 3)]), parameters([(3, 3)])
    ours, theirs = make(params), make(other)
    set_grads(params), set_grads(other)
    ours.step(), theirs.step()
    before = ours.state[params[0]]["momentum_buffer"].clone()
    with pytest.raises(ValueError, match=r"the loaded momentum of parameter 0 is \[3, 3\], expected \[4, 3\]"):
        ours.load_state_dict(theirs.state_dict())
    assert torch.equal(ours.state[params[0]]["momentum_buffer"], before)
    with pytest.raises(ValueError, match="different number of parameter groups"):
        ours.load_state_dict(make([{"params": p} for p in parameters()]).state_dict())


def test_torchs_state_dicts_load(monkeypatch):
    """The same continuation as theirs."""
    monkeypatch.setattr("torch.optim._muon._zeropower_via_newtonschulz", iteration_in_float64)
    sgd = dict(lr=0.125, momentum=0.9, nesterov=True)
    muon = dict(lr=0.125, adjust_lr_fn="match_rms_adamw")
    for theirs_kind, options, make in (
        (torch.optim.SGD, sgd, partial(SGD, lr=9.0)),
        (torch.optim.Muon, muon, partial(Muon, lr=9.0, averaged=False, renormalize=True, shape_factor=None)),
    ):
        theirs = parameters(MATRICES, torch.float64)
        other = theirs_kind(theirs, **options)
        set_grads(theirs, missing=[1])
        other.step()
        ours = clones(theirs)
        optimizer = make(ours)
        optimizer.load_state_dict(other.state_dict())
        set_grads(ours, theirs)
        optimizer.step(), other.step()
        assert_close(ours, theirs, 2e-7)
    plain = torch.optim.SGD(theirs, lr=0.1, momentum=0.9, dampening=0.5)
    with pytest.raises(ValueError, match=r"has dampening=0\.5, which this optimizer does not have"):
        SGD(ours).load_state_dict(plain.state_dict())


@every_optimizer
@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"]
)
def test_copies_go_on_by_themselves(make, duplicate):
    params = parameters()
    optimizer = make(params)
    set_grads(params)
    optimizer.step()
    # its parameters are copies too
    other = duplicate(optimizer)
    copied = other.param_groups[0]["params"]
    assert other.param_groups[0]["lr"] is not optimizer.param_groups[0]["lr"]
    set_grads(params, copied)
    optimizer.step(), other.step()
    assert all(torch.equal(a, b) for a, b in zip(params, copied))
    other.param_groups[0]["lr"] = 0.0
    other.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1)


def test_momenta_and_rates_are_refused_without_memory_while_a_graph_is_captured(monkeypatch):
    """They would be set again at every replay."""
    params = parameters()
    optimizer = SGD(params, momentum=0.9)
    set_grads(params)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="SGD: while a CUDA graph is captured a parameter has no momentum yet"):
        optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.5
    with pytest.raises(RuntimeError, match="a learning rate was set to a number; fill the group's lr tensor"):
        optimizer.step()


@pytest.mark.gpu
@every_optimizer
def test_a_captured_step_follows_rate_and_loaded_state(make):
    ours = parameters()
    theirs = clones(ours)
    set_grads(ours, theirs)
    optimizer, eager = make(ours), make(theirs)
    fresh, start = saved(eager), clones(ours)
    graph, _ = captured(lambda: {"none": optimizer.step() or ours[0]})
    optimizer.load_state_dict(fresh)
    for p, value in zip(ours, start):
        p.data.copy_(value)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    for step in range(3):
        graph.replay()
        schedule.step()
        eager.param_groups[0]["lr"] = 0.1 * 0.5**step
        eager.step()
        assert_close(ours, theirs, 1e-6)
