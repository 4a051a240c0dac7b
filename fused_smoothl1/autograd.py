"""How the loss takes part in autograd, whichever backend computes it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fused_smoothl1.composition import differentiable_backward
from fused_smoothl1.contract import (
    NOTHING,
    Backend,
    Gradients,
    Needs,
    Problem,
    gradient_in_forward,
)
from fused_smoothl1.dispatch import is_plain_backward, untraced


class SmoothL1(torch.autograd.Function):
    """The loss of a `Problem`, with its gradient computed in the forward pass where that is exact.

    A plain Function: one with `setup_context` inspects signatures at every call, which costs more
    host time than a small loss takes on a GPU.
    """

    @staticmethod
    @untraced
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
        # In a list, because compiled autograd hands `backward` a context of its own each time.
        ctx.gradients = [gradients] if now else []
        ctx.backend = backend
        divisor = problem.divisor
        ctx.save_for_backward(
            input,
            target,
            inside if isinstance(inside, Tensor) else None,
            outside if isinstance(outside, Tensor) else None,
            divisor if isinstance(divisor, Tensor) else None,
        )
        ctx.numbers = (
            None if isinstance(inside, Tensor) else inside,
            None if isinstance(outside, Tensor) else outside,
            None if isinstance(divisor, Tensor) else divisor,
        )
        ctx.options = problem[5:]
        return loss

    @staticmethod
    @untraced
    def backward(ctx: Any, *upstreams: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of the four operands."""
        (upstream,) = upstreams
        is_plain = is_plain_backward(upstream)
        # What the forward pass computed is overwritten and handed out, so it serves once.
        gradients: Gradients | None = ctx.gradients.pop() if ctx.gradients else None
        backend: Backend = ctx.backend
        *_, has_masks = ctx.options
        if is_plain and gradients is not None:
            rescaled = backend.rescale(gradients, upstream, has_masks)
            if rescaled is not None:
                return *rescaled, None, None

        # Raises if an operand was modified in place since, or if the graph was freed.
        input, target, *saved = ctx.saved_tensors
        others = [n if s is None else s for s, n in zip(saved, ctx.numbers, strict=True)]
        problem = Problem(input, target, *others, *ctx.options)
        needs: Needs = ctx.needs_input_grad[:4]
        if not is_plain:
            return *differentiable_backward(problem, upstream, needs), None, None
        if gradients is not None:
            return *backend.refresh(problem, gradients, upstream, needs), None, None
        return *backend.backward(problem, upstream, needs), None, None


# Function.apply itself looks for functorch's transforms first, at each call and for each argument.
# Where this is called there are none, so it is the base's, in C++.
apply: Callable[..., Tensor] = super(torch.autograd.Function, SmoothL1).apply
