"""whiten_project_norm_act: fused against the float64 reference."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from blink import kernels
from blink.kernels.examine.cases import whiten_project_norm_act
from tests.oracle import DEVICE, DTYPES, Tolerance, directional_derivative_matches, judge, judge_on, name_of, run

# float32: exact statistics, so what is left is a 12- to 27-term sum; 16 bits: one rounding of the result;
# gradients are float32 sums over all positions, for 16-bit results of g in two float16 halves (2^-22 of its maximum),
# and 16-bit project weights get their gradient rounded once to their dtype
TOLERANCES = {
    torch.float32: Tolerance(1e-6, 2e-6),
    torch.float16: Tolerance(2**-11 * 1.01, 2**-11 * 1.02),
    torch.bfloat16: Tolerance(2**-8 * 1.01, 2**-8 * 1.02),
}

CASES = [
    whiten_project_norm_act(2, 32, 32, 32),
    whiten_project_norm_act(1, 5, 9, 5, activation="silu"),
    whiten_project_norm_act(3, 8, 7, 80, kernel=3, activation="relu"),
    whiten_project_norm_act(2, 6, 5, 12, image_channels=1, activation=None),
    whiten_project_norm_act(2, 6, 5, 24, image_channels=4),
    whiten_project_norm_act(2, 32, 32, 32, training=False),
    whiten_project_norm_act(1, 2, 2, 3, training=False, activation=None),
]


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.label)
def test_matches_float64(case, dtype):
    judge(case, dtype, TOLERANCES[dtype])


@settings(max_examples=8, deadline=None)
@given(
    batch=st.integers(1, 3),
    height=st.integers(4, 10),
    width=st.integers(4, 10),
    channels=st.integers(4, 24),
    kernel=st.sampled_from([2, 3]),
    training=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
def test_any_shape(batch, height, width, channels, kernel, training, dtype):
    # random projections of few patches can leave a channel almost no variance, whose rounding the eps then bounds
    case = whiten_project_norm_act(batch, height, width, channels, kernel, training=training, eps=1e-2)
    judge(case, dtype, TOLERANCES[dtype].loosened(10), versus_pytorch=False)


def test_directional_derivative():
    directional_derivative_matches(whiten_project_norm_act(2, 5, 4, 3, eps=1e-3))


def test_without_running_statistics():
    case = whiten_project_norm_act(2, 5, 6, 4)
    tensors = case.make(DEVICE, torch.float32)
    want = case.call(kernels, dict(tensors), torch.float32)
    tensors["running_mean"] = tensors["running_var"] = None
    assert torch.equal(case.call(kernels, tensors, torch.float32), want)


def test_gradient_is_orthogonal_to_the_projection():
    """BatchNorm removes the scale of each projected channel, so <W2_j, dW2_j> = 0."""
    case = whiten_project_norm_act(2, 12, 12, 6)
    tensors = case.make(DEVICE, torch.float32)
    grads = run(case, kernels, tensors, torch.float32, torch.randn(2, 6, 11, 11, device=DEVICE))
    along = (grads["dproject_weight"] * tensors["project_weight"]).sum((1, 2, 3))
    size = grads["dproject_weight"].norm() * tensors["project_weight"].norm()
    assert along.abs().max() <= 1e-6 * size


def test_statistics_of_nearly_equal_pixels_are_exact():
    """Images of 200 and 201 only: the variance is 1e-5 of the squared mean, and nothing of it is lost."""
    case = whiten_project_norm_act(4, 9, 9, 8, eps=1e-12)
    tensors = case.make(DEVICE, torch.float32)
    tensors["images"] = (200 + torch.randint(0, 2, (4, 9, 9, 3), dtype=torch.uint8)).permute(0, 3, 1, 2).to(DEVICE)
    # pixels of 72 +- 0.5 around the shift: z is a float32 difference of numbers 100 times its size
    judge_on(case, tensors, torch.float32, Tolerance(3e-5, 1e-4))


def test_constant_images():
    """No variance at all: the output is act(bias), within float32's rounding times 1 / sqrt(eps)."""
    case = whiten_project_norm_act(2, 5, 5, 4, eps=1e-5)
    tensors = case.make(DEVICE, torch.float32)
    tensors["images"].fill_(77)
    y = case.call(kernels, tensors, torch.float32)
    want = F.gelu(tensors["bias"].double())[None, :, None, None].expand_as(y)
    assert (y.double() - want).abs().max() <= 5e-3


def test_project_weight_as_a_matrix():
    case = whiten_project_norm_act(2, 5, 5, 4)
    tensors = case.make(DEVICE, torch.float32)
    want = case.call(kernels, {**tensors}, torch.float32)
    tensors["project_weight"] = tensors["project_weight"].flatten(1)
    assert torch.equal(case.call(kernels, tensors, torch.float32), want)


def test_refuses_what_it_cannot_do():
    case = whiten_project_norm_act(1, 4, 4, 3)
    good = {**case.make(DEVICE, torch.float32), **case.options}

    def call(**changed):
        return kernels.whiten_project_norm_act(**{**good, **changed})

    with pytest.raises(ValueError, match="whiten_weight gets no gradient"):
        call(whiten_weight=good["whiten_weight"].clone().requires_grad_())
    with pytest.raises(TypeError, match="uint8"):
        call(images=good["images"].float().contiguous(memory_format=torch.channels_last))
    with pytest.raises(ValueError, match="given together"):
        call(running_var=None)
    with pytest.raises(ValueError, match="evaluation mode needs"):
        call(running_mean=None, running_var=None, training=False)
    with pytest.raises(ValueError, match="more than 1 value"):
        call(images=good["images"][:, :, :2, :2].contiguous(memory_format=torch.channels_last))
    with pytest.raises(ValueError, match="project_weight must be"):
        call(project_weight=torch.randn(3, 5, 1, 1, device=DEVICE))
