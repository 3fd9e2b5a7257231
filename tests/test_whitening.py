"""Whitening statistics against explicit loops, and what the filters do to the patches they were made from."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from blink.kernels import whitening
from blink.kernels.whitening import PatchMoments, patch_moments, whitening_weight
from blink.model.backend import reference
from blink.model.layers import NormAct, ProjectedStem, WhitenStem
from blink.model.whitening import initialize_stem
from tests.small import random_images

MEAN, STD = torch.tensor([0.49, 0.3, 0.6]), torch.tensor([0.25, 0.1, 0.3])
kernels = pytest.mark.parametrize("kernel", [2, 3], ids=["2x2", "3x3"])


def direct_moments(images, kernel):
    """Count, sum and sum of products of pixel - 128 over all patches, in int64, position by position."""
    q = images.numpy().astype(np.int64) - 128
    count, height, width, channels = q.shape
    dim = channels * kernel**2
    first, second, patches = np.zeros(dim, np.int64), np.zeros((dim, dim), np.int64), 0
    for y in range(height - kernel + 1):
        for x in range(width - kernel + 1):
            patch = q[:, y : y + kernel, x : x + kernel].transpose(0, 3, 1, 2).reshape(count, dim)
            first += patch.sum(0)
            second += patch.T @ patch
            patches += count
    return patches, first, second


def assert_moments(moments: PatchMoments, images, kernel):
    count, first, second = direct_moments(images, kernel)
    assert moments.count == count
    assert moments.first.dtype == moments.second.dtype == torch.int64
    np.testing.assert_array_equal(moments.first.numpy(), first)
    np.testing.assert_array_equal(moments.second.numpy(), second)


@given(st.integers(1, 5), st.integers(3, 9), st.integers(3, 9), st.sampled_from([2, 3]), st.integers(0, 1000))
@settings(deadline=None, max_examples=25)
def test_moments_equal_explicit_loops(count, height, width, kernel, seed):
    images = random_images(count, height, width, seed)
    assert_moments(patch_moments(images, kernel), images, kernel)


@kernels
def test_moments_in_chunks_with_a_partial_last_one(monkeypatch, kernel):
    images = random_images(7, 5, 6)
    of_an_image = (6 - kernel) * (7 - kernel) * 3 * kernel**2 * 4
    monkeypatch.setattr(whitening, "_CHUNK_BYTES", 2 * of_an_image + 3)
    assert_moments(patch_moments(images, kernel), images, kernel)
    monkeypatch.setattr(whitening, "_CHUNK_BYTES", 1)
    assert_moments(patch_moments(images, kernel), images, kernel)


@pytest.mark.parametrize(
    "shape", [(33, 33), (33, 34), (64, 40)], ids=["1024 positions: float32", "1056: float64", "2457: float64"]
)
@pytest.mark.parametrize("value", [0, 255, None], ids=["black", "white", "random near black"])
def test_moments_stay_exact_at_the_largest_sums(shape, value):
    images = torch.full((2, *shape, 3), value or 0, dtype=torch.uint8)
    if value is None:
        images += (random_images(2, *shape) < 4).to(torch.uint8)
    assert_moments(patch_moments(images, 2), images, 2)


class Calls(TorchDispatchMode):
    """Notes the operators that compute, each of which is a launch or a few on a GPU, and their results' bytes."""

    def __init__(self):
        super().__init__()
        self.names, self.bytes = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and not func.is_view:
            self.names.append(func._schema.name)
            self.bytes.append(out.nbytes)
        return out


@kernels
@pytest.mark.parametrize("side", [16, 40], ids=["float32", "float64"])
def test_calls_grow_with_the_chunks_only_and_memory_with_nothing(kernel, side, monkeypatch):
    calls = {}
    of_an_image = (side + 1 - kernel) ** 2 * 3 * kernel**2 * (4 if side == 16 else 8)
    monkeypatch.setattr(whitening, "_CHUNK_BYTES", 8 * of_an_image)
    for images in (1, 8, 16):
        with Calls() as calls[images]:
            patch_moments(torch.zeros(images, side, side, 3, dtype=torch.uint8), kernel)
        # on a GPU it launches a kernel an image
        assert "aten::im2col" not in calls[images].names
        assert max(calls[images].bytes) <= 8 * of_an_image
    one, full, two = (len(calls[images].names) for images in (1, 8, 16))
    assert one == full and two < 2 * full <= 30


@kernels
def test_single_patch(kernel):
    images = random_images(1, kernel, kernel)
    assert_moments(patch_moments(images, kernel), images, kernel)


def normalized(images, mean=MEAN, std=STD):
    return ((images.double() / 255 - mean.double()) / std.double()).permute(0, 3, 1, 2)


def all_patches(images, kernel):
    """Every patch of the normalized images as a row, float64."""
    return F.unfold(normalized(images), kernel).mT.reshape(-1, 3 * kernel**2)


@kernels
def test_normalized_moments_equal_those_of_the_normalized_patches(kernel):
    images = random_images(6, 9, 7)
    mean, covariance = patch_moments(images, kernel).normalized(MEAN, STD)
    patches = all_patches(images, kernel)
    torch.testing.assert_close(mean, patches.mean(0), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(covariance, patches.T.cov(correction=0), rtol=1e-6, atol=1e-6)


def whiten(images, weight):
    """The filters' outputs, one row per position, float64."""
    return F.conv2d(normalized(images), weight.double()).movedim(1, -1).flatten(0, -2)


@kernels
@pytest.mark.parametrize("eps", [0.0, 1e-2, 0.5])
def test_whitened_patches_have_the_promised_covariance(kernel, eps):
    images = random_images(40, 9, 7)
    moments = patch_moments(images, kernel)
    weight = whitening_weight(moments, MEAN, STD, eps)
    assert weight.shape == (3 * kernel**2, 3, kernel, kernel) and weight.dtype == torch.float32
    eigenvalues = torch.linalg.eigvalsh(all_patches(images, kernel).T.cov(correction=0)).flip(0)
    assert eigenvalues[-1] > 0.01
    covariance = whiten(images, weight).T.cov(correction=0)
    torch.testing.assert_close(covariance, torch.diag(eigenvalues / (eigenvalues + eps)), rtol=0, atol=1e-5)
    if eps == 0:
        torch.testing.assert_close(covariance, torch.eye(len(covariance)).double(), rtol=0, atol=1e-5)


@kernels
@pytest.mark.parametrize("eps", [0.0, 1e-2])
def test_uncentred_filters_whiten_the_second_moment(kernel, eps):
    images = random_images(40, 9, 7)
    weight = whitening_weight(patch_moments(images, kernel), MEAN, STD, eps, centered=False)
    patches, outputs = all_patches(images, kernel), whiten(images, weight)
    eigenvalues = torch.linalg.eigvalsh(patches.T @ patches / len(patches)).flip(0)
    expected = torch.diag(eigenvalues / (eigenvalues + eps))
    torch.testing.assert_close(outputs.T @ outputs / len(outputs), expected, rtol=0, atol=1e-5)
    centred = whitening_weight(patch_moments(images, kernel), MEAN, STD, eps)
    assert not torch.allclose(weight, centred, atol=1e-2)


@kernels
def test_filters_are_ordered_and_signed_one_way(kernel):
    images = random_images(20, 9, 9)
    # smooth in one direction, so that the eigenvalues are far apart
    images = ((images.int() + images.roll(1, 2).int() * 3) // 4).to(torch.uint8)
    moments = patch_moments(images, kernel)
    filters = whitening_weight(moments, MEAN, STD, eps=0.0).flatten(1).double()
    scale = 1 / filters.square().sum(1)
    assert (scale[:-1] >= scale[1:]).all(), "descending eigenvalues"
    largest = filters.gather(1, filters.abs().argmax(1, keepdim=True))
    assert (largest > 0).all()
    directions = filters / filters.norm(dim=1, keepdim=True)
    identity = torch.eye(len(directions)).double()
    torch.testing.assert_close(directions @ directions.T, identity, rtol=0, atol=1e-5)
    again = whitening_weight(moments, MEAN, STD, eps=0.0).flatten(1).double()
    assert torch.equal(filters, again)


@kernels
def test_order_of_the_images_does_not_matter(kernel, monkeypatch):
    images = random_images(9, 8, 8)
    weight = whitening_weight(patch_moments(images, kernel), MEAN, STD, 1e-2)
    monkeypatch.setattr(whitening, "_CHUNK_BYTES", 2 * 49 * 12 * 4)
    shuffled = patch_moments(images[torch.from_numpy(np.random.RandomState(1).permutation(9))], kernel)
    assert torch.equal(whitening_weight(shuffled, MEAN, STD, 1e-2), weight)


def test_constant_images_give_zero_filters():
    images = torch.full((3, 5, 5, 3), 77, dtype=torch.uint8)
    for centered in (True, False):
        weight = whitening_weight(patch_moments(images, 2), MEAN, STD, 1e-2, centered)
        assert torch.equal(weight, torch.zeros(12, 3, 2, 2))


def test_a_direction_of_little_variance_keeps_its_filter():
    """Blue is red but for one level in every hundredth pixel: 1e-3 of its deviation is still something to see."""
    images = random_images(40, 9, 7)
    images[..., 2] = images[..., 0] ^ (torch.rand(40, 9, 7) < 0.01).to(torch.uint8)
    std = STD[[0, 1, 0]]
    weight = whitening_weight(patch_moments(images, 2), MEAN, std, eps=0.0)
    covariance = F.conv2d(normalized(images, MEAN, std), weight.double()).movedim(1, -1).flatten(0, -2).T.cov()
    torch.testing.assert_close(covariance.diag(), torch.ones(12).double(), rtol=1e-3, atol=0)


def make_stem(kernel, padding):
    backend = reference()
    return ProjectedStem(3, 4, kernel, padding, NormAct(4, 0.8, 1e-12, "gelu", backend), backend)


@kernels
@pytest.mark.parametrize("padding", [0, "same"], ids=["unpadded", "same"])
@pytest.mark.parametrize("centered", [True, False], ids=["centred", "uncentred"])
def test_initialize_stem_sets_filters_and_statistics(kernel, padding, centered):
    images = random_images(5, 8, 9)
    stem = make_stem(kernel, padding)
    project = stem.project.weight.detach().clone()
    initialize_stem(stem, images, MEAN, STD, 1e-2, centered)
    # the statistics are of whole patches, whether or not the convolution is padded
    expected = whitening_weight(patch_moments(images, kernel), MEAN, STD, 1e-2, centered)
    assert torch.equal(stem.whiten.weight, expected)
    assert torch.equal(stem.mean, MEAN) and torch.equal(stem.std, STD)
    assert torch.equal(stem.project.weight, project)
    assert not stem.whiten.weight.requires_grad
    side = (8, 9) if padding == "same" else (9 - kernel, 10 - kernel)
    assert stem(images.permute(0, 3, 1, 2), None, torch.float32).shape == (5, 4, *side)


def test_a_stem_of_twice_the_filters_gets_their_negatives():
    images = random_images(5, 8, 9)
    stem = WhitenStem(3, 2, 0, "gelu", reference())
    initialize_stem(stem, images, MEAN, STD, 1e-2)
    expected = whitening_weight(patch_moments(images, 2), MEAN, STD, 1e-2)
    assert torch.equal(stem.whiten.weight, torch.cat([expected, -expected]))
    assert stem.bias.abs().max() <= 12**-0.5 and stem.bias.std() > 0.1


@pytest.mark.parametrize(
    ("shape", "kernel"),
    [((0, 8, 8, 3), 2), ((2, 1, 8, 3), 2), ((2, 8, 2, 3), 3)],
    ids=["no image", "too low", "too narrow"],
)
def test_no_patch_is_an_error(shape, kernel):
    with pytest.raises(ValueError, match=f"hold no {kernel}x{kernel} patch"):
        patch_moments(torch.zeros(shape, dtype=torch.uint8), kernel)
