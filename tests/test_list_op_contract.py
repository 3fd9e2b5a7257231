"""What every op on lists of tensors promises: checks, no part in autograd, torch.compile, determinism, CUDA graphs."""

import pytest
import torch

from blink import kernels
from blink.kernels import fused
from blink.kernels.examine import cases
from blink.kernels.examine.cases import mapped, named
from tests.oracle import DEVICE, DTYPES, captured, copies, in_float64, name_of, updated

CASES = [case for case in cases.small_cases() if not case.differentiable]
every_op = pytest.mark.parametrize("case", CASES, ids=lambda case: case.op)
every_update = pytest.mark.parametrize("case", [case for case in CASES if case.buffers], ids=lambda case: case.op)


def first_list(case) -> str:
    return "params" if case.buffers else "matrices"


def with_first(tensors: dict, name: str, change) -> dict:
    """The arguments with the first tensor of one list changed."""
    return {**tensors, name: [change(tensors[name][0]), *tensors[name][1:]]}


def all_named(tensors: dict) -> dict:
    return {key: value for name, list_ in tensors.items() for key, value in named(name, list_).items()}


def test_there_are_such_ops():
    assert {case.op for case in CASES} == {"sgd_nesterov", "newton_schulz", "muon"}


@every_op
def test_bitwise_repeatable(case):
    tensors = case.make(DEVICE, torch.float32)
    once, again = (updated(case, fused, tensors, torch.float32) for _ in range(2))
    assert once
    for name, value in once.items():
        assert torch.equal(value, again[name]), name


@every_op
def test_only_buffers_are_modified_and_all_of_them(case):
    tensors = case.make(DEVICE, torch.float32)
    before = all_named(copies(tensors))
    case.call(fused, tensors, torch.float32)
    for name, value in all_named(tensors).items():
        assert torch.equal(value, before[name]) == (name.split("[")[0] not in case.buffers), name


@every_op
@pytest.mark.parametrize("grad_mode", [True, False])
def test_no_part_in_autograd(case, grad_mode):
    """Tensors that require gradients are taken as they are, and nothing is recorded."""
    tensors = case.make(DEVICE, torch.float32)
    want = updated(case, fused, tensors, torch.float32)
    mapped(lambda t: t.requires_grad_(), tensors[first_list(case)])
    with torch.set_grad_enabled(grad_mode):
        results = named("y", case.call(fused, tensors, torch.float32))
    for name in case.buffers:
        results |= named(name, tensors[name])
    for name, value in results.items():
        assert value.is_leaf and value.grad_fn is None, name
        assert value.requires_grad == name.startswith("params"), name
        assert torch.equal(value.detach(), want[name]), name


@every_update
def test_autograd_notices_the_update(case):
    """A backward pass through values that the step has overwritten is refused, not wrong."""
    tensors = case.make(DEVICE, torch.float32)
    param = tensors["params"][0].requires_grad_()
    y = param.square().sum()
    case.call(fused, tensors, torch.float32)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


@every_op
def test_autocast_changes_nothing(case):
    tensors = case.make(DEVICE, torch.float32)
    plain = updated(case, fused, tensors, torch.float32)
    with torch.autocast(DEVICE.type, dtype=torch.float16):
        under = updated(case, fused, tensors, torch.float32)
    for name, value in plain.items():
        assert torch.equal(value, under[name]), name


@every_op
def test_no_list_is_refused(case):
    name = first_list(case)
    tensors = case.make(DEVICE, torch.float32)
    none = {k: [] if isinstance(v, list) else v for k, v in tensors.items()}
    with pytest.raises(ValueError, match=f"{name} is empty"):
        case.call(fused, none, torch.float32)
    with pytest.raises(TypeError, match=f"{name} must be a list of tensors"):
        case.call(fused, {**tensors, name: tensors[name][0]}, torch.float32)


@every_op
def test_wrong_dtype_is_refused(case):
    name = first_list(case)
    tensors = case.make(DEVICE, torch.float32)
    with pytest.raises(TypeError, match=rf"{name}\[0\] must be float32 or float16 or bfloat16, found int32"):
        case.call(fused, with_first(tensors, name, lambda t: t.to(torch.int32)), torch.float32)
    with pytest.raises(TypeError, match="float64"):
        case.call(fused, in_float64(tensors), torch.float32)


@every_op
def test_empty_tensor_is_refused(case):
    tensors = case.make(DEVICE, torch.float32)
    for name, value in tensors.items():
        if isinstance(value, list):
            tensors = with_first(tensors, name, lambda t: t[:0])
    with pytest.raises(ValueError, match="empty"):
        case.call(fused, tensors, torch.float32)


@every_op
def test_another_device_is_refused(case):
    tensors = case.make(DEVICE, torch.float32)
    for name, value in tensors.items():
        if isinstance(value, list) or name == "lr":
            changed = with_first(tensors, name, lambda t: t.to("meta")) if isinstance(value, list) else None
            with pytest.raises(ValueError, match="one device"):
                case.call(fused, changed or {**tensors, name: value.to("meta")}, torch.float32)


@every_update
def test_lists_that_do_not_match_are_refused(case):
    tensors = case.make(DEVICE, torch.float32)
    shape = list(tensors["params"][0].shape)
    for name in ("grads", "momentum_buffers"):
        with pytest.raises(ValueError, match=f"{name} must be as many as params, {len(tensors['params'])}, found 1"):
            case.call(fused, {**tensors, name: tensors[name][:1]}, torch.float32)
        with pytest.raises(ValueError, match=rf"{name}\[0\] must be \[{shape[0]}, "):
            case.call(fused, with_first(tensors, name, lambda t: t[1:]), torch.float32)
        with pytest.raises(TypeError, match=rf"{name}\[0\] must be float32, found float16"):
            case.call(fused, with_first(tensors, name, lambda t: t.half()), torch.float32)
    with pytest.raises(ValueError, match=r"momentum_buffers\[0\] must have the layout of params\[0\]"):
        case.call(fused, with_first(tensors, "momentum_buffers", lambda t: t.contiguous()), torch.float32)
    for name in case.buffers:
        spread = with_first(tensors, name, lambda t: t.repeat_interleave(2, 1)[:, ::2])
        with pytest.raises(ValueError, match=r"dense memory|layout of params"):
            case.call(fused, spread, torch.float32)


@every_update
def test_rates_that_are_not_on_the_device_one_or_one_for_each_are_refused(case):
    tensors = case.make(DEVICE, torch.float32)
    count = len(tensors["params"])
    for lr, error, message in (
        (0.1, TypeError, "lr must be a float32 tensor on the parameters' device"),
        (torch.ones(9, device=DEVICE), ValueError, "lr must have one element, or one for each of"),
        (torch.ones(2 * count, device=DEVICE)[::2], ValueError, "lr must be dense memory"),
        (torch.ones(1, device=DEVICE).half(), TypeError, "lr must be float32"),
    ):
        with pytest.raises(error, match=message):
            case.call(fused, {**tensors, "lr": lr}, torch.float32)


@every_op
def test_torch_compile_sees_one_opaque_op(case):
    """Traced whole (fullgraph), lists, updates and all, giving the eager result."""
    tensors = case.make(DEVICE, torch.float32)
    eager = updated(case, fused, tensors, torch.float32)

    def call(**arguments):
        return getattr(fused, case.op)(**arguments)

    class Compiled:
        pass

    torch._dynamo.reset()
    setattr(Compiled, case.op, staticmethod(torch.compile(call, backend="aot_eager", fullgraph=True)))
    compiled = updated(case, Compiled, tensors, torch.float32)
    for name, value in eager.items():
        assert torch.equal(value, compiled[name]), name


@every_op
def test_operator_obeys_its_declaration(case):
    """torch.library.opcheck of the operator that a call makes: schema, mutation, aliasing, fake shapes."""
    seen = []
    original = torch._ops.OpOverload.__call__

    def record(self, *args, **kwargs):
        if self.namespace == "blink":
            clone = tuple(
                mapped(lambda t: t.clone(), a) if isinstance(a, torch.Tensor) or self_is_list(a) else a for a in args
            )
            seen.append((self, clone))
        return original(self, *args, **kwargs)

    def self_is_list(a):
        return isinstance(a, list) and isinstance(a[0], torch.Tensor)

    torch._ops.OpOverload.__call__ = record
    try:
        case.call(fused, case.make(DEVICE, torch.float32), torch.float32)
    finally:
        torch._ops.OpOverload.__call__ = original
    assert [operator._opname for operator, _ in seen] == [case.op]
    operator, arguments = seen[0]
    torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@every_op
def test_cuda_graph_replay(case, dtype):
    """Captured once and replayed on new values, of the learning rate too, gives what an eager call gives."""
    tensors = case.make(DEVICE, dtype)
    graph, results = captured(lambda: named("y", case.call(fused, tensors, dtype)))
    fresh = case.make(DEVICE, dtype)
    if "lr" in fresh:
        fresh["lr"] *= 2
    for name, value in all_named(tensors).items():
        value.copy_(all_named(fresh)[name])
    want = updated(case, fused, fresh, dtype)
    graph.replay()
    torch.cuda.synchronize()
    got = results | {k: v for name in case.buffers for k, v in named(name, tensors[name]).items()}
    for name, value in want.items():
        assert torch.equal(got[name], value), name


def test_bfloat16_is_refused_in_the_interpreter():
    if not kernels.interpreting():
        pytest.skip("on a GPU bfloat16 works and is judged with the other dtypes")
    for case in CASES:
        with pytest.raises(RuntimeError, match="bfloat16"):
            case.call(fused, case.make(DEVICE, torch.bfloat16), torch.bfloat16)
    with pytest.raises(RuntimeError, match="bfloat16"):
        fused.newton_schulz([torch.ones(2, 2, device=DEVICE)], dtype=torch.bfloat16)
