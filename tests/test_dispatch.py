"""The ops as users call them: fused where the kernels take the call, plain PyTorch elsewhere, with the same results."""

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from blink import kernels
from blink.errors import UserError
from blink.kernels import dispatch, fused, reference
from blink.kernels.examine import cases
from blink.model import backend as backends
from tests.oracle import DEVICE, in_float64, run, updated

ROOT = Path(__file__).resolve().parent.parent
ALL = cases.small_cases()
CASES = [case for case in ALL if case.differentiable]
every_op = pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)


def results(case, ops, tensors, dtype=torch.float32):
    """Of any op: what it returns and updates, and its gradients if it has some."""
    if not case.differentiable:
        return updated(case, ops, tensors, dtype)
    with torch.no_grad():
        upstream = torch.ones_like(
            case.combined(reference, {k: v if v is None else v.clone() for k, v in tensors.items()}, dtype)
        )
    return run(case, ops, tensors, dtype, upstream)


def assert_same(case, one, other, tensors, dtype=torch.float32):
    got, want = results(case, one, tensors, dtype), results(case, other, tensors, dtype)
    for name, value in want.items():
        assert torch.equal(got[name], value), name


@pytest.mark.parametrize("case", ALL, ids=lambda case: f"{case.op} {case.label}")
def test_where_the_kernels_run_they_are_called(case):
    assert kernels.backend(DEVICE) == kernels.backend() == "fused"
    assert_same(case, kernels, fused, case.make(DEVICE, torch.float32))


@pytest.mark.parametrize("case", ALL, ids=lambda case: f"{case.op} {case.label}")
def test_elsewhere_the_reference_is(case, monkeypatch):
    monkeypatch.setattr(dispatch, "interpreting", lambda: False)
    assert kernels.backend("cpu") == kernels.backend("mps") == kernels.backend("meta") == "reference"
    assert_same(case, kernels, reference, case.make(torch.device("cpu"), torch.float32))


@pytest.mark.parametrize("case", ALL, ids=lambda case: f"{case.op} {case.label}")
def test_float64_goes_to_the_reference(case):
    assert_same(case, kernels, reference, in_float64(case.make(DEVICE, torch.float32)), torch.float64)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="a GPU computes bfloat16 right")
def test_bfloat16_goes_to_the_reference_in_the_interpreter():
    case = cases.squeeze_excite(2, 4, 3, 2, 2)
    assert_same(case, kernels, reference, case.make(DEVICE, torch.bfloat16), torch.bfloat16)


@pytest.mark.parametrize(
    "case",
    [c for c in CASES if {"x", "images"} & c.make(torch.device("cpu"), torch.float32).keys()],
    ids=lambda case: case.label,
)
def test_contiguous_images(case):
    """The same values in the memory that they came in; said once for each argument."""
    dispatch._say.cache_clear()
    tensors = case.make(DEVICE, torch.float32)
    plain = {k: v.contiguous() if v is not None and v.dim() == 4 else v for k, v in tensors.items()}
    with pytest.warns(UserWarning, match=f"{case.op}: (x|images|residual) is copied into channels_last memory"):
        got = results(case, kernels, plain)
    assert got["y"].is_contiguous()
    for name, value in results(case, fused, tensors).items():
        torch.testing.assert_close(got[name], value, msg=lambda m, n=name: f"{n}: {m}")


def test_logits_of_any_memory():
    case = cases.cross_entropy(5, 7)
    tensors = case.make(DEVICE, torch.float32)
    logits = tensors["logits"].T.contiguous().T
    loss, correct = kernels.cross_entropy(logits, tensors["labels"], **case.options)
    want = fused.cross_entropy(tensors["logits"], tensors["labels"], **case.options)
    assert torch.equal(loss, want[0]) and torch.equal(correct, want[1])


@pytest.mark.parametrize("op, first", [("se_gate", "squeeze"), ("squeeze_excite", "x"), ("cross_entropy", "logits")])
def test_an_empty_batch_is_pytorchs(op, first):
    (case,) = (case for case in CASES if case.op == op)
    tensors = case.make(DEVICE, torch.float32)
    empty = {k: v[:0] if k in (first, "labels") else v for k, v in tensors.items()}
    got, want = (case.combined(ops, empty, torch.float32) for ops in (kernels, reference))
    assert got.shape == want.shape and torch.equal(got, want)


@every_op
def test_differentiable_twice(case):
    tensors = case.make(DEVICE, torch.float32)
    leaf = tensors[case.differentiable[0]].requires_grad_()
    y = getattr(kernels, case.op)
    arguments = cases.base.Case.call(case, arguments_of(case.op), tensors, torch.float32)
    out = y(**arguments, differentiable_twice=True)
    out = out[0] if isinstance(out, tuple) else out
    (grad,) = torch.autograd.grad(out.square().sum(), leaf, create_graph=True)
    (second,) = torch.autograd.grad(grad.square().sum(), leaf)
    assert second.isfinite().all() and second.any()


def arguments_of(op: str):
    """Something whose op gives back what it was called with."""

    class Recorder:
        pass

    setattr(Recorder, op, staticmethod(lambda **arguments: arguments))
    return Recorder


@every_op
def test_signatures(case):
    ours = inspect.signature(getattr(kernels, case.op)).parameters
    assert list(ours) == [*inspect.signature(getattr(fused, case.op)).parameters, "differentiable_twice"]
    assert getattr(kernels, case.op).__doc__ == getattr(fused, case.op).__doc__


def test_positional_arguments_and_pythons_own_errors():
    x = torch.ones(2, 4, 3, 3, device=DEVICE).contiguous(memory_format=torch.channels_last)
    bias = torch.zeros(4, device=DEVICE)
    assert torch.equal(kernels.norm_act(x, bias), fused.norm_act(x, bias))
    for call, message in (
        (lambda: kernels.norm_act(), "missing 2 required positional arguments"),
        (lambda: kernels.norm_act(x), "missing 1 required positional argument: 'bias'"),
        (lambda: kernels.norm_act(x, bias, bias=bias), "multiple values for argument 'bias'"),
        (lambda: kernels.norm_act(x, bias, scale=1), "unexpected keyword argument 'scale'"),
        (lambda: kernels.norm_act([1.0], bias), "^norm_act: x must be a tensor, found list$"),
        (lambda: kernels.newton_schulz(x), "^newton_schulz: matrices must be a list of tensors, found Tensor$"),
    ):
        with pytest.raises(TypeError, match=message):
            call()


def test_forced(monkeypatch):
    case = cases.squeeze_excite(2, 4, 3, 2, 2)
    monkeypatch.setattr(dispatch, "_CHOICE", "reference")
    assert kernels.backend() == "reference"
    assert_same(case, kernels, reference, case.make(DEVICE, torch.float32))
    monkeypatch.setattr(dispatch, "_CHOICE", "fused")
    assert kernels.backend("cpu") == "fused"
    with pytest.raises(TypeError, match="squeeze_excite: x must be float32 or float16 or bfloat16, found float64"):
        case.call(kernels, in_float64(case.make(DEVICE, torch.float32)), torch.float64)
    monkeypatch.setattr(dispatch, "_CHOICE", "triton")
    with pytest.raises(UserError, match="BLINK_KERNELS must be fused or reference, found 'triton'"):
        kernels.backend()
    monkeypatch.setattr(dispatch, "_CHOICE", "fused")
    monkeypatch.setattr(dispatch, "HAS_TRITON", False)
    with pytest.raises(UserError, match="BLINK_KERNELS=fused needs triton, which is not installed"):
        kernels.backend()


def test_a_gpu_without_a_c_compiler_is_said_once(monkeypatch):
    monkeypatch.setattr(dispatch, "_HAS_C_COMPILER", False)
    dispatch._say.cache_clear()
    with pytest.warns(UserWarning, match="no C compiler .*: plain PyTorch runs") as said:
        assert [kernels.backend("cuda") for _ in range(2)] == ["reference"] * 2
    assert len(said) == 1


def test_fused_ops_refuse_what_the_dispatching_ones_take():
    case = cases.se_gate(2, 4, 2)
    tensors = case.make(DEVICE, torch.float32)
    with pytest.raises(RuntimeError, match=r"^se_gate: the kernels take no torch\.func transform"):
        torch.func.vmap(lambda s: fused.se_gate(**{**tensors, "squeeze": s}))(tensors["squeeze"][None])


def test_a_training_calls_the_fused_ops_themselves():
    backend = backends.fused()
    for op in backends._OPS:
        assert getattr(backend, op) is getattr(fused, op)


def python(code: str, **environment: str) -> str:
    """What a fresh process without a GPU and without the interpreter prints."""
    env = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", dispatch.VARIABLE)}
    env |= {"CUDA_VISIBLE_DEVICES": "", **environment}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_environment_is_read():
    code = "from blink import kernels; print(kernels.backend())"
    assert [python(code, **env) for env in ({}, {"BLINK_KERNELS": "fused"}, {"TRITON_INTERPRET": "1"})] == [
        "reference",
        "fused",
        "fused",
    ]


WITHOUT_TRITON = """
import importlib.util, sys, warnings
sys.modules["triton"] = None
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "triton" else find(name, *rest)
import torch
from torch import nn
from torchvision.ops import SqueezeExcitation
from blink import kernels
assert not kernels.HAS_TRITON and not kernels.interpreting() and kernels.backend("cuda") == "reference"
try:
    import blink.kernels.fused
except ImportError as error:
    print(error)
# other weights may leave a unit of the gate without a gradient
torch.manual_seed(0)
model = nn.Sequential(nn.Conv2d(3, 8, 3), SqueezeExcitation(8, 2), nn.Flatten(), nn.LazyLinear(4))
x, labels = torch.randn(5, 3, 6, 6), torch.randint(4, (5,))
model(x)
print(kernels.replace_squeeze_excitation(model).replaced)
loss, correct = kernels.cross_entropy(model(x), labels)
loss.backward()
parameters = list(model.parameters())
before = [p.detach().clone() for p in parameters]
momenta = [torch.zeros_like(p) for p in parameters]
kernels.sgd_nesterov(parameters, [p.grad for p in parameters], momenta, torch.tensor([0.1]), momentum=0.9)
print(all(not torch.equal(a, b) for a, b in zip(before, parameters)))
layer = kernels.Whiten(torch.randn(12, 3, 2, 2), torch.full((3,), 0.4), torch.full((3,), 0.2))
print(tuple(layer(torch.zeros(2, 3, 6, 6, dtype=torch.uint8)).shape))
print(kernels.squeeze_excite.__name__)
"""


def test_without_triton():
    assert python(WITHOUT_TRITON).splitlines() == [
        "blink.kernels.fused needs triton, which is not installed; blink.kernels and its reference do not",
        "['1']",
        "True",
        "(2, 12, 5, 5)",
        "squeeze_excite",
    ]
