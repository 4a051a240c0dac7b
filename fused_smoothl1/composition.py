"""The loss as a composition of PyTorch's own operations, which all of PyTorch knows how to treat.

It is what transformations, tracers and compilers see, and what a backward pass goes through whose
result is to be differentiated again. `F.smooth_l1_loss` is not in it: a compiler makes a new graph
for every beta of it, its gradient is contiguous whatever its operands are, and it squares before it
divides, which overflows.
"""

import math
from typing import Any

import torch
from torch import Tensor

from fused_smoothl1.contract import Gradients, Needs, Problem, is_mask, may_hold, transition


def composition(problem: Problem) -> Tensor:
    """Return the loss, connected to the graph of its operands."""
    dtype = problem.compute_dtype
    x = problem.input.to(dtype) - problem.target.to(dtype)
    selected: Tensor | None = None
    factors: list[Tensor | None] = []
    for weights in (problem.inside, problem.outside):
        if is_mask(weights):
            chosen = weights != 0
            selected = chosen if selected is None else selected & chosen
            factors.append(None)
        elif isinstance(weights, Tensor) or weights != 1:
            factors.append(_as_tensor(weights, x))
        else:
            factors.append(None)
    if selected is not None:
        # Whatever is not selected must be 0 before it meets a product: 0 times NaN is NaN.
        # (masked_fill would take the memory format of the mask.)
        x = torch.where(selected, x, 0)
        factors = [None if f is None else torch.where(selected, f, 0) for f in factors]
    inside, outside = factors
    # What comes first in a product decides the memory format.
    loss = _smooth_l1(x if inside is None else x * inside, problem)
    if outside is not None:
        loss = loss * outside
    if problem.reduce:
        divisor: Any = problem.divisor
        if isinstance(divisor, Tensor | float):
            divisor = _as_tensor(divisor, x)
        # An empty sum is 0 whatever divides it: a count of positives may be 0 too.
        may_be_empty = may_hold(problem.input.numel() == 0)
        loss = (loss / divisor).sum() if may_be_empty else loss.sum() / divisor
    return loss.to(problem.loss_dtype)


def differentiable_backward(problem: Problem, upstream: Tensor, needs: Needs) -> Gradients:
    """Return the needed gradients connected to the graph of the operands and of `upstream`."""

    def loss_of(*wanted: Tensor) -> Tensor:
        values = iter(wanted)
        operands: list[Any] = [
            next(values) if needed else operand
            for operand, needed in zip(problem[:4], needs, strict=True)
        ]
        return composition(Problem._make([*operands, *problem[4:]]))

    wanted = [v for v, needed in zip(problem[:4], needs, strict=True) if needed]
    if not wanted:
        return None, None, None, None
    pullback = torch.func.vjp(loss_of, *wanted)[1]
    found = iter(pullback(upstream))
    grad_input, grad_target, grad_inside, grad_outside = (
        next(found) if needed else None for needed in needs
    )
    return grad_input, grad_target, grad_inside, grad_outside


def _smooth_l1(x: Tensor, problem: Problem) -> Tensor:
    beta, inverse_beta = transition(problem)
    if not isinstance(inverse_beta, Tensor) and inverse_beta == math.inf:
        # Only NaN is quadratic then. A product of inf with the zeros in place of the others would
        # be NaN: it is not selected, but anomaly detection would find it.
        inverse_beta = 1.0
    beta, inverse_beta = _as_tensor(beta, x), _as_tensor(inverse_beta, x)
    # (As abs, whose second derivative is a tensor without memory. Detached, for inf times the
    # tangent 0 of a sign is NaN.)
    size = x.detach().sign() * x
    is_linear = size >= beta  # NaN counts as quadratic: the sign would make its derivative 0.
    # What is linear must not reach the other derivative: 0 times inf is NaN. Nor is the loss a
    # product of two of its parts, because inf - inf is NaN where an upstream gradient is inf.
    rest = torch.where(is_linear, 0, x)
    return torch.where(is_linear, size - beta / 2, rest * (rest * inverse_beta) / 2)


def _as_tensor(value: Tensor | float, like: Tensor) -> Tensor:
    """Return the value as a tensor of the same dtype.

    A product of a number and a tensor without dimensions would have a tangent of float64.
    """
    return value.to(like.dtype) if isinstance(value, Tensor) else like.new_full((), value)
