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
        ctx.save_for_backward(*(v if isinstance(v, Tensor) else None for v in problem[:5]))
        ctx.constants = tuple(None if isinstance(v, Tensor) else v for v in problem)
        return loss

    @staticmethod
    def backward(ctx: Any, *upstreams: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of the four operands."""
        (upstream,) = upstreams
        needs: Needs = ctx.needs_input_grad[:4]
        # Raises if an operand was modified in place since, or if the graph was freed.
        saved = ctx.saved_tensors
        constants = ctx.constants
        operands = (c if s is None else s for s, c in zip(saved, constants[:5], strict=True))
        problem = Problem(*operands, *constants[5:])

        if torch.is_grad_enabled():
            # The caller wants to differentiate what this returns: a saved gradient has no graph.
            return *eager.differentiable_backward(problem, upstream, needs), None, None
        # The saved gradient is overwritten and handed out, so it serves one backward only.
        gradients: Gradients | None = ctx.gradients
        ctx.gradients = None
        if gradients is None:
            gradients = ctx.backend.backward(problem, upstream, needs)
        else:
            gradients = ctx.backend.rescale(problem, gradients, upstream, needs)
        return *gradients, None, None
