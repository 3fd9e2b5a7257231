"""The native convolution, each way: the same convolution and gradients, and choices that are kept."""

import json

import pytest
import torch

from blink.kernels.environment import cpu_flags
from blink.kernels.native import matrix_units, winograd
from blink.model import native_convolution
from blink.model.native_convolution import (
    Choices,
    _input_gradient,
    _weight_gradient,
    apart,
    conv3x3,
    side_by_side,
)

# of the largest value: what float32 loses in the sums of a tile of 4 x 4, the largest of many values
_WINOGRADS = 3e-5


class Always:
    def __init__(self, way: int | str):
        self.way = lambda call, images, rest=(): way


def judged(way: int | str, shape: tuple[int, ...], outputs: int, dtype: torch.dtype, monkeypatch):
    monkeypatch.setattr(native_convolution, "_choices", lambda: Always(way))
    x = torch.randn(shape).to(dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
    weight = torch.randn(outputs, shape[1], 3, 3).contiguous(memory_format=torch.channels_last).requires_grad_()
    y = conv3x3(x, weight)
    dy = torch.randn(y.shape).to(dtype).contiguous(memory_format=torch.channels_last)
    grads = torch.autograd.grad(y, (x, weight), dy)
    assert (y.dtype, *(g.dtype for g in grads)) == (dtype, dtype, torch.float32)
    assert y.is_contiguous(memory_format=torch.channels_last)
    exact = [t.detach().to(dtype).double().requires_grad_() for t in (x, weight)]
    want = torch.nn.functional.conv2d(*exact, padding=1)
    truth = (want, *torch.autograd.grad(want, exact, dy.double()))
    for ours, true in zip((y, *grads), truth):
        bound = 1e-2 if dtype == torch.bfloat16 else _WINOGRADS if way == "winograd" else 1e-5
        assert (ours.double() - true).abs().max() <= bound * true.abs().max()
    return y, *grads, *truth


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("way, batch", [(1, 6), (4, 8), (8, 8), (16, 32)])
@pytest.mark.usefixtures("poisoned_memory")
def test_values_and_gradients_are_the_convolutions(way, batch, dtype, monkeypatch):
    judged(way, (batch, 5, 3, 4), 7, dtype, monkeypatch)


# sizes of tiles that fit and do not, 2, 3 and 4; channels that fill vectors and do not; more tiles than a block
_SHAPES = [
    ((3, 8, 4, 4), 16), ((2, 5, 7, 9), 7), ((5, 3, 1, 1), 4), ((4, 8, 2, 2), 8), ((3, 17, 3, 3), 40),
    ((2, 30, 5, 6), 1), ((2, 1, 6, 3), 50), ((2, 24, 31, 31), 64), ((40, 8, 11, 13), 24), ((3, 100, 15, 15), 33),
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape, outputs", _SHAPES, ids=str)
@pytest.mark.usefixtures("poisoned_memory")
def test_winograds_are_the_convolutions_but_for_the_rounding(shape, outputs, dtype, monkeypatch):
    y, dx, dweight, *truth = judged("winograd", shape, outputs, dtype, monkeypatch)
    # half a unit in the last place of what is rounded, and float32's error
    rounding = 2**-8 if dtype == torch.bfloat16 else 0
    for ours, true in zip((y, dx), truth):
        assert ((ours.double() - true).abs() <= rounding * true.abs() + _WINOGRADS * true.abs().max()).all()
    assert (dweight.double() - truth[2]).abs().max() <= _WINOGRADS * truth[2].abs().max()


@pytest.mark.parametrize("size", [3, 7, 15])
def test_winograds_error_is_a_few_of_float32s(size):
    x, weight = (
        torch.randn(4, 256, size, size).contiguous(memory_format=torch.channels_last),
        torch.randn(256, 256, 3, 3),
    )
    dy = torch.randn(4, 256, size, size).contiguous(memory_format=torch.channels_last)
    exact = [t.double().requires_grad_() for t in (x, weight)]
    truth = torch.nn.functional.conv2d(*exact, padding=1)
    truths = (truth.detach(), *torch.autograd.grad(truth, exact, dy.double()))
    ours = (
        winograd.convolve(x, weight), winograd.input_gradient(dy, x, weight), winograd.weight_gradient(dy, x, weight)
    )  # fmt: skip
    for own, true in zip(ours, truths):
        assert (own.double() - true).square().mean() <= (4e-6) ** 2 * true.square().mean()


def test_winograds_bits_do_not_depend_on_the_threads(monkeypatch):
    x = torch.randn(9, 20, 13, 13).bfloat16().contiguous(memory_format=torch.channels_last)
    dy = torch.randn(9, 35, 13, 13).bfloat16().contiguous(memory_format=torch.channels_last)
    weight, found, before = torch.randn(35, 20, 3, 3).bfloat16(), [], torch.get_num_threads()
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        try:
            found.append((winograd.convolve(x, weight), winograd.weight_gradient(dy, x, weight)))
        finally:
            torch.set_num_threads(before)
    for results in found[1:]:
        assert all(map(torch.equal, results, found[0]))


# one image and several of a line, rows longer than one; channels that fill tiles and do not, blocks even and odd
_LINES = [*_SHAPES, ((2, 16, 3, 400), 16), ((7, 33, 7, 7), 129), ((1, 1, 1, 1), 1), ((70, 48, 2, 3), 48)]


@pytest.mark.parametrize("shape, outputs", _LINES, ids=str)
@pytest.mark.usefixtures("poisoned_memory")
def test_matrix_units_gradient_is_the_convolutions(shape, outputs):
    if "amx_bf16" in cpu_flags() and not matrix_units.available():
        pytest.skip("the system keeps the matrix units from this process")
    x = torch.randn(shape).bfloat16().contiguous(memory_format=torch.channels_last)
    dy = torch.randn(shape[0], outputs, *shape[2:]).bfloat16().contiguous(memory_format=torch.channels_last)
    weight = torch.zeros(outputs, shape[1], 3, 3, dtype=torch.double, requires_grad=True)
    (true,) = torch.autograd.grad(torch.nn.functional.conv2d(x.double(), weight, padding=1), weight, dy.double())
    ours, before = [], torch.get_num_threads()
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        try:
            ours.append(matrix_units.weight_gradient(dy, x, weight))
        finally:
            torch.set_num_threads(before)
    assert ours[0].dtype == torch.float32 and ours[0].is_contiguous(memory_format=torch.channels_last)
    # products of bfloat16 are exact in float32
    assert (ours[0].double() - true).abs().max() <= 1e-6 * true.abs().max()
    assert all(torch.equal(ours[0], other) for other in ours[1:])


def test_matrix_units_take_what_they_can_read_where_there_are_any(monkeypatch):
    x = torch.zeros(2, 3, 4, 5, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    assert not matrix_units.available() or "amx_bf16" in cpu_flags()
    for there in (False, True):
        monkeypatch.setattr(matrix_units, "available", lambda there=there: there)
        assert matrix_units.takes(x, x) == there
        for other in (x.float(), x.contiguous(), x[:0], x[:, :2], x.to("meta"), x[0]):
            assert not matrix_units.takes(x, other)
        ways = [native_convolution._ways(call, (x, x)) for call in (_weight_gradient, _input_gradient)]
        assert ways == ([["matrix_units"], []] if there else [["winograd"], ["winograd"]])


def test_winograds_kernels_take_what_they_can_read():
    x = torch.zeros(2, 3, 4, 5, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    assert winograd.takes(x) and winograd.takes(x, x)
    assert winograd.takes(x.float(), x.float())
    for other in (x.float(), x.contiguous(), x[:0], x[:, :2], x.to("meta"), x[0]):
        assert not winograd.takes(x, other)
    assert not winograd.takes(x.half()) and not winograd.takes(x.double())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(value):
    x = torch.zeros(1, 8, 9, 9, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    x[0, 3, 4, 4] = value
    y = winograd.convolve(x, torch.ones(8, 8, 3, 3))
    assert not y[:, :, 3:6, 3:6].isfinite().any() and y[:, :, :, 8].isfinite().all()


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
    assert [choices.way(call, *operands()) for _ in range(2)] == [8, 8] and counted == [[4, 8, 16, "winograd"]]
    assert Choices().way(call, *operands()) == 8 and len(counted) == 1
    # a batch that 16 does not divide has other candidates
    assert choices.way(call, *operands(72)) == 8 and counted[1:] == [[4, 8, "winograd"]]
    (file,) = (tmp_path / "native").glob("convolutions-*.json")
    assert set(json.loads(file.read_text()).values()) == {8}
    for damage in ("{", "[1]", '{"key": "x"}'):
        file.write_text(damage)
        assert Choices().way(call, *operands()) == 8
    assert len(counted) == 5


def test_nothing_is_measured_where_nothing_is_gained_or_runs_must_repeat(counted, monkeypatch):
    choices, call = Choices(), native_convolution._weight_gradient
    assert choices.way(call, *operands(4)) == 1  # little work
    monkeypatch.setattr(winograd, "takes", lambda *images: False)
    assert choices.way(call, *operands(width=9)) == 1  # wide
    assert choices.way(call, *operands(63)) == 1  # odd
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    assert choices.way(call, *operands()) == 1 and not counted


@pytest.mark.parametrize("fast", [False, True])
def test_what_must_repeat_goes_by_the_processor_alone(fast, counted, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(native_convolution.convolution, "fast_bf16", lambda: fast)
    assert Choices().way(native_convolution._convolve, *operands()) == (1 if fast else "winograd") and not counted


class Timed:
    """A call that takes `seconds` of a clock of its own, and gives `result` of that way, else 1."""

    def __init__(self, seconds: dict, result: dict, monkeypatch):
        self.seconds, self.result, self.now = seconds, result, 0.0
        self.__name__ = "_convolve"
        monkeypatch.setattr(native_convolution.time, "perf_counter", lambda: self.now)

    def __call__(self, way, *tensors):
        *images, _ = tensors
        assert all(len(t) == 128 for t in images)
        self.now += self.seconds[way]
        return torch.tensor([self.result.get(way, 1.0)])


def test_a_measurement_takes_the_fastest_that_gains_enough(monkeypatch):
    images, ways, weight = (torch.zeros(200, 1, 1, 1),), [4, 8, 16, "winograd"], torch.zeros(1)
    call = Timed({1: 1.0, 4: 0.8, 8: 0.5, 16: 0.6, "winograd": 0.4}, {}, monkeypatch)
    assert native_convolution._fastest(call, ways, images, weight) == "winograd"
    assert native_convolution._fastest(call, ways[:3], images, weight) == 8
    assert native_convolution._fastest(call, ["winograd"], images, weight) == "winograd"
    call.seconds.update({4: 0.97, 8: 0.96, 16: 2.0, "winograd": 0.96})
    assert native_convolution._fastest(call, ways, images, weight) == 1


@pytest.mark.parametrize("wrong", [1.2, float("nan")])
def test_a_wrong_way_is_not_taken_and_said(wrong, monkeypatch):
    said = []
    monkeypatch.setattr(native_convolution, "say_once", said.append)
    call = Timed({1: 1.0, 4: 0.8, "winograd": 0.4}, {"winograd": wrong}, monkeypatch)
    images = (torch.zeros(128, 1, 1, 1),)
    assert native_convolution._fastest(call, [4, "winograd"], images, torch.zeros(1)) == 4
    assert said == ["the native convolve (winograd) is wrong on this machine; another runs in its place"]


@pytest.mark.parametrize("leaf", ["x", "weight"])
def test_second_derivative_is_a_clear_error(leaf):
    arguments = {"x": torch.randn(2, 3, 4, 4), "weight": torch.randn(5, 3, 3, 3)}
    value = arguments[leaf].requires_grad_()
    (grad,) = torch.autograd.grad(conv3x3(**arguments).sum(), value, create_graph=True)
    with pytest.raises(RuntimeError, match=r"conv3x3 is differentiable once.*use plain_conv3x3"):
        grad.square().sum().backward()
