"""Gradients that are not themselves differentiable, and say so. Needs no triton."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad


class _Refusal(torch.autograd.Function):
    """Gradients as they are; to differentiate them is an error."""

    @staticmethod
    def forward(ctx, message: str, count: int, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        """The first `count` are the gradients; the others what they depend on, so that no search for it misses this."""
        ctx.message = message
        return tuple(None if grad is None else grad.view_as(grad) for grad in tensors[:count])

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(ctx.message)


def differentiable_once(op: str, instead: str | None = None) -> Callable:
    """For the `backward` of an autograd Function, which returns a tuple: a second derivative through it raises
    RuntimeError, naming `op` and what to use `instead`, by default the reference op.

    torch's once_differentiable raises only where an incoming gradient requires one; with create_graph and an incoming
    gradient that does not, as of a plain sum, it would leave this op's second derivatives out without a word.
    """
    instead = f"use {instead}" if instead else f"pass differentiable_twice=True or use reference.{op}"
    message = f"{op} is differentiable once; where second derivatives are needed, {instead}"

    def decorate(backward: Callable) -> Callable:
        @functools.wraps(backward)
        def once(ctx, *upstream):
            with torch.no_grad():
                grads = backward(ctx, *upstream)
            # gradients are enabled in a backward pass with create_graph only
            if not torch.is_grad_enabled():
                return grads
            grads = [g if g is None else g.detach().requires_grad_() for g in grads]
            # parameters are found although a kernel's backward pass may not need to save them
            leaves = [node.variable for node, _ in ctx.next_functions if hasattr(node, "variable")]
            sources = [t for t in (*ctx.saved_tensors, *upstream, *leaves) if t is not None and t.requires_grad]
            return _Refusal.apply(message, len(grads), *grads, *sources)

        return once

    return decorate


def transformed() -> bool:
    """Whether a torch.func transform (grad, vmap, jvp, ...) or forward-mode AD is under way."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
