"""What the tests of the optimizer classes share: parameters, gradients, and torch.optim's iteration in float64."""

from functools import partial

import pytest
import torch
from torch import nn

from blink.kernels import SGD, Muon
from tests.oracle import DEVICE

SHAPES = [(6, 4), (5, 2, 3, 3), (3, 9)]
MATRICES = [(6, 4), (4, 6), (5, 5)]
EVERY = [partial(SGD, lr=0.1, momentum=0.9, nesterov=True), partial(Muon, lr=0.1)]
every_optimizer = pytest.mark.parametrize("make", EVERY, ids=["SGD", "Muon"])


def parameters(shapes=SHAPES, dtype=torch.float32, device=DEVICE) -> list[nn.Parameter]:
    return [nn.Parameter(torch.randn(shape, dtype=dtype, device=device)) for shape in shapes]


def clones(params, dtype=None) -> list[nn.Parameter]:
    return [nn.Parameter(p.detach().to(dtype or p.dtype, copy=True)) for p in params]


def set_grads(*lists, missing=()):
    """The same random gradients for parameters in each list, none for those at `missing`."""
    for i, same in enumerate(zip(*lists)):
        grad = torch.randn_like(same[0])
        for p in same:
            p.grad = None if i in missing else grad.to(p.dtype, copy=True)


def assert_close(ours, theirs, tolerance):
    for got, want in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got.detach().double(), want.detach().double(), rtol=0, atol=tolerance)


def iteration_in_float64(grad, coefficients, steps, eps):
    """torch.optim's own, without its bfloat16."""
    a, b, c = coefficients
    x = grad.T if grad.size(0) > grad.size(1) else grad
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if grad.size(0) > grad.size(1) else x
