"""norm_act: fused against the float64 reference."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from blink import kernels
from blink.kernels.examine.cases import norm_act
from tests.oracle import DEVICE, DTYPES, Tolerance, directional_derivative_matches, judge, name_of

# float32: a few roundings a value; 16 bits: one rounding of the result
TOLERANCES = {
    torch.float32: Tolerance(2e-6, 1e-5),
    torch.float16: Tolerance(2**-11 * 1.02, 2**-11 * 1.02),
    torch.bfloat16: Tolerance(2**-8 * 1.02, 2**-8 * 1.02),
}

CASES = [
    norm_act(2, 128, 15, 15),
    norm_act(4, 512, 3, 3),
    norm_act(3, 12, 5, 7, activation="silu"),
    norm_act(2, 80, 3, 3, activation="relu"),
    norm_act(2, 130, 7, 7, activation=None),
    norm_act(5, 6, 1, 1),
    norm_act(2, 24, 7, 7, training=False),
    norm_act(1, 12, 1, 1, training=False),
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
    training=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
def test_any_shape(batch, channels, height, width, training, dtype):
    case = norm_act(batch, channels, height, width, training=training)
    judge(case, dtype, TOLERANCES[dtype].loosened(10), versus_pytorch=False)


def test_directional_derivative():
    directional_derivative_matches(norm_act(2, 3, 3, 4, eps=1e-5))


def test_is_a_batch_norm_module():
    """Without an activation: torch.nn.BatchNorm2d of scale 1, statistics included, in training and evaluation."""
    x = (torch.randn(3, 7, 5, 4, device=DEVICE) * 2 + 1).contiguous(memory_format=torch.channels_last)
    module = torch.nn.BatchNorm2d(7, momentum=0.3).to(DEVICE)
    torch.nn.init.normal_(module.bias)
    own = {
        "bias": module.bias,
        "running_mean": torch.zeros(7, device=DEVICE),
        "running_var": torch.ones(7, device=DEVICE),
    }
    for training in (True, False):
        module.train(training)
        ours = kernels.norm_act(x, **own, training=training, momentum=0.3, activation=None)
        torch.testing.assert_close(ours, module(x), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(own["running_mean"], module.running_mean)
        torch.testing.assert_close(own["running_var"], module.running_var)


def test_without_running_statistics():
    x = torch.randn(2, 5, 3, 3, device=DEVICE).contiguous(memory_format=torch.channels_last)
    bias = torch.randn(5, device=DEVICE)
    want = F.gelu(F.batch_norm(x, None, None, None, bias, True))
    torch.testing.assert_close(kernels.norm_act(x, bias), want, rtol=1e-5, atol=1e-5)


def test_refuses_what_it_cannot_do():
    case = norm_act(2, 4, 3, 3)
    good = {**case.make(DEVICE, torch.float32), **case.options}

    def call(**changed):
        return kernels.norm_act(**{**good, **changed})

    with pytest.raises(ValueError, match=r"norm_act: bias must be \[4\]"):
        call(bias=torch.zeros(5, device=DEVICE))
    with pytest.raises(ValueError, match="norm_act: training needs more than 1 value"):
        call(x=good["x"][:1, :, :1, :1].contiguous(memory_format=torch.channels_last))
    with pytest.raises(ValueError, match="norm_act: evaluation mode needs"):
        call(running_mean=None, running_var=None, training=False)
    with pytest.raises(ValueError, match="given together"):
        call(running_var=None)
    with pytest.raises(TypeError, match="norm_act: running_mean must be float32"):
        call(running_mean=good["running_mean"].double())
