"""The loss as a composition of PyTorch's own operations, which all of PyTorch knows how to treat.

Transformations, tracers and compilers see it, and a backward pass goes through it if its result is
differentiated again. `F.smooth_l1_loss` is no part of it: compilers make a new graph for each of
its betas, its gradient is contiguous whatever the operands are, and it squares before it divides,
which overflows.
"""

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from fused_smoothl1.hooks import is_static, may_hold
from fused_smoothl1.problem import (
    NO_GRADIENTS,
    Gradients,
    Needs,
    Problem,
    beta_and_inverse,
    split_weights,
    sum_to_weights,
)


class _Elements(NamedTuple):
    """What the loss and its gradients are made of, for each element and in the compute dtype."""

    difference: Tensor
    """Of input and target, 0 where not selected."""
    selected: Tensor | None
    """What the masks select, if there are any."""
    inside: Tensor | None
    """What the weights multiply by, 0 where not selected; None is 1."""
    outside: Tensor | None
    """Likewise."""
    loss: Tensor
    """Without the outside weights."""
    slopes: tuple[Tensor, Tensor, Tensor]
    """Where the loss is linear, its slope there, and its slope elsewhere.

    They are combined only where a gradient is needed.
    """


def loss(problem: Problem) -> Tensor:
    """Return the loss, connected to the graph of its operands."""
    parts = _elements(problem)
    value = parts.loss if parts.outside is None else parts.loss * parts.outside
    if problem.reduce:
        # An empty sum is 0 whatever divides it: the number of positives may be 0 too.
        may_be_empty = may_hold(problem.input.numel() == 0)
        value = _quotient(value, problem).sum() if may_be_empty else _quotient(value.sum(), problem)
    return value.to(problem.loss_dtype)


def forward(
    problem: Problem, needs: Needs, *, may_be_replayed: bool = False
) -> tuple[Tensor, Gradients]:
    """Return the loss, and the needed gradients for an upstream gradient of 1."""
    value = loss(problem)
    return value, backward(problem, torch.ones_like(value), needs)


def backward(problem: Problem, upstream: Tensor, needs: Needs) -> Gradients:
    """Return the needed gradients connected to the graph of the operands and of `upstream`."""
    if not any(needs):
        return NO_GRADIENTS
    needs_input, needs_target, needs_inside, needs_outside = needs
    parts = _elements(problem)

    def selected(gradient: Tensor) -> Tensor:
        return gradient if parts.selected is None else torch.where(parts.selected, gradient, 0)

    scale = _quotient(upstream, problem) if problem.reduce else upstream
    grad_outside = selected(parts.loss * scale) if needs_outside else None
    slope = torch.where(*parts.slopes)
    grad_x = slope * (scale if parts.outside is None else parts.outside * scale)
    grad_inside = selected(parts.difference * grad_x) if needs_inside else None
    gradient = selected(grad_x if parts.inside is None else grad_x * parts.inside)
    return sum_to_weights(
        problem,
        (
            gradient.to(problem.input.dtype) if needs_input else None,
            -gradient.to(problem.target.dtype) if needs_target else None,
            grad_inside,
            grad_outside,
        ),
    )


def _elements(problem: Problem) -> _Elements:
    dtype = problem.compute_dtype
    difference = problem.input.to(dtype) - problem.target.to(dtype)
    masks, *weights = split_weights(problem, lambda number: _as_tensor(number, difference))
    weights = [None if w is None else w.to(dtype) for w in weights]
    selected = functools.reduce(torch.logical_and, masks) if masks else None
    if selected is not None:
        # What is not selected must become 0 before any product, because 0 times NaN is NaN.
        # (masked_fill would return a contiguous tensor.)
        difference = torch.where(selected, difference, 0)
        weights = [None if w is None else torch.where(selected, w, 0) for w in weights]
    inside, outside = weights
    # The first tensor of a product decides its memory format.
    x = difference if inside is None else difference * inside
    return _Elements(difference, selected, inside, outside, *_smooth_l1(x, problem))


def _smooth_l1(x: Tensor, problem: Problem) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Return the loss of weighted differences, and what its derivative is made of."""
    beta: Tensor | float
    inverse_beta: Tensor | float
    if problem.beta is None:
        beta, inverse_beta = beta_and_inverse(problem)
        if inverse_beta == math.inf:
            # Only NaN counts as quadratic then. The other elements are 0 there, and 0 times inf
            # would be a NaN that nobody selects but anomaly detection reports.
            inverse_beta = 1.0
    else:
        beta, inverse_beta = problem.beta, problem.beta.reciprocal()
    half_beta, half_inverse = _as_tensor(beta / 2, x), _as_tensor(inverse_beta / 2, x)
    beta, inverse_beta = _as_tensor(beta, x), _as_tensor(inverse_beta, x)
    # (Not abs: its second derivative is a tensor without memory. Detached, because inf times the
    # zero tangent of a sign would be NaN.)
    sign = x.detach().sign()
    size = sign * x
    is_linear = size >= beta  # NaN counts as quadratic: the sign would make its derivative 0.
    # Linear elements must not reach the quadratic branch's derivative, because 0 times inf is NaN.
    # Nor may the loss be a product of branches: for infinite upstream gradients, inf - inf is NaN.
    rest = torch.where(is_linear, 0, x)
    loss = torch.where(is_linear, size - half_beta, rest * (rest * half_inverse))
    return loss, (is_linear, sign, rest * inverse_beta)


def _quotient(value: Tensor, problem: Problem) -> Tensor:
    if problem.divisor is not None:
        return value / problem.divisor.to(value.dtype)
    divisor = problem.divisor_number
    # A number of elements may be a symbol, and remains one.
    return value / (_as_tensor(divisor, value) if is_static(divisor) else divisor)


def _as_tensor(value: Tensor | float, like: Tensor) -> Tensor:
    """Return the value as a tensor of the same dtype.

    The product of a number and a tensor without dimensions would have a float64 tangent, and where
    make_fx traces a transform before autograd, products with numbers are not possible at all.
    """
    return value.to(like.dtype) if isinstance(value, Tensor) else like.new_full((), value)
