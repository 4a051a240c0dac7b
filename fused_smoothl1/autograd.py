"""How the loss takes part in autograd, whichever backend computes it."""

from typing import Any

import torch
from torch import Tensor

from fused_smoothl1 import eager
from fused_smoothl1.contract import (
    NOTHING,
    Backend,
    Gradients,
    Needs,
    Problem,
    gradient_in_forward,
    has_masks,
)


class SmoothL1(torch.autograd.Function):
    """The loss of a `Problem`, with its gradient computed in the forward pass where that is exact.

    A plain Function: one with `setup_context` inspects signatures at every call, which costs more
    host time than a small loss takes on a GPU.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        target: Tensor,
        inside: Tensor | float,
        outside: Tensor | float,
        problem: Problem,
        backend: Backend,
    ) -> Tensor:
        """Compute the loss; the operands stand beside `problem` for autograd to see them."""
        needs: Needs = ctx.needs_input_grad[:4]
        now = gradient_in_forward(problem, needs)
        loss, gradients = backend.forward(problem, needs if now else NOTHING)
        ctx.gradients = gradients if now else None
        ctx.backend = backend
        ctx.has_masks = has_masks(problem)
        ctx.save_for_backward(*[v if isinstance(v, Tensor) else None for v in problem[:5]])
        ctx.constants = [None if isinstance(v, Tensor) else v for v in problem]
        return loss

    @staticmethod
    def backward(ctx: Any, *upstreams: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of the four operands."""
        (upstream,) = upstreams
        backend: Backend = ctx.backend
        # What the forward pass computed is overwritten and handed out, so it serves one backward
        # only; and it has no graph for a caller who wants to differentiate it.
        gradients: Gradients | None = ctx.gradients
        ctx.gradients = None
        if torch.is_grad_enabled():
            gradients = None
        if gradients is not None and not ctx.has_masks:
            return *backend.rescale(gradients, upstream), None, None

        # Raises if an operand was modified in place since, or if the graph was freed.
        saved = ctx.saved_tensors
        operands = [c if s is None else s for s, c in zip(saved, ctx.constants[:5], strict=True)]
        problem = Problem(*operands, *ctx.constants[5:])
        needs: Needs = ctx.needs_input_grad[:4]
        if torch.is_grad_enabled():
            return *eager.differentiable_backward(problem, upstream, needs), None, None
        if gradients is not None:
            return *backend.refresh(problem, gradients, upstream, needs), None, None
        return *backend.backward(problem, upstream, needs), None, None
