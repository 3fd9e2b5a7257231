"""se_gate: fused against the float64 reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blink import kernels
from blink.kernels import fused
from blink.kernels.examine.cases import se_gate
from tests.oracle import DEVICE, DTYPES, Tolerance, directional_derivative_matches, judge, judge_on, name_of

# all arithmetic is float32 whatever the weights' dtype; only gradients of 16-bit weights are rounded to it
TOLERANCES = {
    torch.float32: Tolerance(1e-6, 2e-6),
    torch.float16: Tolerance(1e-6, 2**-11 * 1.01),
    torch.bfloat16: Tolerance(1e-6, 2**-8 * 1.01),
}

CASES = [
    se_gate(33, 128, 8),
    se_gate(5, 512, 32),
    se_gate(1, 17, 4, activation="relu"),
    # values enough that the ratio of two root mean square errors is no luck
    se_gate(6, 21, 7, activation="silu"),
    se_gate(70, 24, 20, activation=None),
    # MobileNetV3's
    se_gate(3, 24, 8, activation="relu", gate_activation="hardsigmoid"),
    se_gate(2, 960, 240, activation="relu", gate_activation="hardsigmoid"),
    # hlb with reduction 4, EfficientNet's and RegNet's widest: hidden units in tiles, the last one in part
    se_gate(3, 512, 128),
    se_gate(2, 1152, 48, activation="silu"),
    se_gate(2, 2000, 500, activation="relu"),
]


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.label)
def test_matches_float64(case, dtype):
    if case is CASES[-1] and dtype == torch.float16 and kernels.interpreting():
        pytest.skip("half a minute in the interpreter, for loads that the other cases have too")
    judge(case, dtype, TOLERANCES[dtype])


@settings(max_examples=12, deadline=None)
@given(st.integers(2, 40), st.integers(4, 100), st.integers(2, 20), st.sampled_from(DTYPES))
def test_any_shape(batch, channels, hidden, dtype):
    judge(se_gate(batch, channels, hidden), dtype, TOLERANCES[dtype].loosened(10), versus_pytorch=False)


def test_directional_derivative():
    directional_derivative_matches(se_gate(4, 6, 3))


def test_saturated_gate_keeps_its_gradient():
    """At a logit of 10 gate (1 - gate) is 4.5e-5; a gate rounded to 16 bits would give 0."""
    case = se_gate(3, 4, 2)
    tensors = case.make(DEVICE, torch.float32)
    tensors["weight2"].zero_()
    tensors["bias2"].fill_(10.0)
    judge_on(case, tensors, torch.float32, Tolerance(1e-6, 1e-3))


def test_weights_as_convolutions():
    case = se_gate(3, 6, 2)
    tensors = case.make(DEVICE, torch.float32)
    want = case.call(fused, tensors, torch.float32)
    tensors |= {name: tensors[name][:, :, None, None].requires_grad_() for name in ("weight1", "weight2")}
    got = case.call(fused, tensors, torch.float32)
    assert torch.equal(got, want)
    got.sum().backward()
    assert tensors["weight1"].grad.shape == (2, 6, 1, 1)


def test_refuses_wrong_shapes():
    good = se_gate(3, 6, 2).make(DEVICE, torch.float32)
    with pytest.raises(ValueError, match=r"squeeze must be \[B, C\]"):
        fused.se_gate(**{**good, "squeeze": torch.randn(3, 6, 1, device=DEVICE)})
    with pytest.raises(ValueError, match=r"weight2 must be \[6, 2\]"):
        fused.se_gate(**{**good, "weight2": torch.randn(5, 2, device=DEVICE)})
    with pytest.raises(ValueError, match=r"bias1 must be \[2\]"):
        fused.se_gate(**{**good, "bias1": torch.randn(3, device=DEVICE)})
    with pytest.raises(TypeError, match="squeeze must be"):
        fused.se_gate(**{**good, "squeeze": torch.ones(3, 6, dtype=torch.int64, device=DEVICE)})
