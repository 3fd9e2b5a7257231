"""pool_norm_act: fused against the float64 reference."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from blink import kernels
from blink.kernels import fused
from blink.kernels.examine.cases import pool_norm_act
from blink.kernels.launching import captured_launches
from tests.oracle import DEVICE, DTYPES, Tolerance, directional_derivative_matches, judge, judge_on, name_of

# float32: a few roundings a value; 16 bits: y and the squeeze added to it for the comparison are rounded once each
TOLERANCES = {
    torch.float32: Tolerance(2e-6, 1e-5),
    torch.float16: Tolerance(2**-10 * 1.02, 2**-11 * 1.02),
    torch.bfloat16: Tolerance(2**-7 * 1.02, 2**-8 * 1.02),
}

CASES = [
    pool_norm_act(2, 128, 31, 31),
    pool_norm_act(3, 512, 7, 7),
    pool_norm_act(3, 12, 6, 9, activation="silu"),
    pool_norm_act(1, 80, 5, 4, activation="relu"),
    pool_norm_act(5, 24, 2, 2, activation=None),
    pool_norm_act(4, 6, 3, 2),
    pool_norm_act(2, 24, 7, 7, training=False),
    pool_norm_act(1, 12, 2, 3, training=False),
    pool_norm_act(2, 128, 15, 15, fork=True),
    pool_norm_act(3, 24, 7, 6, squeeze=False),
    pool_norm_act(3, 40, 5, 7, squeeze=False, fork=True),
    pool_norm_act(2, 12, 6, 5, fork=True, training=False, activation="relu"),
]


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.label)
def test_matches_float64(case, dtype):
    judge(case, dtype, TOLERANCES[dtype])


@settings(max_examples=12, deadline=None)
@given(
    batch=st.integers(2, 4),
    channels=st.integers(4, 40),
    height=st.integers(2, 11),
    width=st.integers(2, 11),
    training=st.booleans(),
    squeeze=st.booleans(),
    fork=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
def test_any_shape(batch, channels, height, width, training, squeeze, fork, dtype):
    # two images of one window each leave 2 values a channel, whose variance can be next to nothing
    case = pool_norm_act(batch, channels, height, width, training=training, eps=1e-3, squeeze=squeeze, fork=fork)
    judge(case, dtype, TOLERANCES[dtype].loosened(10), versus_pytorch=False)


def test_directional_derivative():
    # a step small enough that hardly a window changes its winner
    directional_derivative_matches(pool_norm_act(2, 3, 5, 4, eps=1e-3), step=1e-3, tolerance=1e-2)


def test_ties_go_to_the_first_pixel():
    """Integers from -1 to 1 tie in most windows; the gradient goes where PyTorch sends it."""
    case = pool_norm_act(3, 8, 7, 6, eps=1e-3)
    tensors = case.make(DEVICE, torch.float32)
    tensors["x"] = torch.randint(-1, 2, (3, 8, 7, 6), device=DEVICE).float()
    tensors["x"] = tensors["x"].contiguous(memory_format=torch.channels_last)
    judge_on(case, tensors, torch.float32, TOLERANCES[torch.float32])
    x = tensors["x"].clone().requires_grad_()
    case.combined(fused, {**tensors, "x": x}, torch.float32).sum().backward()
    y = tensors["x"].clone().requires_grad_()
    F.max_pool2d(y, 2).sum().backward()
    assert torch.equal(x.grad != 0, (y.grad != 0) & (x.grad != 0))


def test_nan_wins():
    case = pool_norm_act(2, 4, 4, 4)
    tensors = case.make(DEVICE, torch.float32)
    for k in range(4):
        x = tensors["x"].clone()
        x[0, 1, k // 2, k % 2] = float("nan")
        y, squeeze = case.call(fused, {**tensors, "x": x}, torch.float32)
        assert y[:, 1].isnan().all() and squeeze[:, 1].isnan().all()
        assert y[:, [0, 2, 3]].isfinite().all()


def test_squeeze_is_the_mean_of_y():
    case = pool_norm_act(3, 20, 7, 5)
    y, squeeze = case.call(fused, case.make(DEVICE, torch.float32), torch.float32)
    assert squeeze.dtype == torch.float32
    torch.testing.assert_close(squeeze, y.mean((2, 3)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("used", [(0,), (1,), (2,), (0, 1), (1, 2)], ids=str)
def test_some_outputs_may_go_unused(used):
    """Of y, y again and the squeeze; each one used has weights of its own."""
    case = pool_norm_act(2, 6, 5, 5, eps=1e-3, fork=True)
    tensors = case.make(DEVICE, torch.float32)
    grads = []
    for ops, dtype in ((fused, torch.float32), (kernels.reference, torch.float64)):
        own = {k: v.detach().clone().to(dtype) for k, v in tensors.items()}
        own["x"].requires_grad_()
        own["bias"].requires_grad_()
        outputs = case.call(ops, own, dtype)
        loss = 0
        for i in used:
            weights = torch.linspace(-1, 1 + i, outputs[i].numel(), device=DEVICE, dtype=dtype)
            loss = loss + (outputs[i].flatten() * weights).sum()
        loss.backward()
        grads.append((own["x"].grad.double(), own["bias"].grad.double()))
    for ours, truth in zip(*grads):
        assert (ours - truth).abs().max() <= 1e-5 * truth.abs().max()


@pytest.mark.parametrize("fork", [False, True], ids=["plain", "fork"])
def test_the_squeeze_is_optional(fork):
    """Without it y is the same, bit for bit, None stands in its place and no kernel computes it."""
    tensors = pool_norm_act(3, 20, 7, 5).make(DEVICE, torch.float32)
    calls = []
    for squeeze in (True, False):
        case = pool_norm_act(3, 20, 7, 5, squeeze=squeeze, fork=fork)
        own = {k: v.clone() for k, v in tensors.items()}
        calls.append(case.call(fused, own, torch.float32))
        with captured_launches() as launches:
            case.call(fused, own, torch.float32)
        arguments = [dict(zip(launch.kernel.arg_names, launch.arguments)) for launch in launches]
        assert any(named.get("squeeze_ptr") is not None for named in arguments) == squeeze
    (y, *_, means), (same, *_, nothing) = calls
    assert torch.equal(y, same) and means.shape == (3, 20) and nothing is None
    assert kernels.reference.pool_norm_act(**tensors, squeeze=False, fork=fork)[-1] is None


def test_forked_outputs_share_memory_and_are_guarded():
    case = pool_norm_act(2, 6, 4, 4, fork=True)
    tensors = case.make(DEVICE, torch.float32)
    tensors["x"].requires_grad_()
    y, again, _ = case.call(fused, tensors, torch.float32)
    assert y.data_ptr() == again.data_ptr() and torch.equal(y, again) and y.stride() == again.stride()
    with pytest.raises(RuntimeError, match="modified inplace"):
        again.mul_(2)


def test_fork_inside_a_compiled_function():
    """Both users compiled together with the op: neither gradient is lost, and the graph stays whole."""
    case = pool_norm_act(2, 6, 5, 4, eps=1e-3, fork=True)
    tensors = case.make(DEVICE, torch.float32)
    weights = torch.randn(2, 6, 2, 2, device=DEVICE)

    def step(x):
        own = {k: v.clone() for k, v in tensors.items() if k != "x"}
        y, again, means = fused.pool_norm_act(x, **own, **case.options)
        return (y * weights).sum() + again.square().sum() + means.sin().sum()

    grads = []
    torch._dynamo.reset()
    for call in (step, torch.compile(step, backend="aot_eager", fullgraph=True)):
        x = tensors["x"].clone().requires_grad_()
        call(x).backward()
        grads.append(x.grad)
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-6)


def test_many_images_per_program(monkeypatch):
    import importlib

    module = importlib.import_module("blink.kernels.pool_norm_act")
    monkeypatch.setattr(module, "resident", lambda device, programs: 3)
    judge(pool_norm_act(8, 12, 5, 5, fork=True), torch.float32, TOLERANCES[torch.float32])


def test_refuses_what_it_cannot_do():
    case = pool_norm_act(2, 4, 4, 4)
    good = {**case.make(DEVICE, torch.float32), **case.options}

    def call(**changed):
        return fused.pool_norm_act(**{**good, **changed})

    with pytest.raises(ValueError, match="at least 2x2"):
        call(x=good["x"][:, :, :1].contiguous(memory_format=torch.channels_last))
    with pytest.raises(ValueError, match=r"bias must be \[4\]"):
        call(bias=torch.zeros(5, device=DEVICE))
    with pytest.raises(ValueError, match="more than 1 value"):
        call(x=good["x"][:1, :, :2, :2].contiguous(memory_format=torch.channels_last))
    with pytest.raises(ValueError, match="evaluation mode needs"):
        call(running_mean=None, running_var=None, training=False)
