"""Small images laid side by side: the same convolution and gradients, and choices that are kept."""

import json

import pytest
import torch

from blink.model import native_convolution
from blink.model.native_convolution import Choices, apart, conv3x3, side_by_side


class Always:
    def __init__(self, group: int):
        self.group = lambda call, images, rest=(): group


def judged(group: int, batch: int, dtype: torch.dtype, monkeypatch) -> tuple[torch.Tensor, ...]:
    monkeypatch.setattr(native_convolution, "_choices", lambda: Always(group))
    x = torch.randn(batch, 5, 3, 4).to(dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
    weight = torch.randn(7, 5, 3, 3).contiguous(memory_format=torch.channels_last).requires_grad_()
    y = conv3x3(x, weight)
    dy = torch.randn(y.shape).to(dtype)
    grads = torch.autograd.grad(y, (x, weight), dy)
    assert (y.dtype, *(g.dtype for g in grads)) == (dtype, dtype, torch.float32)
    assert y.is_contiguous(memory_format=torch.channels_last)
    exact = [t.detach().to(dtype).double().requires_grad_() for t in (x, weight)]
    want = torch.nn.functional.conv2d(*exact, padding=1)
    truth = (want, *torch.autograd.grad(want, exact, dy.double()))
    for ours, true in zip((y, *grads), truth):
        assert (ours.double() - true).abs().max() <= (1e-5 if dtype == torch.float32 else 1e-2) * true.abs().max()
    return y, *grads


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("group, batch", [(1, 6), (4, 8), (8, 8), (16, 32)])
@pytest.mark.usefixtures("poisoned_memory")
def test_values_and_gradients_are_the_convolutions(group, batch, dtype, monkeypatch):
    judged(group, batch, dtype, monkeypatch)


def test_images_come_apart_again():
    x = torch.randn(8, 3, 2, 5).contiguous(memory_format=torch.channels_last)
    for group in (2, 8):
        together = side_by_side(x, group)
        assert together.shape == (8 // group, 3, 2, group * 6) and not together[..., 5::6].any()
        assert torch.equal(apart(together, group), x)


@pytest.fixture
def counted(tmp_path, monkeypatch):
    """Measurements, which choose 8; they are kept in a folder of the test's own."""
    asked = []
    monkeypatch.setenv("BLINK_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
    monkeypatch.setattr(native_convolution, "_fastest", lambda call, groups, *rest: asked.append(groups) or 8)
    return asked


def operands(batch: int = 64, width: int = 5) -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
    """(dy, x), and the weight"""
    x = torch.zeros(batch, 256, 5, width).contiguous(memory_format=torch.channels_last)
    return (x, x.clone()), torch.zeros(256, 256, 3, 3)


def test_a_shape_is_measured_once_and_its_choice_kept(counted, tmp_path):
    call = native_convolution._weight_gradient
    choices = Choices()
    assert [choices.group(call, *operands()) for _ in range(2)] == [8, 8] and counted == [[4, 8, 16]]
    assert Choices().group(call, *operands()) == 8 and len(counted) == 1
    # a batch that 16 does not divide has other candidates
    assert choices.group(call, *operands(72)) == 8 and counted[1:] == [[4, 8]]
    (file,) = (tmp_path / "native").glob("convolutions-*.json")
    assert set(json.loads(file.read_text()).values()) == {8}
    for damage in ("{", "[1]", '{"key": "x"}'):
        file.write_text(damage)
        assert Choices().group(call, *operands()) == 8
    assert len(counted) == 5


def test_nothing_is_measured_where_nothing_is_gained_or_runs_must_repeat(counted, monkeypatch):
    choices, call = Choices(), native_convolution._weight_gradient
    assert choices.group(call, *operands(width=9)) == 1  # wide
    assert choices.group(call, *operands(63)) == 1  # odd
    assert choices.group(call, *operands(4)) == 1  # little work
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    assert choices.group(call, *operands()) == 1 and not counted


def test_a_measurement_takes_the_fastest_that_gains_enough(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(native_convolution.time, "perf_counter", lambda: clock[0])
    seconds = {1: 1.0, 4: 0.8, 8: 0.5, 16: 0.6}

    def call(group, *tensors):
        *images, _ = tensors
        assert all(len(t) == 128 for t in images)
        clock[0] += seconds[group]

    images = (torch.zeros(200, 1, 1, 1),)
    assert native_convolution._fastest(call, [4, 8, 16], images, torch.zeros(1)) == 8
    seconds.update({4: 0.97, 8: 0.96, 16: 2.0})
    assert native_convolution._fastest(call, [4, 8, 16], images, torch.zeros(1)) == 1


@pytest.mark.parametrize("leaf", ["x", "weight"])
def test_second_derivative_is_a_clear_error(leaf):
    arguments = {"x": torch.randn(2, 3, 4, 4), "weight": torch.randn(5, 3, 3, 3)}
    value = arguments[leaf].requires_grad_()
    (grad,) = torch.autograd.grad(conv3x3(**arguments).sum(), value, create_graph=True)
    with pytest.raises(RuntimeError, match=r"conv3x3 is differentiable once.*use plain_conv3x3"):
        grad.square().sum().backward()
