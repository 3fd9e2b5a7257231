"""whiten: fused against the float64 reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blink import kernels
from blink.kernels import fused
from blink.kernels.examine.cases import whiten
from tests.oracle import DEVICE, DTYPES, Tolerance, directional_derivative_matches, judge, name_of

# float32: rounding of a 12- to 27-term sum; 16 bits: one rounding of the result, products being float32 throughout;
# the bias gradient is a float32 sum over all positions in every dtype
TOLERANCES = {
    torch.float32: Tolerance(1e-6, 2e-6),
    torch.float16: Tolerance(2**-11 * 1.01, 3e-6),
    torch.bfloat16: Tolerance(2**-8 * 1.01, 3e-6),
}

CASES = [
    whiten(2, 32, 32, 24),
    whiten(1, 2, 2, 1, activation=None),
    whiten(1, 5, 9, 12, activation="silu"),
    whiten(3, 8, 7, 27, kernel=3, activation="relu"),
    whiten(2, 7, 6, 12, bias=False),
    whiten(2, 6, 5, 80, image_channels=1),
    whiten(2, 6, 5, 16, image_channels=4, activation=None),
]


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.label)
def test_matches_float64(case, dtype):
    if not case.differentiable:
        tensors = case.make(DEVICE, dtype)
        y = case.call(fused, tensors, dtype)
        want = case.call(kernels.reference, {k: v.double() if v is not None and v.is_floating_point() else v
                                             for k, v in tensors.items()}, torch.float64)  # fmt: skip
        assert (y.double() - want).abs().max() <= TOLERANCES[dtype].forward * want.abs().max()
        assert not y.requires_grad
        return
    judge(case, dtype, TOLERANCES[dtype])


@settings(max_examples=12, deadline=None)
@given(
    batch=st.integers(1, 3),
    height=st.integers(3, 12),
    width=st.integers(3, 12),
    filters=st.integers(4, 40),
    kernel=st.sampled_from([2, 3]),
    dtype=st.sampled_from(DTYPES),
)
def test_any_shape(batch, height, width, filters, kernel, dtype):
    judge(whiten(batch, height, width, filters, kernel), dtype, TOLERANCES[dtype].loosened(10), versus_pytorch=False)


def test_directional_derivative():
    directional_derivative_matches(whiten(2, 4, 5, 3))


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_normalized_images(dtype):
    """Floating images are taken as they are, without mean and std."""
    images = torch.randn(2, 3, 6, 5, device=DEVICE).to(dtype).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(12, 3, 2, 2, device=DEVICE)
    bias = torch.randn(12, device=DEVICE, requires_grad=True)
    y = fused.whiten(images, weight, bias, activation="gelu")
    want = kernels.reference.whiten(images.double(), weight, bias, activation="gelu")
    assert y.dtype == dtype
    assert (y.double() - want).abs().max() <= TOLERANCES[dtype].forward * want.abs().max()
    (grad,) = torch.autograd.grad(y.double().sum(), bias)
    (want_grad,) = torch.autograd.grad(want.sum(), bias)
    assert (grad - want_grad).abs().max() <= 1e-5 * want_grad.abs().max()


@pytest.mark.parametrize("level", [0, 255])
def test_extreme_pixels(level):
    """A constant black or white image: the fold keeps float32 accuracy at both ends of the pixel range."""
    case = whiten(1, 4, 4, 12, activation=None)
    tensors = case.make(DEVICE, torch.float32)
    tensors["images"].fill_(level)
    y = case.call(fused, tensors, torch.float32)
    exact = {k: v.double() if v.is_floating_point() else v for k, v in tensors.items()}
    want = case.call(kernels.reference, exact, torch.float64)
    assert (y.double() - want).abs().max() <= 1e-6 * want.abs().max()


def test_refuses_what_it_cannot_do():
    case = whiten(1, 4, 4, 3)
    good = case.make(DEVICE, torch.float32)

    def call(**changed):
        return fused.whiten(**{**good, **changed})

    with pytest.raises(ValueError, match="no gradient"):
        call(weight=good["weight"].clone().requires_grad_())
    normalized = good["images"].float().contiguous(memory_format=torch.channels_last)
    for whitened in (fused.whiten, kernels.reference.whiten):
        with pytest.raises(ValueError, match="need both; found uint8 images"):
            whitened(**{**good, "mean": None, "std": None})
        with pytest.raises(ValueError, match="need both; found normalized images"):
            whitened(**{**good, "images": normalized})
    with pytest.raises(ValueError, match="hold no 3x3 patch"):
        call(images=good["images"][:, :, :2].contiguous(memory_format=torch.channels_last),
             weight=torch.randn(3, 3, 3, 3, device=DEVICE))  # fmt: skip
    with pytest.raises(ValueError, match=r"weight must be \[O, 3, k, k\]"):
        call(weight=torch.randn(3, 1, 2, 2, device=DEVICE))
    with pytest.raises(ValueError, match=r"bias must be \[3\]"):
        call(bias=torch.zeros(4, device=DEVICE))
