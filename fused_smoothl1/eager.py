"""The backend in eager PyTorch, for the CPU and for whatever Triton cannot serve.

`forward`, `backward`, `rescale` and `refresh` keep the contract of `contract.Backend`. They go
through the operands block by block, in place, so that a small scratch is all they need beside the
results.
"""

import math
from collections.abc import Iterator
from functools import lru_cache
from itertools import product
from math import prod
from typing import Any, TypeGuard

import torch
from torch import Tensor

from fused_smoothl1.contract import (
    Gradients,
    Needs,
    Problem,
    full_size_gradients,
    is_mask,
    sum_to_weights,
    transition,
)
from fused_smoothl1.layout import broadcast_strides, collapse

# Elements in a block: its scratch and its part of each operand stay in the caches, and the host
# time of its dozen operations does not show (measured: bench/RESULTS.md).
BLOCK = 1 << 18
# Bytes of the widest element that PyTorch knows.
WIDEST = 16


def forward(
    problem: Problem, needs: Needs, *, is_recorded: bool = False
) -> tuple[Tensor, Gradients]:
    """Return the loss and the needed gradients for an upstream gradient of 1."""
    factor = _factor(problem)
    gradients = full_size_gradients(problem, needs)
    if not problem.reduce:
        loss = torch.empty_like(problem.input, dtype=problem.loss_dtype)
        _evaluate(problem, factor, gradients, loss, want_sum=False)
        return loss, gradients
    if not problem.input.numel():
        # An empty sum is 0 whatever divides it: a count of positives may be 0 too.
        return problem.input.new_zeros((), dtype=problem.loss_dtype), gradients
    sums = _evaluate(problem, factor, gradients, None, want_sum=True)
    total = sums[0] if len(sums) == 1 else torch.stack(sums).sum()
    return total if _is_one(factor) else total.mul_(factor), gradients


def backward(problem: Problem, upstream: Tensor, needs: Needs) -> Gradients:
    """Return the needed gradients for any upstream gradient."""
    gradients = full_size_gradients(problem, needs)
    _differentiate(problem, upstream, gradients)
    return sum_to_weights(problem, gradients)


def rescale(gradients: Gradients, upstream: Tensor) -> Gradients:
    """Multiply what `forward` returned by the upstream gradient, in place."""
    if not _is_known_to_be_one(upstream):
        for gradient in gradients:
            if gradient is None:
                continue
            if gradient.is_cpu or gradient.dtype == upstream.dtype:
                gradient.mul_(upstream)
            else:  # Where a GPU would round the upstream gradient to 16 bits first.
                dense = gradient.as_strided((gradient.numel(),), (1,))
                for part in dense.split(BLOCK):
                    part.copy_(part.to(upstream.dtype).mul_(upstream))
    return gradients


def refresh(problem: Problem, gradients: Gradients, upstream: Tensor, needs: Needs) -> Gradients:
    """Compute the gradients anew, in place, unless the upstream gradient is known to be 1."""
    if not _is_known_to_be_one(upstream):
        _differentiate(problem, upstream, gradients)
    return gradients


def _differentiate(problem: Problem, upstream: Tensor, gradients: Gradients) -> None:
    """Write the gradients for this upstream gradient, all of full size."""
    factor, share = upstream.to(problem.compute_dtype), _factor(problem)
    if not _is_one(share):
        factor = factor * share
    _evaluate(problem, factor, gradients, None, want_sum=False)


def _factor(problem: Problem) -> Tensor | float:
    """Return what an element's gradient is multiplied by, for an upstream gradient of 1."""
    divisor, dtype = problem.divisor, problem.compute_dtype
    if isinstance(divisor, Tensor):
        return divisor.to(dtype).reciprocal()
    return 1.0 if divisor == 1 else _constant(1.0 / divisor, dtype)


@lru_cache(maxsize=256)
def _constant(value: float, dtype: torch.dtype) -> Tensor:
    """Return a number as a tensor: products with one cost a fraction of the host time."""
    return torch.tensor(value, dtype=torch.float64, device="cpu").to(dtype)


def _is_known_to_be_one(upstream: Tensor) -> bool:
    """Whether the upstream gradient is 1, as far as one can tell without waiting for a device."""
    return upstream.is_cpu and upstream.item() == 1


def _is_known_to_be_finite(weights: Tensor | float) -> bool:
    """Whether a product with finite numbers leaves 0 at 0, as far as one can tell likewise."""
    if isinstance(weights, Tensor) and (weights.dim() > 0 or not weights.is_cpu):
        return False
    return math.isfinite(weights)


def _is_one(value: Tensor | float) -> bool:
    return not isinstance(value, Tensor) and value == 1


def _evaluate(
    problem: Problem,
    factor: Tensor | float,
    gradients: Gradients,
    loss: Tensor | None,
    want_sum: bool,
) -> list[Any]:
    """Write the elementwise loss, and the gradients for a gradient `factor` of each element's loss.

    Returns the sum of the loss over each block, or None for each if it is not wanted.
    """
    given, results = (*problem[:4], factor), (loss, *gradients)
    is_small = problem.input.numel() <= BLOCK
    blocks = ((*given, *results),) if is_small else _blocks(given, results)
    return [_evaluate_block(problem, want_sum, *block) for block in blocks]


def _evaluate_block(
    problem: Problem,
    want_sum: bool,
    input: Tensor,
    target: Tensor,
    inside: Tensor | float,
    outside: Tensor | float,
    factor: Tensor | float,
    elementwise_loss: Tensor | None,
    grad_input: Tensor | None,
    grad_target: Tensor | None,
    grad_inside: Tensor | None,
    grad_outside: Tensor | None,
) -> Tensor | None:
    """Evaluate one block. Its temporaries are few and small, and the next block reuses them."""
    excluded: Tensor | None = None
    if problem.has_masks:
        if is_mask(inside):
            excluded, inside = _unselected(inside), 1.0
        if is_mask(outside):
            outside_excluded, outside = _unselected(outside), 1.0
            excluded = outside_excluded if excluded is None else excluded | outside_excluded

    is_weighted = not _is_one(inside)
    x = _difference(input, target, problem.compute_dtype)
    if is_weighted:
        x.mul_(inside)
    if excluded is not None:
        _exclude(x, excluded)
        # The loss and the slope are 0 there now, and finite numbers leave them 0. What is left
        # is the difference, which is a factor of the inside weights' gradient.
        if grad_inside is None and all(map(_is_known_to_be_finite, (inside, outside, factor))):
            excluded = None

    # The formula: the slope is clamp(x / beta, -1, 1), the loss slope * (x - clamp(x) / 2).
    slope = grad_input  # Which it becomes, in place.
    if slope is not None and slope.dtype != x.dtype:
        slope = None
    beta: Any
    beta, inverse_beta = transition(problem)
    if _is_one(beta):
        slope = torch.clamp(x, -1, 1, out=slope)
    else:
        slope = torch.mul(x, inverse_beta, out=slope).clamp_(-1, 1)
        if isinstance(inverse_beta, Tensor) or inverse_beta == math.inf:
            slope.masked_fill_(x == 0, 0)  # 0 times inf.
    want_loss = want_sum or elementwise_loss is not None
    if want_loss or grad_outside is not None:
        x.sub_(slope if _is_one(beta) else x.clamp(-beta, beta), alpha=0.5)
    if grad_outside is not None:
        _write(grad_outside, torch.mul(slope, x).mul_(factor), excluded)
    block_sum: Tensor | None = None
    if want_loss:
        loss = x.mul_(slope)
        if not _is_one(outside):
            loss.mul_(outside)
        if excluded is not None:
            _exclude(loss, excluded)
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
    gradient = grad_x.mul_(inside) if is_weighted else grad_x
    if grad_target is not None:
        _write(grad_target, -gradient, excluded)
    if grad_input is not None and (grad_input is not gradient or excluded is not None):
        _write(grad_input, gradient, excluded)
    return block_sum


def _difference(input: Tensor, target: Tensor, dtype: torch.dtype) -> Tensor:
    # Converted before the subtraction, which would round to the operands' dtype otherwise.
    if input.dtype == dtype:
        return input - target
    return input.to(dtype).sub_(target)


def _write(gradient: Tensor, values: Tensor, excluded: Tensor | None) -> None:
    if gradient is not values:
        gradient.copy_(values)
    if excluded is not None:
        _exclude(gradient, excluded)


def _unselected(mask: Tensor) -> Tensor:
    """Return what a mask does not select, once for all elements that share it."""
    once = tuple(slice(1) if step == 0 else slice(None) for step in mask.stride())
    return mask[once].logical_not()


def _exclude(values: Tensor, excluded: Tensor) -> None:
    """Set what is excluded to 0."""
    if values.is_cpu and excluded.shape[-1:] == (1,) and values.stride(-1) == 1:
        # A loop over the 4 coordinates of each box costs several times as much as the work in it.
        per_element = WIDEST // values.element_size()
        steps = (values.shape[-1], values.storage_offset(), *values.stride()[:-1])
        if not any(step % per_element for step in steps):
            values = values.view(torch.complex128)
    values.masked_fill_(excluded, 0)


def _blocks(
    given: tuple[Tensor | float, ...], results: tuple[Tensor | None, ...]
) -> Iterator[tuple[Any, ...]]:
    """Split what belongs to all elements into views of blocks of at most `BLOCK` elements.

    The first given is the input. Numbers belong to every block, and so does what has no dimensions:
    it may be a constant on the CPU, which as a view with dimensions would meet no other device.
    """

    def varies(value: Tensor | float | None) -> TypeGuard[Tensor]:
        return isinstance(value, Tensor) and value.dim() > 0

    whole = (*given, *results)
    tensors = [t for t in whole if varies(t)]
    shape = tensors[0].shape
    # The order of the results, if there are any, because they are written.
    order = next((t for t in results if t is not None), tensors[0])
    strides = [broadcast_strides(t.shape, t.stride(), shape) for t in tensors]
    sizes, collapsed = collapse(tuple(shape), (order.stride(), *strides))
    rest = iter(collapsed[1:])
    views = [t.as_strided(sizes, next(rest), t.storage_offset()) if varies(t) else t for t in whole]
    # The dimensions outside of `split` are walked one by one, and `split` itself in runs.
    split, inner = 0, prod(sizes[1:])
    while inner >= BLOCK:
        split += 1
        inner //= sizes[split]
    run = BLOCK // inner
    for outer in product(*(range(size) for size in sizes[:split])):
        for start in range(0, sizes[split], run):
            yield tuple(
                view[outer].narrow(0, start, min(run, sizes[split] - start))
                if varies(view)
                else view
                for view in views
            )
