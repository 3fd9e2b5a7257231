"""Activations inside the kernels, on values where a formula and PyTorch could part: infinite, NaN, large, on the edge.

In evaluation mode and with one value a channel or image, so that no sum carries a NaN from one value to another.
"""

from dataclasses import replace
from itertools import product

import pytest
import torch
import triton
import triton.language as tl

from blink.kernels import _checks, fused, reference
from blink.kernels.activations import ACTIVATIONS, GATES
from blink.kernels.examine import cases
from tests.oracle import DEVICE

INF, NAN = float("inf"), float("nan")
POINTS = (-INF, -1e38, -100.0, -20.0, -3.0, -1.0, -0.0, 0.0, 1.0, 3.0, 20.0, 100.0, 1e38, INF, NAN)
UPSTREAM = (INF, -INF, NAN, 1e35, -1.0, 0.0)
# numpy's, in the interpreter
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
every_activation = pytest.mark.parametrize("activation", reference.ACTIVATIONS)


def table(activation: str | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Every z with every upstream gradient, side by side.

    PyTorch's vectorized CPU code makes gelu(inf) a NaN, its scalar and its CUDA code inf; so with the gradient of
    hardswish(NaN), where these let dy through; hardswish(1e38) overflows.
    """
    left_out = {"gelu": (INF,), "hardswish": (1e38, NAN)}.get(activation, ())
    points = [z for z in POINTS if not any(z is value for value in left_out)]
    return torch.tensor(list(product(points, UPSTREAM)), device=DEVICE).unbind(1)


def channels(value: torch.Tensor, side: int = 1) -> torch.Tensor:
    """[1, C, side, side] in channels_last memory, one value a channel."""
    return value[None, :, None, None].repeat(1, 1, side, side).contiguous(memory_format=torch.channels_last)


def images(value: torch.Tensor) -> torch.Tensor:
    """[B, 1, 1, 1], one value an image."""
    return value[:, None, None, None].contiguous(memory_format=torch.channels_last)


def results(ops, op: str, arguments: dict, upstream: torch.Tensor, options: dict) -> dict[str, torch.Tensor]:
    """y and the gradient of every floating argument but the statistics, which get none."""
    own = {name: value.clone() for name, value in arguments.items()}
    fixed = ("running_mean", "running_var", "images", "whiten_weight", "weight", "mean", "std")
    leaves = {name: value.requires_grad_() for name, value in own.items() if name not in fixed}
    y = getattr(ops, op)(**own, **options)
    y = y[0] if isinstance(y, tuple) else y
    grads = torch.autograd.grad(y, list(leaves.values()), upstream)
    return {"y": y.detach()} | {f"d{name}": grad for name, grad in zip(leaves, grads)}


def assert_as_pytorch(op: str, arguments: dict, upstream: torch.Tensor, options: dict, names=None) -> None:
    got, want = (results(ops, op, arguments, upstream, options) for ops in (fused, reference))
    got, want = ({name: values[name] for name in names or want} for values in (got, want))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6, equal_nan=True)


def unit_statistics(count: int) -> dict:
    return {"running_mean": torch.zeros(count, device=DEVICE), "running_var": torch.ones(count, device=DEVICE)}


@every_activation
@pytest.mark.parametrize("op", ["norm_act", "excite_norm_act_add", "pool_norm_act"])
def test_normalizing_ops(op, activation):
    z, dy = table(activation)
    x = channels(z, 2 if op == "pool_norm_act" else 1)
    arguments = {"x": x, "bias": torch.zeros_like(z), **unit_statistics(len(z))}
    if op == "excite_norm_act_add":
        arguments |= {"gate": torch.ones(1, len(z), device=DEVICE), "residual": channels(torch.ones_like(z))}
    assert_as_pytorch(op, arguments, channels(dy), {"training": False, "eps": 1e-12, "activation": activation})


def test_hardswish_of_nan_lets_the_gradient_through():
    nan, dy = torch.full((len(UPSTREAM),), NAN, device=DEVICE), torch.tensor(UPSTREAM, device=DEVICE)
    arguments = {"x": channels(nan), "bias": torch.zeros_like(nan), **unit_statistics(len(nan))}
    options = {"training": False, "eps": 1e-12, "activation": "hardswish"}
    got = results(fused, "norm_act", arguments, channels(dy), options)
    assert got["y"].isnan().all()
    torch.testing.assert_close(got["dbias"], dy, rtol=0, atol=0, equal_nan=True)


@every_activation
def test_whiten(activation):
    """z is the bias."""
    z, dy = table(activation)
    weight = torch.zeros(len(z), 1, 1, 1, device=DEVICE)
    arguments = {"images": images(torch.zeros(1, device=DEVICE)), "weight": weight, "bias": z}
    assert_as_pytorch("whiten", arguments, channels(dy), {"activation": activation})


@every_activation
def test_whiten_project_norm_act(activation):
    """z is the bias; a pixel above the mean and above 128, so that no two infinite terms of a sum differ in sign."""
    z, dy = table(activation)
    arguments = {
        "images": torch.full((1, 1, 1, 1), 200, dtype=torch.uint8, device=DEVICE),
        "whiten_weight": torch.ones(1, 1, 1, 1, device=DEVICE),
        "project_weight": torch.zeros(len(z), 1, device=DEVICE),
        "bias": z,
        "mean": torch.full((1,), 0.4, device=DEVICE),
        "std": torch.full((1,), 0.25, device=DEVICE),
        **unit_statistics(len(z)),
    }
    options = {"training": False, "eps": 1e-12, "activation": activation, "dtype": torch.float32}
    assert_as_pytorch("whiten_project_norm_act", arguments, channels(dy), options)


def gate_weights(weight2: float) -> dict:
    """Of one channel and one hidden value, which is the squeeze: everything else in a tile is padding."""
    one, zero = torch.ones(1, 1, device=DEVICE), torch.zeros(1, device=DEVICE)
    return {"weight1": one, "bias1": zero, "weight2": weight2 * one, "bias2": zero.clone()}


@every_activation
@pytest.mark.parametrize("op", ["se_gate", "squeeze_excite"])
def test_hidden_activations(op, activation):
    """The small weight keeps the sigmoid from saturating at most points."""
    z, dy = table(activation)
    if op == "se_gate":
        arguments, upstream, names = {"squeeze": z[:, None]}, dy[:, None], ("y", "dsqueeze")
    else:
        arguments, upstream, names = {"x": images(z)}, images(dy), ("y", "dx")
    assert_as_pytorch(op, {**arguments, **gate_weights(0.01)}, upstream, {"activation": activation}, names)


@pytest.mark.parametrize("gate_activation", reference.GATES)
@pytest.mark.parametrize("op", ["se_gate", "squeeze_excite"])
def test_gates(op, gate_activation):
    """Every logit, which is the second bias, with every upstream gradient; no weight carries one to another."""
    logit, dy = table(None)
    zeros = torch.zeros(1, len(logit), device=DEVICE)
    arguments = {"weight1": zeros, "bias1": zeros[0, :1], "weight2": zeros.T.clone(), "bias2": logit}
    if op == "se_gate":
        arguments, upstream = {"squeeze": zeros.clone(), **arguments}, dy[None]
    else:
        arguments, upstream = {"x": channels(torch.ones_like(logit)), **arguments}, channels(dy)
    assert_as_pytorch(op, arguments, upstream, {"gate_activation": gate_activation}, ("y", "dbias2"))


@pytest.mark.parametrize("op", ["se_gate", "squeeze_excite"])
def test_an_infinite_gradient_stops_at_a_hidden_relu(op):
    """Below 0 relu's gradient is 0, whatever comes: dW1, db1 and the input's own stay finite."""
    value, upstream = torch.tensor([-2.0, -1.0], device=DEVICE), torch.tensor([INF, 1.0], device=DEVICE)
    if op == "se_gate":
        arguments, upstream = {"squeeze": value[:, None]}, upstream[:, None]
    else:
        arguments, upstream = {"x": images(value)}, images(upstream)
    arguments |= gate_weights(0.5)
    assert_as_pytorch(op, arguments, upstream, {"activation": "relu"})
    assert results(fused, op, arguments, upstream, {"activation": "relu"})["dweight1"].isfinite().all()


def test_the_kernels_have_what_the_reference_has():
    assert ACTIVATIONS.keys() == reference.ACTIVATIONS.keys()
    assert GATES.keys() == reference.GATES.keys()


@triton.jit
def _value_kernel(z_ptr, out_ptr, ACT: tl.constexpr):
    z = tl.load(z_ptr + tl.arange(0, 16))
    tl.store(out_ptr + tl.arange(0, 16), ACT(z))


@every_activation
def test_infinity_is_its_own_activation(activation):
    z, out = torch.full((16,), INF, device=DEVICE), torch.zeros(16, device=DEVICE)
    _value_kernel[(1,)](z, out, ACT=ACTIVATIONS[activation].value)
    assert torch.equal(out, z)


@pytest.mark.parametrize(
    "case", [case for case in cases.small_cases() if "activation" in case.options], ids=lambda case: case.label
)
def test_no_op_takes_an_unknown_name_for_the_identity(case, monkeypatch):
    """Were the check at the boundary to let one through, no kernel would have it."""
    monkeypatch.setattr(_checks, "activation", lambda op, name: None)
    unknown = replace(case, options={**case.options, "activation": "tanh"})
    with pytest.raises(KeyError, match="tanh"):
        unknown.call(fused, unknown.make(DEVICE, torch.float32), torch.float32)


@pytest.mark.parametrize("ops", [fused, reference], ids=["fused", "reference"])
@pytest.mark.parametrize(
    "case", [cases.se_gate(2, 4, 2), cases.squeeze_excite(2, 4, 2, 2, 2)], ids=lambda case: case.op
)
def test_an_unknown_gate_is_refused(case, ops):
    wrong = replace(case, options={**case.options, "gate_activation": "relu"})
    with pytest.raises(ValueError, match="unknown gate_activation 'relu'; expected one of sigmoid, hardsigmoid"):
        wrong.call(ops, wrong.make(DEVICE, torch.float32), torch.float32)
