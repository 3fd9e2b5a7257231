"""cross_entropy: fused against the float64 reference; the count of correct rows exactly."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from blink import kernels
from blink.kernels.examine.cases import cross_entropy
from tests.oracle import DEVICE, DTYPES, Tolerance, directional_derivative_matches, judge, judge_on, name_of

INF, NAN = float("inf"), float("nan")

# the loss is float32 whatever the logits are: a few roundings a row; the gradient is rounded once to their dtype
TOLERANCES = {
    torch.float32: Tolerance(1e-6, 2e-6),
    torch.float16: Tolerance(1e-6, 2**-11 * 1.02),
    torch.bfloat16: Tolerance(1e-6, 2**-8 * 1.02),
}

CASES = [
    cross_entropy(512, 10),
    cross_entropy(2000, 10, label_smoothing=0.0),
    cross_entropy(7, 2, scale=1.0),
    cross_entropy(3, 1, scale=2.0),
    cross_entropy(1, 13),
    cross_entropy(65, 100, scale=1.0),
    cross_entropy(9, 1000),
    cross_entropy(5, 1000, label_smoothing=0.0, scale=30.0),
    # more than one block of classes
    cross_entropy(3, 2049),
    cross_entropy(2, 5003, label_smoothing=0.0),
    cross_entropy(4, 37, label_smoothing=1.0),
]


def exact(logits, labels, **options):
    """(loss, correct, gradient) of the reference in float64."""
    x = logits.double().requires_grad_()
    loss, correct = kernels.reference.cross_entropy(x, labels, **options)
    loss.backward()
    return loss.detach(), correct, x.grad


def fused(logits, labels, **options):
    x = logits.clone().requires_grad_()
    loss, correct = kernels.cross_entropy(x, labels, **options)
    loss.backward()
    return loss.detach(), correct, x.grad


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.label)
def test_matches_float64(case, dtype):
    # of one class the loss is 0 and the error would be relative to nothing
    if "x1-" in case.label:
        loss, correct, grad = fused(**case.make(DEVICE, dtype), **case.options)
        assert loss == 0 and correct == 3 and not grad.any()
        return
    judge(case, dtype, TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.label)
def test_counts_correct_rows(case, dtype):
    """Exactly; half of the labels are made right, and small integers tie in most rows."""
    for ties in (False, True):
        tensors = case.make(DEVICE, dtype)
        if ties:
            tensors["logits"] = torch.randint(-2, 3, tensors["logits"].shape, device=DEVICE).to(dtype)
        best = (tensors["logits"] == tensors["logits"].amax(1, keepdim=True)).int().argmax(1)
        tensors["labels"][::2] = best[::2]
        _, correct = case.call(kernels, tensors, dtype)
        assert correct.dtype == torch.int64 and correct.shape == () and not correct.requires_grad
        assert correct == (best == tensors["labels"]).sum() >= 1


@settings(max_examples=20, deadline=None)
@given(
    batch=st.integers(1, 70),
    classes=st.integers(2, 40),
    label_smoothing=st.sampled_from([0.0, 0.1, 0.5]),
    scale=st.sampled_from([0.1, 1.0, 4.0]),
    dtype=st.sampled_from(DTYPES),
)
def test_any_shape(batch, classes, label_smoothing, scale, dtype):
    case = cross_entropy(batch, classes, label_smoothing=label_smoothing, scale=scale)
    judge(case, dtype, TOLERANCES[dtype].loosened(10), versus_pytorch=False)


def test_directional_derivative():
    directional_derivative_matches(cross_entropy(5, 6, scale=1.0), step=1e-3)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
@pytest.mark.parametrize("classes", [11, 2500])
def test_huge_logits(classes, label_smoothing):
    """A few hundred after scaling, and float16 to the end of its range: nothing overflows, and the loss is exact."""
    for dtype, size, scale in ((torch.float32, 3000.0, 0.1), (torch.float16, 65504.0, 1.0), (torch.float16, 3e4, 7.0)):
        tensors = {
            "logits": ((torch.rand(6, classes, device=DEVICE) * 2 - 1) * size).to(dtype),
            "labels": torch.randint(classes, (6,), device=DEVICE),
        }
        case = cross_entropy(6, classes, label_smoothing=label_smoothing, scale=scale)
        judge_on(case, tensors, dtype, TOLERANCES[dtype])


@pytest.mark.parametrize("block", [0, 2500])
def test_a_large_common_offset_costs_nothing(block):
    """Differences are taken before scaling, so that logits around 1e4 lose no more than float32 has lost of them."""
    logits = torch.randn(8, 12 + block, device=DEVICE)
    shifted = logits + 1e4
    labels = torch.randint(12, (8,), device=DEVICE)
    options = {"label_smoothing": 0.1, "scale": 0.3}
    ours, truth = fused(shifted, labels, **options), exact(shifted, labels, **options)
    assert abs(ours[0] - truth[0]) <= 1e-6 * truth[0]
    assert (ours[2] - truth[2]).abs().max() <= 1e-6


def hazards():
    """Rows of 3 logits with an infinity or a NaN, a label, and whether the row counts as correct."""
    return [
        ([1.0, -INF, 2.0], 2, True),
        ([1.0, -INF, 2.0], 1, False),
        ([-INF, -INF, 0.5], 2, True),
        ([-INF, -INF, -INF], 0, True),
        ([INF, 1.0, 2.0], 0, True),
        ([INF, 1.0, INF], 2, False),
        ([NAN, 1.0, 2.0], 2, False),
        ([NAN, 1.0, 2.0], 0, False),
        ([3.0, 1.0, NAN], 0, False),
        ([NAN, -INF, -INF], 1, False),
        ([-65504.0, 65504.0, 0.0], 0, False),
    ]


@pytest.mark.parametrize("label_smoothing", [0.0, 0.3])
@pytest.mark.parametrize("row, label, right", hazards(), ids=str)
@pytest.mark.parametrize("classes", [3, 4200])
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning", "ignore:overflow:RuntimeWarning")
def test_infinities_and_nan_as_pytorch(row, label, right, label_smoothing, classes):
    """Loss, gradient and count of each hazard, alone and with its columns spread over three blocks."""
    logits = torch.full((1, classes), -INF, device=DEVICE)
    columns = torch.tensor([0, 1, 2] if classes == 3 else [3, 2060, 4199])
    logits[0, columns] = torch.tensor(row, device=DEVICE)
    labels = columns[label : label + 1].to(DEVICE)
    # the first of nothing but -inf is the first column
    right = right and (classes == 3 or max(row) > -INF)
    loss, correct, grad = fused(logits, labels, label_smoothing=label_smoothing)
    want_loss, want_correct, want_grad = exact(logits, labels, label_smoothing=label_smoothing)
    torch.testing.assert_close(loss.double(), want_loss, equal_nan=True, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(grad.double(), want_grad, equal_nan=True, rtol=1e-6, atol=1e-6)
    assert bool(correct) == bool(want_correct) == right


def test_nan_and_wrong_labels_are_noticed():
    """One bad row makes the loss NaN and leaves the other rows' gradients alone."""
    logits = torch.randn(6, 5, device=DEVICE)
    labels = torch.tensor([0, 1, 2, 3, 4, 0], device=DEVICE)
    good = fused(logits, labels, label_smoothing=0.1)
    for wrong in (-1, 5, -100, 2**40):
        changed = labels.clone()
        changed[3] = wrong
        loss, correct, grad = fused(logits, changed, label_smoothing=0.1)
        assert loss.isnan() and grad[3].isnan().all()
        assert torch.equal(grad[[0, 1, 2, 4, 5]], good[2][[0, 1, 2, 4, 5]])
        assert correct == (logits.argmax(1) == changed).sum()
        if DEVICE.type == "cpu":
            with pytest.raises(IndexError):
                kernels.reference.cross_entropy(logits, changed)
    spoiled = logits.clone()
    spoiled[3, 2] = NAN
    loss, _, grad = fused(spoiled, labels, label_smoothing=0.1)
    assert loss.isnan() and grad[3].isnan().all() and grad[:3].isfinite().all()


@pytest.mark.parametrize("upstream", [1.0, 65536.0, -0.37, 0.0])
def test_upstream_is_applied_before_rounding(upstream):
    """A gradient of 1e-9 that a loss scale of 65536 makes representable survives in float16."""
    logits = torch.tensor([[20.0, 0.0, -1.0], [0.5, 0.0, 19.0]], device=DEVICE, dtype=torch.float16)
    labels = torch.tensor([0, 2], device=DEVICE)
    x = logits.clone().requires_grad_()
    (kernels.cross_entropy(x, labels)[0] * upstream).backward()
    want = exact(logits, labels)[2] * upstream
    # at the label p - 1 is float32's 0, as in PyTorch
    others = torch.ones(2, 3, dtype=torch.bool, device=DEVICE).scatter(1, labels[:, None], False)
    got, want = x.grad[others].double(), want[others]
    assert (got - want).abs().max() <= 2**-10 * want.abs().max() + 2**-24
    assert got.any() == (abs(upstream) > 1)


def test_agrees_with_pytorch_where_pytorch_is_the_definition():
    """Not through the reference: F.cross_entropy as the training loop calls it, and an accuracy."""
    logits, labels = torch.randn(33, 10, device=DEVICE) * 3, torch.randint(10, (33,), device=DEVICE)
    for e, s in ((0.0, 1.0), (0.2, 0.1)):
        loss, correct = kernels.cross_entropy(logits, labels, label_smoothing=e, scale=s)
        want = F.cross_entropy(s * logits, labels, label_smoothing=e, reduction="sum")
        torch.testing.assert_close(loss, want, rtol=1e-6, atol=0)
        assert correct == (logits.argmax(1) == labels).sum()


def test_many_blocks_per_program(monkeypatch):
    import importlib

    module = importlib.import_module("blink.kernels.cross_entropy")
    monkeypatch.setattr(module, "_PROGRAMS", 3)
    monkeypatch.setattr(module, "_TILE", 64)
    judge(cross_entropy(101, 10), torch.float32, TOLERANCES[torch.float32])
    judge(cross_entropy(7, 150), torch.float32, TOLERANCES[torch.float32])
    logits, labels = torch.randn(101, 10, device=DEVICE), torch.randint(10, (101,), device=DEVICE)
    assert kernels.cross_entropy(logits, labels)[1] == (logits.argmax(1) == labels).sum()


def test_labels_in_any_stride():
    logits, labels = torch.randn(6, 5, device=DEVICE), torch.randint(5, (12,), device=DEVICE)
    want = kernels.cross_entropy(logits, labels[::2].clone())[0]
    assert torch.equal(kernels.cross_entropy(logits, labels[::2])[0], want)


def test_refuses_what_it_cannot_do():
    logits, labels = torch.randn(4, 6, device=DEVICE), torch.zeros(4, dtype=torch.int64, device=DEVICE)
    with pytest.raises(ValueError, match=r"labels must be \[4\]"):
        kernels.cross_entropy(logits, labels[:3])
    with pytest.raises(TypeError, match="labels must be int64"):
        kernels.cross_entropy(logits, labels.int())
    with pytest.raises(ValueError, match="logits must be contiguous"):
        kernels.cross_entropy(torch.randn(6, 4, device=DEVICE).T, labels)
    for wrong in (-0.1, 1.1, NAN):
        with pytest.raises(ValueError, match="label_smoothing must be from 0 to 1"):
            kernels.cross_entropy(logits, labels, label_smoothing=wrong)
    for wrong in (0.0, -1.0, math.inf, NAN):
        with pytest.raises(ValueError, match="scale must be positive"):
            kernels.cross_entropy(logits, labels, scale=wrong)
