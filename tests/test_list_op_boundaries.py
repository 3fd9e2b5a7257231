"""What every op on lists of tensors takes and refuses at its boundary: shared memory, missing gradients, options."""

import inspect
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from blink import kernels
from blink.kernels import fused
from blink.kernels.examine import cases
from blink.kernels.examine.cases import mapped, named
from tests.oracle import DEVICE, copies, updated

CASES = [case for case in cases.small_cases() if not case.differentiable]
OPTIMIZERS = [case for case in CASES if case.buffers]
every_op = pytest.mark.parametrize("case", CASES, ids=lambda case: case.op)
every_update = pytest.mark.parametrize("case", OPTIMIZERS, ids=lambda case: case.op)


def compiled(op: str):
    """Something with the op as an attribute that torch.compile traces whole."""
    torch._dynamo.reset()
    function = getattr(fused, op)
    return SimpleNamespace(
        **{op: torch.compile(lambda **arguments: function(**arguments), backend="aot_eager", fullgraph=True)}
    )


def small_lists(count: int = 3) -> dict:
    """Arguments of an optimizer op: `count` matrices [4, 6] in contiguous memory."""
    lists = {
        name: [torch.randn(4, 6, device=DEVICE) for _ in range(count)]
        for name in ("params", "grads", "momentum_buffers")
    }
    return {**lists, "lr": torch.linspace(0.1, 0.3, count, device=DEVICE)}


@every_update
@pytest.mark.parametrize("mode", ["eager", "compiled"])
def test_tensors_that_share_memory_with_an_updated_one_are_refused(case, mode):
    """Programs run at once: which of two updates of one element would stay is chance.

    Compiled, what is updated is a copy where something else reads it.
    """
    ops = fused if mode == "eager" else compiled(case.op)
    pairs = (
        (("params", 0), ("params", 2), r"params\[0\] and params\[2\]"),
        (("params", 1), ("momentum_buffers", 2), r"momentum_buffers\[2\] and params\[1\]"),
        (("momentum_buffers", 0), ("momentum_buffers", 1), r"momentum_buffers\[0\] and momentum_buffers\[1\]"),
        (("params", 1), ("grads", 0), r"grads\[0\] and params\[1\]"),
        (("momentum_buffers", 1), ("grads", 1), r"grads\[1\] and momentum_buffers\[1\]"),
    )
    for first, second, message in pairs if mode == "eager" else pairs[:3]:
        tensors = small_lists()
        tensors[second[0]][second[1]] = tensors[first[0]][first[1]]
        with pytest.raises(ValueError, match=f"^{case.op}: {message} share memory"):
            case.call(ops, tensors, torch.float32)


@every_update
def test_memory_that_overlaps_in_part_is_refused_and_neighbours_are_not(case):
    memory = torch.randn(24 * 3 + 1, device=DEVICE)
    tensors = small_lists(2)
    tensors["params"] = [memory[:24].view(4, 6), memory[24:48].view(4, 6)]
    tensors["momentum_buffers"][0] = memory[48:72].view(4, 6)
    apart = {k: mapped(lambda t: t.clone(), v) for k, v in tensors.items()}
    for name, value in updated(case, fused, apart, torch.float32).items():
        key, index = name[:-1].split("[")
        case.call(fused, tensors, torch.float32) if name == "params[0]" else None
        assert torch.equal(tensors[key][int(index)], value), name
    tensors["params"][1] = memory[23:47].view(4, 6)
    with pytest.raises(ValueError, match=r"params\[0\] and params\[1\] share memory"):
        case.call(fused, tensors, torch.float32)
    tensors["params"][1] = torch.randn(4, 6, device=DEVICE)
    tensors["lr"] = memory[71:73]
    with pytest.raises(ValueError, match=r"momentum_buffers\[0\] and lr share memory"):
        case.call(fused, tensors, torch.float32)


def test_what_is_only_read_may_be_listed_twice():
    tensors = small_lists(2)
    gradient = tensors["grads"][0]
    apart = {**tensors, "grads": [gradient, gradient.clone()]}
    for case in OPTIMIZERS:
        want = updated(case, fused, apart, torch.float32)
        own = {k: mapped(lambda t: t.clone(), v) for k, v in tensors.items()} | {"grads": [gradient, gradient]}
        case.call(fused, own, torch.float32)
        assert torch.equal(own["params"][1], want["params[1]"]), case.op
    once, again = fused.newton_schulz([gradient, gradient])
    assert torch.equal(once, again)


@every_update
@pytest.mark.parametrize("mode", ["eager", "compiled", "reference"])
@pytest.mark.parametrize("rates", ["one rate", "a rate for each"])
def test_parameters_without_a_gradient_are_left_alone(case, mode, rates):
    """As torch.optim does; the others keep their own learning rates."""
    ops = {"eager": fused, "reference": kernels.reference}.get(mode) or compiled(case.op)
    tensors = small_lists(4)
    if rates == "one rate":
        tensors["lr"] = tensors["lr"][:1]
    with_all = updated(case, ops, tensors, torch.float32)
    before = copies(tensors)
    tensors["grads"] = [None if i in (0, 2) else grad for i, grad in enumerate(tensors["grads"])]
    assert case.call(ops, tensors, torch.float32) is None
    for i in range(4):
        for name in case.buffers:
            want = before[name][i] if i in (0, 2) else with_all[f"{name}[{i}]"]
            assert torch.equal(tensors[name][i], want), (name, i)
            assert mode == "compiled" or (tensors[name][i]._version == 0) == (i in (0, 2)), (name, i)
    # and nothing at all to do
    after = copies({name: tensors[name] for name in case.buffers})
    case.call(ops, {**tensors, "grads": [None] * 4}, torch.float32)
    for name in case.buffers:
        assert all(torch.equal(t, kept) for t, kept in zip(tensors[name], after[name])), name


def test_a_parameter_without_a_gradient_is_what_torch_optim_skips():
    tensors = small_lists(3)
    ours = copies(tensors)
    theirs = [torch.nn.Parameter(p.clone()) for p in tensors["params"]]
    groups = [{"params": [p], "lr": lr} for p, lr in zip(theirs, tensors["lr"].tolist())]
    sgd = torch.optim.SGD(groups, lr=1.0, momentum=0.9, nesterov=True, weight_decay=0.1)
    for p, grad, buffer in zip(theirs, tensors["grads"], tensors["momentum_buffers"]):
        p.grad, sgd.state[p]["momentum_buffer"] = grad.clone(), buffer.clone()
    theirs[1].grad, ours["grads"][1] = None, None
    sgd.step()
    fused.sgd_nesterov(**ours, momentum=0.9, weight_decay=0.1)
    for got, want in zip(ours["params"], theirs):
        torch.testing.assert_close(got, want.detach())


@every_op
def test_what_is_no_tensor_is_refused(case):
    tensors = case.make(DEVICE, torch.float32)
    for name, value in tensors.items():
        if isinstance(value, list) and name != "grads":
            with pytest.raises(TypeError, match=rf"^{case.op}: {name}\[0\] must be a tensor, found NoneType$"):
                case.call(fused, {**tensors, name: [None, *value[1:]]}, torch.float32)
        if isinstance(value, list):
            with pytest.raises(TypeError, match=rf"^{case.op}: {name}\[0\] must be a tensor, found float$"):
                case.call(fused, {**tensors, name: [1.0, *value[1:]]}, torch.float32)


NUMBERS = {
    "momentum": (None, "0.9", -0.1, float("nan"), float("inf")),
    "weight_decay": (None, "0", -0.1, float("nan"), float("inf")),
    "eps": (None, "0", 0.0, -1e-7, 1e-46, float("nan"), float("inf")),
    "steps": (None, 0, -1, 1.5, True),
    "coefficients": (None, 3.0, (1.0, 2.0), (1.0, 2.0, float("nan")), (1.0, 2.0, None)),
}


@every_op
@pytest.mark.parametrize("ops", [fused, kernels.reference], ids=["fused", "reference"])
def test_impossible_options_are_refused(case, ops):
    tensors = case.make(DEVICE, torch.float32)
    allowed = inspect.signature(getattr(fused, case.op)).parameters
    for name, values in NUMBERS.items():
        for value in values if name in allowed else ():
            wrong = replace(case, options={**case.options, name: value})
            with pytest.raises((TypeError, ValueError), match=f"^{case.op}: {name} must be .*, found "):
                wrong.call(ops, copies(tensors), torch.float32)


@every_op
def test_gradients_and_tensors_of_any_memory(case):
    """Unaligned ones everywhere; a gradient also strided, expanded or negated; what is updated is never negated."""
    tensors = case.make(DEVICE, torch.float32)

    def unaligned(value):
        memory = torch.zeros(value.numel() + 1, dtype=value.dtype, device=DEVICE)
        return memory.as_strided(value.shape, value.stride(), 1).copy_(value)

    def results(arguments) -> dict:
        y = case.call(fused, arguments, torch.float32)
        return named("y", y) | {k: v for name in case.buffers for k, v in named(name, arguments[name]).items()}

    want = updated(case, fused, tensors, torch.float32)
    for name, value in results({k: mapped(unaligned, v) for k, v in tensors.items()}).items():
        # compiled for odd addresses, a kernel may sum in another order
        torch.testing.assert_close(value, want[name], rtol=1e-5, atol=1e-5)
    read = "grads" if case.buffers else "matrices"
    changes = {"negated": lambda t: torch._neg_view(-t)}
    if case.buffers:
        changes["strided"] = lambda t: t.repeat_interleave(2, 0)[::2]
        changes["expanded"] = lambda t: t[:1].expand(t.shape)
    for change, function in changes.items():
        changed = mapped(function, tensors[read])
        dense = {**tensors, read: [value.contiguous().clone() for value in changed]}
        want = updated(case, fused, dense, torch.float32)
        for name, value in results({**copies(tensors), read: changed}).items():
            assert torch.equal(value, want[name]), (change, name)
    for name in case.buffers:
        with pytest.raises(ValueError, match=rf"^{case.op}: {name}\[0\] is negated lazily"):
            case.call(fused, {**tensors, name: [torch._neg_view(tensors[name][0]), *tensors[name][1:]]}, torch.float32)
