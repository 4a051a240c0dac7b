"""The backend in eager PyTorch, for the CPU and for whatever Triton cannot serve.

`forward`, `backward`, `rescale` and `refresh` keep the contract of `contract.Backend`. They go
through the operands block by block, in place, so that a small scratch is all they need beside the
results. `composition` is the same loss once more as a chain of differentiable operations, for those
who need its graph: double backward, and transformations that trace through it.
"""

import math
from collections.abc import Iterator
from itertools import product
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_smoothl1.contract import (
    Gradients,
    Needs,
    Problem,
    full_size_gradients,
    is_mask,
    sum_to_weights,
)
from fused_smoothl1.layout import broadcast_strides, collapse

# Elements in a block: its scratch and its part of each operand stay in the cache of a core or two.
BLOCK = 1 << 17


def forward(problem: Problem, needs: Needs) -> tuple[Tensor, Gradients]:
    """Return the loss and the needed gradients for an upstream gradient of 1."""
    divisor = problem.divisor
    if isinstance(divisor, Tensor):
        factor: Tensor | float = divisor.to(problem.compute_dtype).reciprocal()
    else:
        factor = 1.0 / divisor
    gradients = full_size_gradients(problem, needs)
    if not problem.reduce:
        loss = torch.empty_like(problem.input, dtype=problem.loss_dtype)
        _evaluate(problem, factor, gradients, loss, want_sum=False)
        return loss, gradients
    sums = _evaluate(problem, factor, gradients, None, want_sum=True)
    if not sums:
        # An empty sum is 0 whatever divides it: a count of positives may be 0 too.
        return problem.input.new_zeros((), dtype=problem.loss_dtype), gradients
    total = sums[0] if len(sums) == 1 else torch.stack(sums).sum()
    return total if _is_one(divisor) else total.div_(divisor), gradients


def backward(problem: Problem, upstream: Tensor, needs: Needs) -> Gradients:
    """Return the needed gradients for any upstream gradient."""
    divisor = problem.divisor
    factor = upstream.to(problem.compute_dtype)
    if isinstance(divisor, Tensor):
        factor = factor * divisor.to(problem.compute_dtype).reciprocal()
    elif divisor != 1:
        factor = factor * (1.0 / divisor)
    gradients = full_size_gradients(problem, needs)
    _evaluate(problem, factor, gradients, None, want_sum=False)
    return sum_to_weights(problem, gradients)


def rescale(gradients: Gradients, upstream: Tensor) -> Gradients:
    """Multiply what `forward` returned by the upstream gradient, in place."""
    if not _is_known_to_be_one(upstream):
        for gradient in gradients:
            if gradient is not None:
                gradient.mul_(upstream)
    return gradients


def refresh(problem: Problem, gradients: Gradients, upstream: Tensor, needs: Needs) -> Gradients:
    """Return the gradients that `forward` returned if they hold, and others otherwise."""
    return gradients if _is_known_to_be_one(upstream) else backward(problem, upstream, needs)


def composition(problem: Problem) -> Tensor:
    """Return the loss as a differentiable composition of PyTorch's own operations."""
    dtype = problem.compute_dtype
    difference = problem.input.to(dtype) - problem.target.to(dtype)
    weights: list[Tensor | float] = []
    selected: Tensor | None = None
    for weight in (problem.inside, problem.outside):
        if isinstance(weight, Tensor) and is_mask(weight):
            chosen = weight != 0
            selected = chosen if selected is None else selected & chosen
            weights.append(1.0)
        else:
            weights.append(weight.to(dtype) if isinstance(weight, Tensor) else weight)
    if selected is not None:
        # Whatever is not selected must be 0 before it meets a product: 0 times NaN is NaN.
        # (masked_fill would take the memory format of the mask.)
        difference = torch.where(selected, difference, 0)
        weights = [torch.where(selected, w, 0) if isinstance(w, Tensor) else w for w in weights]
    inside, outside = weights
    x = difference if _is_one(inside) else inside * difference
    if problem.inverse_beta < math.inf:
        # F.smooth_l1_loss gives gradients without the input's memory format.
        clamped = x.clamp(-problem.beta, problem.beta)
        loss = clamped / problem.beta * (x - 0.5 * clamped)
    else:
        loss = _sign(x.detach()) * x
    loss = loss if _is_one(outside) else outside * loss
    if selected is not None and not isinstance(outside, Tensor) and not math.isfinite(outside):
        loss = torch.where(selected, loss, 0)
    if problem.reduce:
        loss = loss.sum()
        loss = loss / problem.divisor if problem.input.numel() else loss
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


def _is_known_to_be_one(upstream: Tensor) -> bool:
    """Whether the upstream gradient is 1, as far as one can tell without waiting for a device."""
    return upstream.device.type == "cpu" and upstream.item() == 1


def _is_one(weights: Tensor | float) -> bool:
    return not isinstance(weights, Tensor) and weights == 1


def _sign(x: Tensor) -> Tensor:
    """Return the sign, which is NaN for NaN (torch.sign makes it 0)."""
    return torch.where(x.isnan(), x, x.sign())


class _Block(NamedTuple):
    """What one block of elements is computed from, and where its results go (None: not wanted)."""

    input: Tensor
    target: Tensor
    inside: Tensor | float
    outside: Tensor | float
    factor: Tensor | float
    loss: Tensor | None
    grad_input: Tensor | None
    grad_target: Tensor | None
    grad_inside: Tensor | None
    grad_outside: Tensor | None


def _evaluate(
    problem: Problem,
    factor: Tensor | float,
    gradients: Gradients,
    loss: Tensor | None,
    want_sum: bool,
) -> list[Tensor]:
    """Write the elementwise loss, and the gradients for a gradient `factor` of each element's loss.

    Returns the sums of the loss over each block, none if they are not wanted.
    """
    whole = _Block(*problem[:4], factor, loss, *gradients)
    inverse_beta = problem.inverse_beta
    sums = [_evaluate_block(block, problem, inverse_beta, want_sum) for block in _blocks(whole)]
    return [block_sum for block_sum in sums if block_sum is not None]


def _evaluate_block(
    block: _Block, problem: Problem, inverse_beta: float, want_sum: bool
) -> Tensor | None:
    """Evaluate one block. Its temporaries are few and small, and the next block reuses them."""
    input, target, inside, outside, factor, elementwise_loss, *gradients = block
    grad_input, grad_target, grad_inside, grad_outside = gradients
    excluded: Tensor | None = None
    if is_mask(inside):
        excluded, inside = inside == 0, 1.0
    if is_mask(outside):
        outside_excluded, outside = outside == 0, 1.0
        excluded = outside_excluded if excluded is None else excluded | outside_excluded

    x = _difference(input, target, problem.compute_dtype)
    if not _is_one(inside):
        x.mul_(inside)
    if excluded is not None:
        x.masked_fill_(excluded, 0)
        # The loss and the slope are 0 there now, and finite numbers leave them 0.
        if all(isinstance(v, float) and math.isfinite(v) for v in (inside, outside, factor)):
            excluded = None

    # The formula: the slope is clamp(x / beta, -1, 1), the loss slope * (x - clamp(x) / 2).
    slope = grad_input  # Which it becomes, in place.
    if slope is not None and slope.dtype != x.dtype:
        slope = None
    if inverse_beta == 1:
        clamped = slope = torch.clamp(x, -1, 1, out=slope)
    else:
        clamped = None
        slope = torch.mul(x, inverse_beta, out=slope).clamp_(-1, 1)
    if inverse_beta == math.inf:
        slope.masked_fill_(x == 0, 0)  # 0 times inf.

    block_sum: Tensor | None = None
    if want_sum or elementwise_loss is not None or grad_outside is not None:
        if clamped is None:
            clamped = x.clamp(-problem.beta, problem.beta)
        loss = x.sub_(clamped, alpha=0.5).mul_(slope)
        if grad_outside is not None:
            _write(grad_outside, torch.mul(loss, factor), excluded)
        if not _is_one(outside):
            loss.mul_(outside)
        if excluded is not None:
            loss.masked_fill_(excluded, 0)
        if elementwise_loss is not None:
            elementwise_loss.copy_(loss)
        if want_sum:
            block_sum = loss.sum()

    if grad_input is None and grad_target is None and grad_inside is None:
        return block_sum
    grad_x = slope if _is_one(outside) else slope.mul_(outside)
    if not _is_one(factor):
        grad_x.mul_(factor)
    if grad_inside is not None:
        difference = _difference(input, target, problem.compute_dtype)
        _write(grad_inside, difference.mul_(grad_x), excluded)
    gradient = grad_x if _is_one(inside) else grad_x.mul_(inside)
    if grad_target is not None:
        _write(grad_target, -gradient, excluded)
    if grad_input is not None:
        _write(grad_input, gradient, excluded)
    return block_sum


def _difference(input: Tensor, target: Tensor, dtype: torch.dtype) -> Tensor:
    # Converted before the subtraction, which would round to the operands' dtype otherwise.
    if input.dtype == dtype:
        return torch.sub(input, target)
    return input.to(dtype).sub_(target)


def _write(gradient: Tensor, values: Tensor, excluded: Tensor | None) -> None:
    if gradient is not values:
        gradient.copy_(values)
    if excluded is not None:
        gradient.masked_fill_(excluded, 0)


def _blocks(whole: _Block) -> Iterator[_Block]:
    """Split into blocks of at most `BLOCK` elements, all of them views, whatever the strides."""
    shape = whole.input.shape
    if whole.input.numel() <= BLOCK:
        if whole.input.numel():
            yield whole
        return
    # The order of the results, if there are any, because they are written.
    order = next((t for t in whole[5:] if isinstance(t, Tensor)), whole.input)
    strides = [
        broadcast_strides(t.shape, t.stride(), shape) for t in whole if isinstance(t, Tensor)
    ]
    sizes, collapsed = collapse(tuple(shape), (order.stride(), *strides))
    rest = iter(collapsed[1:])
    views = [
        t.as_strided(sizes, next(rest), t.storage_offset()) if isinstance(t, Tensor) else t
        for t in whole
    ]
    # The dimensions outside of `split` are walked one by one, and `split` itself in runs.
    split, inner = 0, prod(sizes[1:])
    while inner >= BLOCK:
        split += 1
        inner //= sizes[split]
    run = BLOCK // inner
    for outer in product(*(range(size) for size in sizes[:split])):
        for start in range(0, sizes[split], run):
            # As _Block, but a type checker cannot follow fields through a generator.
            fields: Any = (
                view[outer].narrow(0, start, min(run, sizes[split] - start))
                if isinstance(view, Tensor)
                else view
                for view in views
            )
            yield _Block(*fields)
