"""excite_norm_act_add: fused against the float64 reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blink.kernels import fused
from blink.kernels.examine.cases import excite_norm_act_add
from tests.oracle import DEVICE, DTYPES, Tolerance, directional_derivative_matches, judge, judge_on, name_of

# float32: a few roundings a value; the gate's gradient sums up to H * W of them, which largely cancel;
# 16 bits: one rounding of the result, but dx subtracts two means that are themselves exact to float32
TOLERANCES = {
    torch.float32: Tolerance(2e-6, 1e-5),
    torch.float16: Tolerance(2**-11 * 1.02, 2**-11 * 1.02),
    torch.bfloat16: Tolerance(2**-8 * 1.02, 2**-8 * 1.02),
}

CASES = [
    excite_norm_act_add(2, 128, 15, 15),
    excite_norm_act_add(4, 512, 3, 3),
    excite_norm_act_add(3, 12, 5, 7, activation="silu"),
    excite_norm_act_add(2, 80, 3, 3, activation="relu"),
    excite_norm_act_add(1, 80, 3, 3, gate=False),
    excite_norm_act_add(2, 24, 7, 7, residual=False),
    excite_norm_act_add(9, 20, 5, 9, gate=False),
    excite_norm_act_add(2, 130, 7, 7, gate=False, residual=False, activation=None),
    excite_norm_act_add(5, 6, 1, 1),
    excite_norm_act_add(2, 24, 7, 7, training=False),
    excite_norm_act_add(1, 12, 1, 1, gate=False, training=False),
]


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.label)
def test_matches_float64(case, dtype):
    judge(case, dtype, TOLERANCES[dtype])


@settings(max_examples=12, deadline=None)
@given(
    batch=st.integers(2, 5),
    channels=st.integers(4, 40),
    height=st.integers(2, 9),
    width=st.integers(2, 9),
    gate=st.booleans(),
    residual=st.booleans(),
    training=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
def test_any_shape(batch, channels, height, width, gate, residual, training, dtype):
    case = excite_norm_act_add(batch, channels, height, width, gate, residual, training=training)
    judge(case, dtype, TOLERANCES[dtype].loosened(10), versus_pytorch=False)


def test_directional_derivative():
    directional_derivative_matches(excite_norm_act_add(2, 3, 3, 4, eps=1e-5))


@pytest.mark.parametrize("gate", [True, False], ids=["gate", "nogate"])
def test_mean_far_from_zero(gate):
    """A mean 1000 times the deviation: a sum of squares would lose about 1e-1 of the variance, a merge 1e-5."""
    case = excite_norm_act_add(4, 6, 8, 8, gate=gate, residual=False, activation=None)
    tensors = case.make(DEVICE, torch.float32)
    tensors["x"] = (tensors["x"] + 1000).contiguous(memory_format=torch.channels_last)
    if gate:
        tensors["gate"].fill_(0.5)
    # how near the means of six channels come to a float32, and so who is nearer the truth, is luck
    judge_on(case, tensors, torch.float32, Tolerance(2e-4, 3e-4), versus_pytorch=False)


def test_constant_channel():
    """No variance: the output is act(bias) + residual, finite, as in PyTorch."""
    case = excite_norm_act_add(2, 4, 3, 3, gate=False)
    tensors = case.make(DEVICE, torch.float32)
    tensors["x"][:, 1] = 3.25
    y = case.call(fused, dict(tensors), torch.float32)
    want = torch.nn.functional.gelu(tensors["bias"][1].double()) + tensors["residual"][:, 1].double()
    assert (y[:, 1].double() - want).abs().max() <= 1e-5


def test_nan_stays_visible():
    case = excite_norm_act_add(2, 4, 3, 3)
    tensors = case.make(DEVICE, torch.float32)
    tensors["x"][0, 2, 1, 1] = float("nan")
    y = case.call(fused, tensors, torch.float32)
    assert y[:, 2].isnan().all()
    assert y[:, [0, 1, 3]].isfinite().all()


def test_many_segments_per_program(monkeypatch):
    """With fewer programs than images, programs own several images each; results do not change beyond rounding."""
    from blink.kernels import _batch_norm

    monkeypatch.setattr(_batch_norm, "resident", lambda device, programs: 3)
    judge(excite_norm_act_add(8, 12, 3, 3), torch.float32, TOLERANCES[torch.float32])
    judge(excite_norm_act_add(30, 12, 5, 5, gate=False), torch.float32, TOLERANCES[torch.float32])


def test_upstream_in_any_memory_format():
    """An upstream gradient that is expanded or channels-first gives the same result."""
    case = excite_norm_act_add(2, 6, 3, 4)
    tensors = case.make(DEVICE, torch.float32)
    grads = []
    for upstream in (torch.ones(1, device=DEVICE).expand(2, 6, 3, 4), torch.ones(2, 6, 3, 4, device=DEVICE)):
        x = tensors["x"].clone().requires_grad_()
        case.call(fused, {**tensors, "x": x}, torch.float32).backward(upstream)
        grads.append(x.grad)
    assert torch.equal(*grads)


def test_refuses_what_it_cannot_do():
    case = excite_norm_act_add(2, 4, 3, 3)
    good = {**case.make(DEVICE, torch.float32), **case.options}

    def call(**changed):
        return fused.excite_norm_act_add(**{**good, **changed})

    with pytest.raises(ValueError, match=r"gate must be \[2, 4\]"):
        call(gate=torch.ones(2, 5, device=DEVICE))
    with pytest.raises(TypeError, match="gate must be float32"):
        call(gate=torch.ones(2, 4, device=DEVICE, dtype=torch.float16))
    with pytest.raises(ValueError, match="residual must be"):
        call(residual=good["residual"][:1])
    with pytest.raises(TypeError, match="residual must be float32"):
        call(residual=good["residual"].half())
    with pytest.raises(ValueError, match="more than 1 value"):
        call(x=good["x"][:1, :, :1, :1].contiguous(memory_format=torch.channels_last), gate=None, residual=None)
    with pytest.raises(ValueError, match="evaluation mode needs"):
        call(running_mean=None, running_var=None, training=False)
    with pytest.raises(TypeError, match="running_mean must be float32"):
        call(running_mean=good["running_mean"].double())
