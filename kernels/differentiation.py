"""Gradients that are not themselves differentiable, and say so. Needs no triton."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor


class _Refusal(torch.autograd.Function):
    """Gradients as they are; to differentiate them is an error."""

    @staticmethod
    def forward(ctx, message: str, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.message = message
        return tuple(None if grad is None else grad.view_as(grad) for grad in grads)

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(ctx.message)


def differentiable_once(op: str, instead: str | None = None) -> Callable:
    """For the `backward` of an autograd Function, which returns a tuple: a second derivative through it raises
    RuntimeError, naming `op` and what to use `instead`, by default the reference op.

    torch's once_differentiable raises only where an incoming gradient requires one; with create_graph and an incoming
    gradient that does not, as of a plain sum, it would leave this op's second derivatives out without a word.
    """
    message = f"{op} is differentiable once; where second derivatives are needed, use {instead or f'reference.{op}'}"

    def decorate(backward: Callable) -> Callable:
        @functools.wraps(backward)
        def once(ctx, *upstream):
            with torch.no_grad():
                grads = backward(ctx, *upstream)
            # gradients are enabled in a backward pass with create_graph only
            if not torch.is_grad_enabled():
                return grads
            return _Refusal.apply(message, *(g if g is None else g.detach().requires_grad_() for g in grads))

        return once

    return decorate
