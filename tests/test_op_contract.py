"""What every differentiable op promises: layout, dtype and device checks, autograd modes, torch.compile, determinism.

And of all ops, that they are registered; what ops on lists of tensors promise is in test_list_op_contract.py.
"""

import inspect
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from blink import kernels
from blink.kernels import fused
from blink.kernels.examine import cases
from tests.oracle import DEVICE, DTYPES, captured, in_float64, name_of, run

ROOT = Path(__file__).resolve().parent.parent
ALL_CASES = cases.small_cases()
CASES = [case for case in ALL_CASES if case.differentiable]
OPS = fused.__all__


def of_ops(cases):
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.op)


every_op = of_ops(CASES)
EVALUATED = [replace(case, options={**case.options, "training": False}) for case in CASES if case.buffers]
in_both_modes = pytest.mark.parametrize(
    "case", CASES + EVALUATED, ids=lambda case: case.op + ("-eval" if case in EVALUATED else "")
)
# the op whose operators one without its own calls
OPERATORS = {"norm_act": "excite_norm_act_add"}
ALWAYS_FLOAT32 = {"se_gate", "cross_entropy"}


def first_argument(case) -> str:
    return next(iter(case.arguments))


def trained(case, dtype=torch.float32) -> dict:
    """Fresh arguments that require what gradients the op gives."""
    tensors = case.make(DEVICE, dtype)
    return {k: v.requires_grad_() if k in case.differentiable else v for k, v in tensors.items()}


def upstream_of(case, dtype=torch.float32) -> torch.Tensor:
    """Random, of the result's shape and dtype; nothing of the call that told them is left."""
    with torch.no_grad():
        return torch.randn_like(case.combined(fused, case.make(DEVICE, dtype), dtype))


def test_every_public_op_is_registered_and_tested():
    """A new op needs a reference of the same signature, a case and a test file."""
    assert sorted(OPS) == sorted({case.op for case in ALL_CASES})
    assert {case.op for case in cases.network_cases()} == set(OPS)
    for name in OPS:
        assert (Path(__file__).parent / f"test_{name}.py").is_file()
        ours = inspect.signature(getattr(fused, name)).parameters
        theirs = inspect.signature(getattr(kernels.reference, name)).parameters
        assert [(p.name, p.kind, p.default) for p in ours.values()] == [
            (p.name, p.kind, p.default) for p in theirs.values()
        ], name
        assert "Raises" in getattr(fused, name).__doc__
        assert getattr(kernels, name) is not getattr(fused, name) and name in kernels.__all__


@every_op
def test_bitwise_repeatable(case):
    tensors, upstream = case.make(DEVICE, torch.float32), upstream_of(case)
    once = run(case, fused, tensors, torch.float32, upstream)
    again = run(case, fused, tensors, torch.float32, upstream)
    for name, value in once.items():
        assert torch.equal(value, again[name]), name


def in_place_copy(tensors):
    return {k: None if v is None else v.clone() for k, v in tensors.items()}


@every_op
def test_output_is_channels_last_and_keeps_its_dtype(case):
    for dtype in DTYPES:
        y = case.combined(fused, case.make(DEVICE, dtype), dtype)
        assert y.dtype == (torch.float32 if case.op in ALWAYS_FLOAT32 else dtype)
        if y.dim() == 4:
            assert y.is_contiguous(memory_format=torch.channels_last)


@every_op
def test_without_gradients(case):
    """No argument requires a gradient, or no_grad is on: the same values, no graph."""
    tensors = trained(case)
    with torch.no_grad():
        y = case.combined(fused, in_place_copy(tensors), torch.float32)
    assert not y.requires_grad
    plain = {k: None if v is None else v.detach() for k, v in tensors.items()}
    z = case.combined(fused, in_place_copy(plain), torch.float32)
    assert not z.requires_grad
    assert torch.equal(y, z)


@every_op
def test_only_what_requires_a_gradient_gets_one(case):
    for name in case.differentiable:
        tensors = case.make(DEVICE, torch.float32)
        tensors[name].requires_grad_()
        case.combined(fused, tensors, torch.float32).sum().backward()
        assert tensors[name].grad.isfinite().all()
        assert all(v.grad is None for k, v in tensors.items() if v is not None and k != name)


@every_op
@pytest.mark.parametrize("loss", [lambda y: y.square().sum(), lambda y: y.sum()], ids=["square", "sum"])
def test_second_derivative_is_a_clear_error(case, loss):
    """Of a plain sum too, whose gradient needs none itself: terms of the second order are refused, never left out."""
    for name in case.differentiable:
        tensors = trained(case)
        leaf = tensors[name]
        y = loss(case.combined(fused, tensors, torch.float32))
        (plain,) = torch.autograd.grad(y, leaf, retain_graph=True)
        (grad,) = torch.autograd.grad(y, leaf, create_graph=True)
        assert not plain.requires_grad and torch.equal(plain, grad.detach()), name
        with pytest.raises(RuntimeError, match=rf"^{case.op} is differentiable once.*use reference\.{case.op}$"):
            grad.square().sum().backward()
        (grad,) = torch.autograd.grad(loss(case.combined(fused, tensors, torch.float32)), leaf, create_graph=True)
        # allow_unused: nor is any answered with None, as if the gradient did not depend on what is not saved
        for other in case.differentiable:
            with pytest.raises(RuntimeError, match=rf"^{case.op} is differentiable once"):
                torch.autograd.grad(grad.square().sum(), tensors[other], allow_unused=True, retain_graph=True)


@every_op
def test_arguments_are_not_modified(case):
    tensors = trained(case)
    before = in_place_copy(tensors)
    case.combined(fused, tensors, torch.float32).sum().backward()
    for name, value in tensors.items():
        if name not in case.buffers:
            assert torch.equal(value, before[name]), name


@every_op
def test_empty_batch_and_wrong_rank_are_refused(case):
    name = first_argument(case)
    tensors = case.make(DEVICE, torch.float32)
    with pytest.raises(ValueError, match="empty"):
        case.combined(fused, {**tensors, name: tensors[name][:0]}, torch.float32)
    with pytest.raises(ValueError, match=rf"{name} must be \["):
        case.combined(fused, {**tensors, name: tensors[name][0]}, torch.float32)


@every_op
def test_wrong_dtype_is_refused(case):
    name = first_argument(case)
    tensors = case.make(DEVICE, torch.float32)
    with pytest.raises(TypeError, match=f"{name} must be"):
        case.combined(fused, {**tensors, name: tensors[name].to(torch.int32)}, torch.float32)
    with pytest.raises(TypeError, match="float64"):
        case.combined(fused, in_float64({**tensors, name: tensors[name].double()}), torch.float64)


@of_ops([case for case in CASES if "activation" in case.options])
def test_unknown_activation_is_refused(case):
    wrong = replace(case, options={**case.options, "activation": "tanh"})
    with pytest.raises(ValueError, match="unknown activation 'tanh'"):
        wrong.call(fused, case.make(DEVICE, torch.float32), torch.float32)


@of_ops([case for case in CASES if case.op not in ALWAYS_FLOAT32])
def test_channels_first_is_refused(case):
    name = first_argument(case)
    tensors = case.make(DEVICE, torch.float32)
    with pytest.raises(ValueError, match="channels_last"):
        case.combined(fused, {**tensors, name: tensors[name].contiguous()}, torch.float32)


@every_op
def test_another_device_is_refused(case):
    name = first_argument(case)
    tensors = case.make(DEVICE, torch.float32)
    with pytest.raises(ValueError, match="one device"):
        case.combined(fused, {**tensors, name: tensors[name].to("meta")}, torch.float32)


@every_op
def test_autocast(case):
    """Under autocast the ops compute in float32 as ever; those that choose their result's dtype take autocast's."""
    tensors = case.make(DEVICE, torch.float32)
    plain = case.combined(fused, in_place_copy(tensors), torch.float32)
    with torch.autocast(DEVICE.type, dtype=torch.float16):
        # without a dtype of its own, which call() would state
        y = replace(case, states_dtype=False).combined(fused, in_place_copy(tensors), torch.float32)
    assert y.dtype == (torch.float16 if case.takes_dtype else torch.float32)
    torch.testing.assert_close(y.float(), plain, rtol=2e-3, atol=2e-3)


@in_both_modes
def test_torch_compile_sees_one_opaque_op(case):
    """Traced whole (fullgraph) with its backward and its buffers, giving the eager result."""
    tensors, upstream = case.make(DEVICE, torch.float32), upstream_of(case)
    eager = run(case, fused, tensors, torch.float32, upstream)

    class Compiled:
        pass

    def call(**arguments):
        return getattr(fused, case.op)(**arguments)

    setattr(Compiled, case.op, staticmethod(torch.compile(call, backend="aot_eager", fullgraph=True)))
    torch._dynamo.reset()
    compiled = run(case, Compiled, tensors, torch.float32, upstream)
    for name, value in eager.items():
        assert torch.equal(value, compiled[name]), name


@in_both_modes
def test_operators_obey_their_declarations(case):
    """torch.library.opcheck on every operator a forward and backward call: schema, mutation, aliasing, fake shapes."""
    seen = []
    original = torch._ops.OpOverload.__call__

    def record(self, *args, **kwargs):
        if self.namespace == "blink":
            seen.append((self, tuple(a.detach().clone() if isinstance(a, torch.Tensor) else a for a in args)))
        return original(self, *args, **kwargs)

    torch._ops.OpOverload.__call__ = record
    try:
        tensors = trained(case)
        y = case.combined(fused, tensors, torch.float32)
        y.backward(torch.randn_like(y))
    finally:
        torch._ops.OpOverload.__call__ = original
    name = OPERATORS.get(case.op, case.op)
    assert {operator._opname for operator, _ in seen} == {f"{name}_fwd", f"{name}_bwd"}
    for operator, arguments in seen:
        torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@every_op
def test_cuda_graph_replay(case, dtype):
    """Forward and backward captured once and replayed on new values give what eager calls give."""
    tensors, upstream = trained(case, dtype), upstream_of(case, dtype)
    leaves = [tensors[name] for name in case.differentiable]

    def step():
        y = case.combined(fused, tensors, dtype)
        grads = torch.autograd.grad(y, leaves, upstream)
        return {"y": y.detach()} | dict(zip(case.differentiable, grads))

    graph, results = captured(step)
    fresh = case.make(DEVICE, dtype)
    with torch.no_grad():
        for name, value in tensors.items():
            if value is not None:
                value.copy_(fresh[name])
    graph.replay()
    torch.cuda.synchronize()
    got = {name: value.clone() for name, value in results.items()}
    with torch.no_grad():
        for name in case.buffers:
            tensors[name].copy_(fresh[name])
    for name, want in step().items():
        assert torch.equal(got[name], want), name


def test_bfloat16_is_refused_in_the_interpreter():
    if not kernels.interpreting():
        pytest.skip("on a GPU bfloat16 works and is judged with the other dtypes")
    case = cases.squeeze_excite(1, 4, 2, 2, 2)
    with pytest.raises(RuntimeError, match="bfloat16"):
        case.combined(fused, case.make(DEVICE, torch.bfloat16), torch.bfloat16)


def test_without_gpu_or_interpreter_the_error_says_what_to_do():
    code = (
        "import torch\nfrom blink.kernels import fused\n"
        "x = torch.randn(1, 4, 2, 2).contiguous(memory_format=torch.channels_last)\n"
        "try:\n    fused.excite_norm_act_add(x, None, torch.zeros(4))\n"
        "except RuntimeError as error:\n    print(error)\n"
    )
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    assert "TRITON_INTERPRET=1" in done.stdout and "need a GPU" in done.stdout, done.stderr
