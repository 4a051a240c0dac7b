"""The loss as a composition of PyTorch's own operations, which all of PyTorch knows how to treat.

It is what transformations, tracers and compilers see, and what a backward pass goes through whose
result is to be differentiated again. `F.smooth_l1_loss` is not in it: a compiler makes a new graph
for every beta of it, its gradient is contiguous whatever its operands are, and it squares before it
divides, which overflows.
"""

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from fused_smoothl1.hooks import is_static, may_hold
from fused_smoothl1.problem import (
    Gradients,
    Needs,
    Problem,
    split_weights,
    sum_to_weights,
    transition,
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
    """Where the loss is linear, and its derivative there and elsewhere, by the weighted difference.

    One tensor of them would be computed in vain where no gradient is asked for.
    """


def loss(problem: Problem) -> Tensor:
    """Return the loss, connected to the graph of its operands."""
    parts = _elements(problem)
    value = parts.loss if parts.outside is None else parts.loss * parts.outside
    if problem.reduce:
        # An empty sum is 0 whatever divides it: the number of positives may be 0 too.
        may_be_empty = may_hold(problem.input.numel() == 0)
        value = _divided(value, problem).sum() if may_be_empty else _divided(value.sum(), problem)
    return value.to(problem.loss_dtype)


def forward(
    problem: Problem, needs: Needs, *, is_recorded: bool = False
) -> tuple[Tensor, Gradients]:
    """Return the loss, and the needed gradients for an upstream gradient of 1."""
    value = loss(problem)
    return value, backward(problem, torch.ones_like(value), needs)


def backward(problem: Problem, upstream: Tensor, needs: Needs) -> Gradients:
    """Return the needed gradients connected to the graph of the operands and of `upstream`."""
    if not any(needs):
        return None, None, None, None
    needs_input, needs_target, needs_inside, needs_outside = needs
    parts = _elements(problem)

    def selected(gradient: Tensor) -> Tensor:
        return gradient if parts.selected is None else torch.where(parts.selected, gradient, 0)

    above = _divided(upstream, problem) if problem.reduce else upstream
    grad_outside = selected(parts.loss * above) if needs_outside else None
    slope = torch.where(*parts.slopes)
    grad_x = slope * (above if parts.outside is None else parts.outside * above)
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
        # Whatever is not selected must be 0 before it meets a product: 0 times NaN is NaN.
        # (masked_fill would make it contiguous.)
        difference = torch.where(selected, difference, 0)
        weights = [None if w is None else torch.where(selected, w, 0) for w in weights]
    inside, outside = weights
    # What comes first in a product decides the memory format.
    x = difference if inside is None else difference * inside
    return _Elements(difference, selected, inside, outside, *_smooth_l1(x, problem))


def _smooth_l1(x: Tensor, problem: Problem) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Return the loss of weighted differences, and what its derivative is made of."""
    beta: Tensor | float
    inverse_beta: Tensor | float
    if problem.beta is None:
        beta, inverse_beta = transition(problem)
        if inverse_beta == math.inf:
            # Only NaN is quadratic then. A product of inf with the zeros in place of the others
            # would be NaN: it is not selected, but anomaly detection would find it.
            inverse_beta = 1.0
    else:
        beta, inverse_beta = problem.beta, problem.beta.reciprocal()
    half_beta, half_inverse = _as_tensor(beta / 2, x), _as_tensor(inverse_beta / 2, x)
    beta, inverse_beta = _as_tensor(beta, x), _as_tensor(inverse_beta, x)
    # (Not abs, whose second derivative is a tensor without memory. Detached, for inf times the
    # tangent 0 of a sign is NaN.)
    sign = x.detach().sign()
    size = sign * x
    is_linear = size >= beta  # NaN counts as quadratic: the sign would make its derivative 0.
    # What is linear must not reach the other derivative: 0 times inf is NaN. Nor is the loss a
    # product of two of its parts, because inf - inf is NaN where an upstream gradient is inf.
    rest = torch.where(is_linear, 0, x)
    loss = torch.where(is_linear, size - half_beta, rest * (rest * half_inverse))
    return loss, (is_linear, sign, rest * inverse_beta)


def _divided(value: Tensor, problem: Problem) -> Tensor:
    if problem.divisor is not None:
        return value / problem.divisor.to(value.dtype)
    number = problem.divisor_number
    # A number of elements may be a symbol, and stays one.
    return value / (_as_tensor(number, value) if is_static(number) else number)


def _as_tensor(value: Tensor | float, like: Tensor) -> Tensor:
    """Return the value as a tensor of the same dtype.

    A product of a number and a tensor without dimensions would have a tangent of float64, and
    where make_fx traces a transform before autograd, no product with a number is possible at all.
    """
    return value.to(like.dtype) if isinstance(value, Tensor) else like.new_full((), value)
