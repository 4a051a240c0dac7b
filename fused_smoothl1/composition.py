"""The loss as a composition of PyTorch's own operations, which all of PyTorch knows how to treat.

Transformations, tracers and compilers see it, and a backward pass goes through it if its result is
differentiated again. `F.smooth_l1_loss` is no part of it: compilers make a new graph for each of
its betas, its gradient is contiguous whatever the operands are, and it squares before it divides,
which overflows.
"""

import functools
import math

import torch
from torch import Tensor

from fused_smoothl1.hooks import may_hold
from fused_smoothl1.problem import (
    NO_GRADIENTS,
    Gradients,
    Needs,
    Problem,
    beta_and_inverse,
    in_range,
    is_l1,
    split_weights,
    sum_to_operands,
    tensor_beta,
)


def loss(problem: Problem) -> Tensor:
    """Return the loss, connected to the graph of its operands."""
    _, selected, _, outside, x = _elements(problem)
    value, _ = _smooth_l1(x, problem, selected)
    value = value if outside is None else value * outside
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
    difference, selected, inside, outside, x = _elements(problem)
    losses, (is_linear, sign, slope) = _smooth_l1(x, problem, selected)

    def select(gradient: Tensor) -> Tensor:
        return gradient if selected is None else torch.where(selected, gradient, 0)

    scale = _quotient(upstream, problem) if problem.reduce else upstream

    def weigh(derivative: Tensor) -> Tensor:
        # (Not by a product of both: without elements, it would be left over, and may be inf.)
        return (derivative if outside is None else derivative * outside) * scale

    grad_x = weigh(torch.where(is_linear, sign, slope))
    gradient = select(grad_x if inside is None else grad_x * inside)
    gradients = (
        gradient.to(problem.input.dtype) if needs[0] else None,
        -gradient.to(problem.target.dtype) if needs[1] else None,
        select(difference * grad_x) if needs[2] else None,
        select(losses * scale) if needs[3] else None,
        select(weigh(_of_beta(is_linear, slope))) if needs[4] else None,
    )
    return sum_to_operands(problem, gradients)


def _elements(
    problem: Problem,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor]:
    """Return the difference, what is selected, both weights, and the weighted difference.

    They have the compute dtype, and are 0 where not selected. None stands for all, or for 1.
    """
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
    return difference, selected, inside, outside, x


def _smooth_l1(
    x: Tensor, problem: Problem, selected: Tensor | None
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Return the loss of weighted differences, and what makes up its derivative.

    That is where the loss is linear, its slope there, and its slope elsewhere, which are combined
    only where a gradient is needed.
    """
    number, inverse = beta_and_inverse(problem)
    half = _as_tensor(0.5, x)
    if problem.beta is None:
        # (Half of it is no product of tensors: without dimensions it would be left over where
        # torch.jit.trace saw no rows, and PyTorch's fuser fails there on a GPU: pytorch#144965.)
        beta, half_beta = _as_tensor(number, x), _as_tensor(0.5 * number, x)
    else:
        beta = tensor_beta(problem.beta, x.dtype)
        beta = beta if selected is None else torch.where(selected, beta, 1)
        half_beta = half * beta
    # (Not abs: its second derivative is a tensor without memory. Detached, because inf times the
    # zero tangent of a sign would be NaN.)
    sign = x.detach().sign()
    size = sign * x
    # NaN counts as quadratic: the sign would make its derivative 0.
    is_linear = size >= beta
    # Linear elements must not reach the quadratic branch's derivative, because 0 times inf is NaN.
    # Nor may the loss be a product of branches: for infinite upstream gradients, inf - inf is NaN.
    rest = torch.where(is_linear, 0, x)
    # If the loss is L1, only NaN is left, and 0, which divided by 0 would be a NaN that nobody
    # selects but anomaly detection reports.
    if problem.beta is None:
        slope = rest * _as_tensor(1.0 if inverse == math.inf else inverse, x)
    else:
        # (Divided: make_fx before dispatch takes the result of a reciprocal for a constant, and the
        # square in its derivative overflows. A sum, so that NaN reaches the gradient of beta.)
        slope = rest / torch.where(is_l1(beta), beta + 1, beta)
    loss = torch.where(is_linear, size - half_beta, half * (rest * slope))
    return loss, (is_linear, sign, slope)


def _of_beta(is_linear: Tensor, slope: Tensor) -> Tensor:
    """Return the derivative of the loss with respect to beta."""
    return torch.where(is_linear, 1, slope.square()) * _as_tensor(-0.5, slope)


def _quotient(value: Tensor, problem: Problem) -> Tensor:
    if problem.divisor is not None:
        return value / problem.divisor.to(value.dtype)
    if problem.divisor_number == 1:
        # (PyTorch 2.10 adds up what a DTensor's ranks hold before it divides.)
        return value
    return value / _as_tensor(problem.divisor_number, value)


def _as_tensor(value: float, like: Tensor) -> Tensor:
    """Return a number as a tensor of the same dtype.

    The product of a number and a tensor without dimensions would have a float64 tangent, and where
    make_fx traces a transform before autograd, products with numbers are not possible at all.
    """
    return like.new_full((), in_range(value, like.dtype))
