"""How the loss takes part in autograd, whichever backend computes it."""

from typing import Any

import torch
from torch import Tensor

from fused_smoothl1 import composition
from fused_smoothl1.dispatch import is_plain_backward
from fused_smoothl1.hooks import apply_of, untraced
from fused_smoothl1.problem import (
    NO_NEEDS,
    OPERANDS,
    TENSORS,
    Backend,
    Gradients,
    Needs,
    Problem,
    gradient_in_forward,
)


class SmoothL1(torch.autograd.Function):
    """The loss of a `Problem`, with its gradient if `gradient_in_forward` says so.

    A plain Function: one with `setup_context` inspects signatures at every call, which costs
    more host time than a small loss takes on a GPU.
    """

    @staticmethod
    @untraced
    def forward(
        ctx: Any,
        input: Tensor,
        target: Tensor,
        inside: Tensor | None,
        outside: Tensor | None,
        beta: Tensor | None,
        problem: Problem,
        backend: Backend,
    ) -> Tensor:
        """Compute the loss; the operands are arguments too, so that autograd sees them."""
        needs: Needs = ctx.needs_input_grad[:OPERANDS]
        in_forward = gradient_in_forward(problem, needs)
        loss, gradients = backend.forward(problem, needs if in_forward else NO_NEEDS)
        ctx.save_for_backward(*problem[:TENSORS])
        # In one tuple, because attributes cost time; and the gradients in a list, because compiled
        # autograd gives `backward` a new context each time.
        ctx.kept = backend, problem[TENSORS:], [gradients] if in_forward else []
        return loss

    @staticmethod
    @untraced
    def backward(ctx: Any, *upstreams: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of the five operands."""
        (upstream,) = upstreams
        is_plain = is_plain_backward(upstream)
        # A saved gradient is overwritten and handed out, so it serves only once.
        kept: tuple[Backend, tuple[Any, ...], list[Gradients]] = ctx.kept
        backend, options, saved = kept
        gradients = saved.pop() if saved else None
        if is_plain and gradients is not None:
            scaled = backend.scale(gradients, upstream, options[-1])
            if scaled is not None:
                return *scaled, None, None

        # Raises if an operand was modified in place since, or if the graph was freed.
        problem = Problem(*ctx.saved_tensors, *options)
        needs: Needs = ctx.needs_input_grad[:OPERANDS]
        if not is_plain:
            return *composition.backward(problem, upstream, needs), None, None
        if gradients is not None:
            return *backend.recompute(problem, gradients, upstream, needs), None, None
        return *backend.backward(problem, upstream, needs), None, None


apply = apply_of(SmoothL1)
