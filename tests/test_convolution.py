"""The 3x3 convolution's own Function; what it computes is judged in test_profile.py."""

import pytest
import torch

from blink.model.convolution import conv3x3


@pytest.mark.parametrize("leaf", ["x", "weight"])
def test_second_derivative_is_a_clear_error(leaf):
    """Of a plain sum too, whose gradient needs none itself."""
    arguments = {"x": torch.randn(2, 3, 4, 4), "weight": torch.randn(5, 3, 3, 3)}
    value = arguments[leaf].requires_grad_()
    (grad,) = torch.autograd.grad(conv3x3(**arguments).sum(), value, create_graph=True)
    with pytest.raises(RuntimeError, match=r"conv3x3 is differentiable once.*use plain_conv3x3"):
        grad.square().sum().backward()
