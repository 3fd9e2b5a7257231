"""sgd_nesterov: fused against the float64 reference and torch.optim.SGD."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blink import kernels
from blink.kernels.examine.cases import sgd_nesterov
from blink.kernels.launching import captured_launches
from tests.oracle import DEVICE, DTYPES, judge_lists, name_of

# float32: a few roundings a value; 16 bits: the one rounding of each stored result
TOLERANCES = {torch.float32: 5e-7, torch.float16: 2**-11 * 1.02, torch.bfloat16: 2**-8 * 1.02}

CASES = [
    sgd_nesterov([(1,)]),
    sgd_nesterov([(33, 7), (12, 5, 3, 3), (2047,), (2048,), (2049,), (1, 1, 1, 1)]),
    sgd_nesterov([(64, 32), (4, 8, 3, 3), (10,)], weight_decay=0.0, buffer_dtype=torch.float32),
    # more than one launch takes
    sgd_nesterov([(size, 3) for size in range(1, 20)], rates=True),
]


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.label)
def test_matches_float64(case, dtype):
    # the reference computes in float32 as well: twice its error, or half a unit in the last place
    judge_lists(case, case.make(DEVICE, dtype), dtype, TOLERANCES[dtype], times_pytorch=2)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_plain_momentum_matches_float64(dtype):
    case = sgd_nesterov([(33, 7), (12, 5, 3, 3), (2049,)])
    case = replace(case, options={**case.options, "nesterov": False})
    judge_lists(case, case.make(DEVICE, dtype), dtype, TOLERANCES[dtype], times_pytorch=2)


@settings(max_examples=12, deadline=None)
@given(
    shapes=st.lists(st.lists(st.integers(1, 9), min_size=0, max_size=5).map(tuple), min_size=1, max_size=5),
    weight_decay=st.sampled_from([0.0, 0.3]),
    dtype=st.sampled_from(DTYPES),
)
def test_any_shapes(shapes, weight_decay, dtype):
    case = sgd_nesterov(shapes, weight_decay=weight_decay)
    # a result smaller than what it was summed from has more of its rounding
    judge_lists(case, case.make(DEVICE, dtype), dtype, TOLERANCES[dtype] * 50, times_pytorch=None)


def test_is_torch_sgd():
    """From zero buffers, which gives PyTorch's first step, through three steps of a changing rate."""
    shapes = [(6, 5, 3, 3), (40, 30), (7,)]
    ours = [torch.randn(s, device=DEVICE) for s in shapes]
    ours[0] = ours[0].contiguous(memory_format=torch.channels_last)
    theirs = [p.clone().requires_grad_() for p in ours]
    buffers = [torch.zeros_like(p) for p in ours]
    lr = torch.zeros(1, device=DEVICE)
    optimizer = torch.optim.SGD(theirs, lr=1.0, momentum=0.85, weight_decay=0.02, nesterov=True)
    for rate in (0.5, 0.25, 0.75):
        lr.fill_(rate)
        optimizer.param_groups[0]["lr"] = rate
        grads = [torch.randn_like(p) for p in ours]
        for p, g in zip(theirs, grads):
            p.grad = g.clone()
        kernels.sgd_nesterov(ours, grads, buffers, lr, momentum=0.85, weight_decay=0.02)
        optimizer.step()
    for p, q, buffer in zip(ours, theirs, buffers):
        torch.testing.assert_close(p, q.detach(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(buffer, optimizer.state[q]["momentum_buffer"], rtol=1e-5, atol=1e-6)


def arguments(param, grad_dtype=None, buffer_dtype=None):
    grad = torch.randn(param.shape, device=DEVICE).to(grad_dtype or param.dtype)
    return param, grad, torch.randn_like(param, dtype=buffer_dtype or param.dtype)


@pytest.mark.parametrize("grad_dtype", [torch.float16, torch.float32], ids=name_of)
@pytest.mark.parametrize("buffer_dtype", [torch.float16, torch.float32], ids=name_of)
def test_mixed_dtypes_and_layouts(grad_dtype, buffer_dtype):
    """float16 weights in three layouts; contiguous gradients are brought to their weight's layout."""
    base = torch.randn(6, 4, 3, 5, device=DEVICE).half()
    params = [
        base.clone(),
        base.to(memory_format=torch.channels_last),
        base.permute(2, 3, 0, 1).clone().permute(2, 3, 0, 1),
    ]
    entries = [arguments(p, grad_dtype, buffer_dtype) for p in params] + [arguments(torch.ones(5, device=DEVICE))]
    own = [list(values) for values in zip(*entries)]
    want = [[t.double() for t in values] for values in own]
    lr = torch.full((), 0.5, device=DEVICE)
    kernels.sgd_nesterov(*own, lr, momentum=0.9, weight_decay=0.1)
    kernels.reference.sgd_nesterov(*want, lr.double(), momentum=0.9, weight_decay=0.1)
    for i, strides in enumerate(p.stride() for p in params):
        assert own[0][i].stride() == strides
    for values, truths in ((own[0], want[0]), (own[2], want[2])):
        for value, truth in zip(values, truths):
            limit = TOLERANCES[value.dtype] * truth.abs().max()
            assert (value.double() - truth).abs().max() <= limit


def test_a_view_that_is_not_aligned():
    """Tensors in one flat buffer, as gradient buckets are: some begin off a multiple of 16 bytes."""
    flat = torch.randn(3, 4099, device=DEVICE)
    pieces = [flat[:, 1:2050], flat[:, 2050:]]
    before = flat.clone()
    own = [[piece[row] for piece in pieces] for row in range(3)]
    want = [[t.double().clone() for t in values] for values in own]
    lr = torch.full((1,), 0.5, device=DEVICE)
    kernels.sgd_nesterov(*own, lr, momentum=0.9)
    kernels.reference.sgd_nesterov(*want, lr.double(), momentum=0.9)
    for values, truths in zip(own, want):
        for value, truth in zip(values, truths):
            torch.testing.assert_close(value.double(), truth, rtol=1e-5, atol=1e-6)
    assert torch.equal(flat[:, 0], before[:, 0]) and torch.equal(flat[1], before[1])


def test_launches():
    """One launch for 16 tensors of the same dtypes."""

    def count(tensors):
        with captured_launches() as launches:
            case.call(kernels, tensors, torch.float32)
        return len(launches)

    case = sgd_nesterov([(3, 3)] * 16)
    assert count(case.make(DEVICE, torch.float32)) == 1
    case = sgd_nesterov([(3, 3)] * 17)
    assert count(case.make(DEVICE, torch.float32)) == 2
    # vectors are float32 among float16 matrices
    case = sgd_nesterov([(3, 3), (3,)] * 8)
    assert count(case.make(DEVICE, torch.float16)) == 2
    assert count(case.make(DEVICE, torch.float32)) == 1
