"""What every differentiable op takes and refuses at its boundary: memory of any kind, calls in any order, options.

Kernels take no strides, so whatever memory an argument or an incoming gradient comes in, the results must be those of
a dense copy: bit for bit, but where only the address is odd, for which a kernel may be compiled to sum otherwise.
"""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from blink.kernels import fused, reference
from blink.kernels.examine import cases
from blink.kernels.examine.cases.base import GATHER
from tests.oracle import DEVICE

CASES = [case for case in cases.small_cases() if case.differentiable]
every_op = pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
NORMALIZING = [case for case in CASES if case.buffers and not any(part in case.label for part in ("gather",))]
every_normalizing_op = pytest.mark.parametrize("case", NORMALIZING, ids=lambda case: case.op)
# refused where they are not laid out as the kernels read them
LARGE = ("x", "residual", "images", "logits")


def dense(name: str, value: Tensor) -> Tensor:
    """A copy that holds the values as the kernels read them."""
    images = value.dim() == 4 and name in LARGE
    return value.clone(memory_format=torch.channels_last if images else torch.contiguous_format)


def offset(value: Tensor) -> Tensor:
    """Memory of one element more, which from its second on holds the value in the value's own layout."""
    memory = torch.zeros(value.numel() + 1, dtype=value.dtype, device=DEVICE)
    memory.as_strided(value.shape, value.stride(), 1).copy_(value)
    return memory


# how a base is made of a value, and how the argument is made of the base and the value's shape and strides
LAYOUTS: dict[str, tuple[Callable, Callable]] = {
    "strided": (lambda v: v.repeat_interleave(2, 0), lambda base, v: base[::2]),
    "expanded": (lambda v: v[:1].clone(), lambda base, v: base.expand(v.shape)),
    "transposed": (
        lambda v: v.transpose(0, 1).contiguous() if v.dim() > 1 else v.clone(),
        lambda base, v: base.transpose(0, 1) if v.dim() > 1 else base,
    ),
    "unaligned": (offset, lambda base, v: base.as_strided(v.shape, v.stride(), 1)),
    "negated": (
        lambda v: -v if v.is_floating_point() else v.clone(),
        lambda base, v: torch._neg_view(base) if v.is_floating_point() else base,
    ),
}
every_layout = pytest.mark.parametrize("layout", LAYOUTS)


def assert_same(layout: str, got: list[Tensor], want: list[Tensor]) -> None:
    for ours, theirs in zip(got, want, strict=True):
        if layout == "unaligned":
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * theirs.abs().max().item())
        else:
            assert torch.equal(ours, theirs)


def outputs_of(case, ops, arguments: dict) -> list[Tensor]:
    """Those that have a gradient."""
    outputs = case.call(ops, arguments, torch.float32)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return [y for y in outputs if y is not None and y.requires_grad]


def results(case, tensors: dict, bases: dict[str, Tensor], make: Callable[[str, Tensor], Tensor]) -> list[Tensor]:
    """Outputs, buffers and all gradients; for an argument that has a base, which make(name, base) makes it of, the
    base's."""
    given = {name: bases.get(name, value) for name, value in tensors.items() if value is not None}
    leaves = {name: value.clone().requires_grad_(name in case.differentiable) for name, value in given.items()}
    own = {**tensors, **{name: make(name, leaf) if name in bases else leaf for name, leaf in leaves.items()}}
    outputs = outputs_of(case, fused, own)
    upstream = [torch.linspace(-1, 1, y.numel(), device=DEVICE).view(y.shape) for y in outputs]
    grads = torch.autograd.grad(outputs, [leaf for leaf in leaves.values() if leaf.requires_grad], upstream)
    return [*(y.detach() for y in outputs), *(own[name] for name in case.buffers), *grads]


@every_layout
@every_op
def test_arguments_of_any_memory(case, layout):
    """All of an op's arguments at once; those that need a certain layout only where they keep it."""
    tensors = case.make(DEVICE, torch.float32)
    make, view = LAYOUTS[layout]
    kept = layout in ("unaligned", "negated")
    left_out = () if layout == "unaligned" else case.buffers if kept else (*LARGE, *case.buffers)
    values = {name: value for name, value in tensors.items() if value is not None and name not in left_out}
    if case.op == "whiten":
        values.pop("images") if layout == "negated" else None
    bases = {name: make(value) for name, value in values.items()}
    got = results(case, tensors, bases, lambda name, base: view(base, values[name]))
    want = results(case, tensors, bases, lambda name, base: dense(name, view(base, values[name])))
    assert_same(layout, got, want)


@every_layout
@every_op
def test_incoming_gradients_of_any_memory(case, layout):
    tensors = case.make(DEVICE, torch.float32)
    leaves = [tensors[name].requires_grad_() for name in case.differentiable]
    outputs = outputs_of(case, fused, tensors)
    make, view = LAYOUTS[layout]
    if outputs[0].dim() == 0:
        # a scalar has no rows to stride over
        make, view = (lambda v: v.clone(), lambda base, v: base) if layout != "negated" else (make, view)
    values = [torch.randn_like(y) for y in outputs]
    upstream = [view(make(value), value) for value in values]
    got = torch.autograd.grad(outputs, leaves, upstream, retain_graph=True)
    want = torch.autograd.grad(outputs, leaves, [dy.clone(memory_format=torch.contiguous_format) for dy in upstream])
    assert_same(layout, got, want)


@every_op
def test_what_is_no_tensor_is_refused(case):
    optional = ("gate", "residual", "running_mean", "running_var")
    if case.op == "whiten":
        optional += ("bias", "mean", "std")
    tensors = case.make(DEVICE, torch.float32)
    for name in tensors:
        if name not in optional and not (name.startswith(GATHER) and name != "gather.index"):
            with pytest.raises(TypeError, match=f"^{case.op}: {name} must be a tensor, found list$"):
                case.call(fused, {**tensors, name: [1.0]}, torch.float32)


@every_op
def test_constants_that_require_a_gradient_are_refused(case):
    """They would get none, without a word."""
    tensors = case.make(DEVICE, torch.float32)
    for name, value in tensors.items():
        if value is not None and value.is_floating_point() and name not in case.differentiable:
            with pytest.raises(ValueError, match=f"^{case.op}: {name} gets no gradient; detach it$"):
                case.call(fused, {**tensors, name: value.clone().requires_grad_()}, torch.float32)


@pytest.mark.parametrize("case", [c for c in CASES if "weight1" in c.differentiable], ids=lambda case: case.op)
def test_gate_weights_of_other_ranks(case):
    """A 1x1 convolution's are taken, with gradients of their shape; what is no matrix is refused."""
    tensors = case.make(DEVICE, torch.float32)
    wide = {name: tensors[name][:, :, None, None].clone() for name in ("weight1", "weight2")}
    got = results(case, tensors, wide, lambda name, base: base)
    want = results(case, tensors, wide, lambda name, base: base[:, :, 0, 0])
    for ours, theirs in zip(got, want, strict=True):
        assert ours.shape == theirs.shape and torch.equal(ours, theirs)
    for wrong, message in (
        (tensors["weight1"][0], r"weight1 must be \[O, \d+\], found"),
        (torch.zeros((), device=DEVICE), r"weight1 must be \[O, \d+\], found \[\]"),
        (tensors["weight1"][:0], "weight1 is empty"),
    ):
        with pytest.raises(ValueError, match=message):
            case.call(fused, {**tensors, "weight1": wrong}, torch.float32)


def in_mode(case, training: bool):
    return replace(case, options={**case.options, "training": training})


@every_normalizing_op
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", ["running_mean", "running_var"])
def test_running_statistics_that_cannot_be_updated_are_refused(case, training, name):
    tensors = case.make(DEVICE, torch.float32)
    value = tensors[name]
    for wrong, message in (
        (value.repeat_interleave(2)[::2], f"{name} must be contiguous"),
        (value[:1].expand(len(value)), f"{name} must be contiguous"),
        (torch._neg_view(value.clone()), f"{name} is negated lazily"),
    ):
        with pytest.raises(ValueError, match=f"^{case.op}: {message}"):
            in_mode(case, training).call(fused, {**tensors, name: wrong}, torch.float32)


@every_normalizing_op
def test_running_statistics_that_share_memory_are_refused_in_training(case):
    tensors = case.make(DEVICE, torch.float32)
    count = len(tensors["running_mean"])
    halves = torch.rand(2 * count, device=DEVICE)
    # side by side in one piece of memory, they are two tensors
    case.call(fused, {**tensors, "running_mean": halves[:count], "running_var": halves[count:]}, torch.float32)
    first = torch.rand(2 * count, device=DEVICE)[:count]
    shifted = torch.as_strided(first, (count,), (1,), count - 1)
    for wrong in (
        {"running_mean": first, "running_var": first},
        {"running_mean": first, "running_var": shifted},
        {"running_mean": first, "bias": first},
    ):
        with pytest.raises(ValueError, match="share memory, which the op updates in place"):
            case.call(fused, {**tensors, **wrong}, torch.float32)
        # evaluation only reads them
        in_mode(case, False).call(fused, {**tensors, **wrong}, torch.float32)


@every_normalizing_op
def test_evaluation_leaves_the_running_statistics_alone(case):
    """To autograd too, which would refuse what was computed from them before."""
    tensors = case.make(DEVICE, torch.float32)
    in_mode(case, False).call(fused, tensors, torch.float32)
    assert [tensors[name]._version for name in case.buffers] == [0, 0]
    in_mode(case, True).call(fused, tensors, torch.float32)
    assert [tensors[name]._version for name in case.buffers] == [1, 1]


def calls_in_order(case, ops, batches: list[dict], modes: list[bool], order: list[int] | None) -> list[Tensor]:
    """The gradients of a call on each batch, in training or evaluation mode, and the running statistics after all.

    The backward passes run in `order` after all calls, or each at once.
    """
    shared = {name: value.clone() for name, value in batches[0].items() if name in case.buffers}
    outputs, grads, leaves = {}, {}, {}

    def differentiate(i: int) -> None:
        torch.manual_seed(i)
        grads[i] = torch.autograd.grad(outputs[i], leaves[i], [torch.randn_like(y) for y in outputs[i]])

    for i, (batch, training) in enumerate(zip(batches, modes)):
        own = {**{name: value if value is None else value.clone() for name, value in batch.items()}, **shared}
        leaves[i] = [own[name].requires_grad_() for name in case.differentiable]
        outputs[i] = outputs_of(in_mode(case, training), ops, own)
        if order is None:
            differentiate(i)
    for i in order or []:
        differentiate(i)
    return [grad for i in range(len(batches)) for grad in grads[i]] + list(shared.values())


@every_normalizing_op
@pytest.mark.parametrize("modes", ["eval eval", "train train", "train eval", "eval train"])
@pytest.mark.parametrize("order", [[0, 1], [1, 0]], ids=["first-first", "last-first"])
def test_calls_before_their_backward_passes(case, modes, order):
    """Each call's gradients are those that PyTorch gives it by itself, whatever ran in between.

    (After "eval train" PyTorch's own would be of statistics that the training has moved.)
    """
    batches = [case.make(DEVICE, torch.float32) for _ in range(2)]
    training = [mode == "train" for mode in modes.split()]
    got = calls_in_order(case, fused, batches, training, order)
    want = calls_in_order(case, reference, batches, training, None)
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4 * theirs.abs().max().item())


@every_normalizing_op
@pytest.mark.parametrize("ops", [fused, reference], ids=["fused", "reference"])
def test_impossible_momentum_and_eps_are_refused(case, ops):
    tensors = case.make(DEVICE, torch.float32)
    for options, error, message in (
        ({"momentum": None}, TypeError, "momentum must be a number from 0 to 1, found None; there is no cumulative"),
        ({"momentum": "0.1"}, TypeError, "momentum must be a number, found '0.1'"),
        ({"momentum": -0.1}, ValueError, "momentum must be from 0 to 1, found -0.1"),
        ({"momentum": 1.5}, ValueError, "momentum must be from 0 to 1, found 1.5"),
        ({"momentum": float("nan")}, ValueError, "momentum must be from 0 to 1, found nan"),
        ({"eps": None}, TypeError, "eps must be a number, found None"),
        ({"eps": 0.0}, ValueError, "eps must be positive and finite in float32, found 0.0"),
        ({"eps": -1e-5}, ValueError, "eps must be positive and finite in float32, found -1e-05"),
        ({"eps": 1e-46}, ValueError, "eps must be positive and finite in float32, found 1e-46"),
        ({"eps": float("nan")}, ValueError, "eps must be positive and finite in float32, found nan"),
        ({"eps": float("inf")}, ValueError, "eps must be positive and finite in float32, found inf"),
    ):
        for training in (True, False):
            wrong = replace(case, options={**case.options, "training": training, **options})
            with pytest.raises(error, match=f"^{case.op}: {message}"):
                wrong.call(ops, tensors, torch.float32)
