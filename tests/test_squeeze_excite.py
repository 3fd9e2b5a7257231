"""squeeze_excite: fused against the float64 reference; the layer over it is in test_squeeze_excitation.py."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blink import kernels
from blink.kernels import fused
from blink.kernels.examine.cases import squeeze_excite
from blink.kernels.launching import captured_launches
from tests.oracle import DEVICE, DTYPES, Tolerance, directional_derivative_matches, judge, name_of

# float32: sums of H * W values; 16 bits: one rounding of the result, the gate being float32 throughout
TOLERANCES = {
    torch.float32: Tolerance(1e-6, 3e-6),
    torch.float16: Tolerance(2**-11 * 1.02, 2**-11 * 1.02),
    torch.bfloat16: Tolerance(2**-8 * 1.02, 2**-8 * 1.02),
}

CASES = [
    squeeze_excite(3, 128, 15, 15, 8, activation="gelu"),
    squeeze_excite(2, 512, 3, 3, 32, activation="gelu"),
    squeeze_excite(1, 17, 5, 7, 1),
    squeeze_excite(2, 80, 9, 4, 20, activation="silu"),
    squeeze_excite(3, 12, 1, 1, 3, activation=None),
    # MobileNetV3's
    squeeze_excite(2, 16, 5, 4, 8, gate_activation="hardsigmoid"),
    squeeze_excite(1, 72, 3, 3, 24, activation="hardswish", gate_activation="hardsigmoid"),
    # EfficientNet's and RegNet's widest
    squeeze_excite(1, 1152, 3, 3, 48, activation="silu"),
    squeeze_excite(1, 2000, 2, 3, 500),
]
# few and large, so that each is cut into parts, the last a smaller one
LARGE = squeeze_excite(2, 40, 61, 60, 10, activation="silu")


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.label)
def test_matches_float64(case, dtype):
    if case is CASES[-1] and dtype == torch.float16 and kernels.interpreting():
        pytest.skip("half a minute in the interpreter, for loads that the other cases have too")
    judge(case, dtype, TOLERANCES[dtype])


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_large_images_match_float64(dtype):
    with captured_launches() as launches:
        LARGE.call(fused, LARGE.make(torch.device("cpu"), dtype), dtype)
    assert [launch.kernel.__name__ for launch in launches] == ["_parts_kernel", "_fwd_kernel"]
    assert launches[0].grid == launches[1].grid and launches[0].grid[1] >= 4
    judge(LARGE, dtype, TOLERANCES[dtype])


@settings(max_examples=10, deadline=None)
@given(
    st.integers(2, 3), st.integers(4, 60), st.integers(1, 9), st.integers(1, 9), st.integers(2, 20),
    st.sampled_from(DTYPES),
)  # fmt: skip
def test_any_shape(batch, channels, height, width, hidden, dtype):
    judge(
        squeeze_excite(batch, channels, height, width, hidden, activation="gelu"),
        dtype,
        TOLERANCES[dtype].loosened(10),
        versus_pytorch=False,
    )


def test_directional_derivative():
    directional_derivative_matches(squeeze_excite(2, 4, 3, 3, 2, activation="gelu"))


def test_whiten_layer():
    """The layer holds weight, mean and std as buffers and trains its bias only."""
    weight = torch.randn(12, 3, 2, 2)
    layer = kernels.Whiten(weight, torch.full((3,), 0.4), torch.full((3,), 0.2)).to(DEVICE)
    images = torch.randint(0, 256, (2, 3, 6, 6), dtype=torch.uint8, device=DEVICE)
    layer(images).sum().backward()
    assert [name for name, _ in layer.named_parameters()] == ["bias"]
    assert set(layer.state_dict()) == {"weight", "mean", "std", "bias"}
    want = kernels.reference.whiten(
        images, layer.weight.double(), layer.bias.double(), mean=layer.mean, std=layer.std, activation="gelu"
    )
    torch.testing.assert_close(layer(images).double(), want, rtol=1e-5, atol=1e-5)
    assert layer.bias.grad.isfinite().all()
