"""The backend in eager PyTorch, for the CPU and for whatever Triton cannot serve.

`forward`, `backward`, `scale` and `recompute` do what `problem.Backend` asks for, in few operations
over whole tensors: each of them costs, in small calls and on busy cores.
"""

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from fused_smoothl1.hooks import torch_smooth_l1, untraced
from fused_smoothl1.problem import (
    NO_GRADIENTS,
    OPERANDS,
    Gradients,
    Needs,
    Problem,
    beta_and_inverse,
    in_range,
    is_l1,
    is_mask,
    split_weights,
    sum_to_operands,
    tensor_beta,
)

# The gradient of PyTorch's own loss, and how it numbers the reductions.
smooth_l1_gradient: Any = torch.ops.aten.smooth_l1_loss_backward.grad_input
NONE, MEAN, SUM = 0, 1, 2
# The loss squares the difference, and its gradient multiplies it by the upstream gradient, before
# they divide by beta. Beyond these betas, ordinary numbers would underflow or overflow on the way.
LEAST_BETA, MOST_BETA = 2.0**-20, 2.0**20
INTEGERS = {torch.float32: torch.int32, torch.float64: torch.int64}

# Numbers of elements, as measured (bench/RESULTS.md).
NATIVE_BELOW = 1 << 18  # From here on it pays to compute the gradient with the loss.
PART_NUMEL = 1 << 22  # So many losses are held at once.
THREAD_NUMEL = (1 << 15) - 1  # So many PyTorch leaves to one thread.
GATHER_FROM = 1 << 17  # From here on it pays to gather selected rows,
GATHER_SHARE = 1 / 8  # if they are at most this share of all.

Masks = list[Tensor]  # All of bool. An element takes part if each of them selects it.
# A number, or a tensor that broadcasts to the input.
Factor = Tensor | float


class Terms(NamedTuple):
    """What the loss and its gradients are made of.

    Left minus right is the weighted difference: they are input and target without weights,
    conversions or an unusual beta, else that difference, in the compute dtype and 0 where not
    selected, and a 0-d 0.
    """

    left: Tensor
    right: Tensor
    inside: Tensor | None
    """What the inside weights multiply by; None is 1. `outside` likewise."""
    outside: Tensor | None
    beta: Factor
    inverse_beta: Factor
    steepness: Factor
    """A second factor of the inverse where the loss is L1, because one cannot be large enough."""
    masks: Masks


def native_loss(problem: Problem) -> Tensor | None:
    """Return PyTorch's own loss, connected to the graph of its operands, or None.

    It serves operands without weights, of the compute dtype, if the input is contiguous, the
    divisor 1 or their size, and beta ordinary. Not a large sum: its gradient is made with it.
    """
    if not (problem.inside is problem.outside is problem.beta is problem.divisor is None):
        return None
    input, target, divisor = problem.input, problem.target, problem.divisor_number
    # (The strides of dimensions of size 1 may be anything.)
    if 1 in input.shape and input.stride() != torch.empty(input.shape, device="meta").stride():
        return None
    numel, beta = input.numel(), _native_beta(beta_and_inverse(problem)[0])
    if not (
        problem.outside_number == 1
        and divisor in (1, numel)
        and input.dtype == target.dtype == problem.compute_dtype
        and input.is_contiguous()
        and beta
        and 0 < numel < (NATIVE_BELOW if problem.reduce else math.inf)
    ):
        return None
    reduction = (SUM if divisor == 1 else MEAN) if problem.reduce else NONE
    loss: Tensor = torch_smooth_l1(input, target, reduction, beta)
    return loss


@untraced
def forward(
    problem: Problem, needs: Needs, *, may_be_replayed: bool = False
) -> tuple[Tensor, Gradients]:
    """Return the loss and the needed gradients for an upstream gradient of 1."""
    rows = _few_rows(problem)
    if rows is not None:
        return _forward_of_rows(problem, needs, rows)
    terms = _terms(problem, needs)
    if not problem.reduce:
        return _cast(_losses(terms, terms.outside), problem.loss_dtype), NO_GRADIENTS
    numel, inverse_divisor = problem.input.numel(), _inverse_divisor(problem)
    if numel <= PART_NUMEL:
        total = _losses(terms, terms.outside).sum()
    else:
        sums = [_losses(part, part.outside).sum() for part in _parts(problem, terms)]
        total = torch.stack(sums).sum()
    # An empty sum is 0 whatever divides it: the number of positives may be 0 too.
    if inverse_divisor is not None and numel:
        total.mul_(inverse_divisor)
    return total, _gradients(problem, terms, inverse_divisor, needs) if any(needs) else NO_GRADIENTS


def backward(problem: Problem, upstream: Tensor, needs: Needs) -> Gradients:
    """Return the needed gradients for any upstream gradient."""
    terms, multiplier = _terms(problem, needs), _cast(upstream, problem.compute_dtype)
    if (inverse_divisor := _inverse_divisor(problem)) is not None:
        multiplier = multiplier * inverse_divisor
    grad_outside = _losses(terms, multiplier) if needs[3] else None
    gradients = _gradients(problem, terms, multiplier, needs)
    return sum_to_operands(problem, (*gradients[:3], grad_outside, gradients[4]))


def scale(gradients: Gradients, upstream: Tensor, has_masks: bool) -> Gradients | None:
    """Multiply what `forward` returned by the upstream gradient, in place."""
    if has_masks and not _is_known_to_be_finite(upstream):
        return None
    if not (upstream.is_cpu and upstream.item() == 1):
        for gradient in gradients:
            if gradient is not None:
                # Expanded, because a GPU would round a number to the gradient's 16 bits first.
                gradient.mul_(upstream.expand_as(gradient))
    return gradients


def recompute(problem: Problem, gradients: Gradients, upstream: Tensor, needs: Needs) -> Gradients:
    """Return what `backward` does."""
    return backward(problem, upstream, needs)


def _native_beta(beta: Factor) -> float | None:
    """Return beta if it is a number for which PyTorch's own loss keeps the contract, else None."""
    if isinstance(beta, Tensor):
        return None
    return beta if beta == 0 or LEAST_BETA <= beta <= MOST_BETA else None


def _few_rows(problem: Problem) -> Tensor | None:
    """Return which rows a row mask selects, if on a CPU it selects few of many."""
    input = problem.input
    if not (problem.has_masks and problem.reduce and input.is_cpu and input.numel() >= GATHER_FROM):
        return None
    mask = problem.inside if is_mask(problem.inside) else problem.outside
    shape = (len(input), *[1] * (input.dim() - 1))
    if mask is None or mask.shape != shape:
        return None
    if not 0 < int(mask.count_nonzero()) <= GATHER_SHARE * len(input):
        return None
    return mask.flatten().nonzero().flatten()


def _forward_of_rows(problem: Problem, needs: Needs, rows: Tensor) -> tuple[Tensor, Gradients]:
    """Return what `forward` does, computed from these rows alone: the others take no part.

    They come in batches small enough for one thread, so that none waits for another.
    """
    input = problem.input
    grad_input = torch.zeros_like(input) if needs[0] else None
    grad_target = torch.zeros_like(input, dtype=problem.target.dtype) if needs[1] else None
    losses: list[Tensor] = []
    for batch in rows.split(max(THREAD_NUMEL * len(input) // input.numel(), 1)):
        operands: Any = (
            operand
            if operand is None or operand.numel() == 1
            else operand.expand_as(input).index_select(0, batch)
            for operand in problem[:OPERANDS]
        )
        loss, gradients = forward(Problem._make((*operands, *problem[OPERANDS:])), needs)
        losses.append(loss)
        for whole, part in zip((grad_input, grad_target), gradients[:2], strict=True):
            if whole is not None and part is not None:
                whole.index_copy_(0, batch, part)
    return torch.stack(losses).sum(), (grad_input, grad_target, None, None, None)


def _terms(problem: Problem, needs: Needs) -> Terms:
    masks, inside, outside = split_weights(problem, lambda number: _number_tensor(number, problem))
    left, right, dtype = problem.input, problem.target, problem.compute_dtype
    beta, inverse_beta, steepness = _transition(problem, needs)
    is_bare = inside is outside is None and not masks and left.dtype == right.dtype == dtype
    if not (is_bare and _native_beta(beta)):
        left, right = _difference(problem), _number_tensor(0.0, problem)
        if inside is not None:
            left.mul_(inside)
        _exclude(left, masks)
    return Terms(left, right, inside, outside, beta, inverse_beta, steepness, masks)


def _transition(problem: Problem, needs: Needs) -> tuple[Factor, Factor, Factor]:
    """Return beta, and two factors of its inverse, in the compute dtype if they are tensors.

    Where the loss is L1 the inverse would be infinite, and 0 times inf is NaN. Multiplied by both
    factors, every number but 0 is at least 1 in size, and a clamp makes 1 or -1 of it.
    """
    beta, info = problem.beta, torch.finfo(problem.compute_dtype)
    if beta is not None and beta.is_cpu and not beta.dim() and not needs[4]:
        # A single number of a CPU need not be waited for. One that is not allowed stays a tensor.
        number = beta.item()
        if 0 <= number < math.inf:
            beta, problem = None, problem._replace(beta=None, beta_number=number)
    if beta is None:
        number, inverse = beta_and_inverse(problem)
        return (number, inverse, 1.0) if number else (0.0, 1 / info.tiny, 1 / info.eps)
    beta = tensor_beta(beta, problem.compute_dtype)
    steep = is_l1(beta)
    inverses = torch.where(steep, 1 / info.tiny, beta.reciprocal())
    return beta, inverses, torch.where(steep, 1 / info.eps, 1)


def _difference(problem: Problem) -> Tensor:
    difference = torch.empty_like(problem.input, dtype=problem.compute_dtype)
    if difference.dtype == problem.input.dtype:
        return torch.sub(problem.input, problem.target, out=difference)
    # Converted before the subtraction, which would round to the operands' dtype otherwise.
    # (A copy of float16 to float32 loses a pending negation in PyTorch 2.15 and older.)
    return difference.copy_(problem.input.resolve_neg()).sub_(problem.target)


def _parts(problem: Problem, terms: Terms) -> Iterator[Terms]:
    """Split those terms that have rows into parts of about `PART_NUMEL` elements."""
    input = problem.input
    step = max(PART_NUMEL * len(input) // input.numel(), 1)

    def part(term: Any, rows: slice) -> Any:
        if isinstance(term, list):
            return [part(mask, rows) for mask in term]
        if not isinstance(term, Tensor) or term.dim() < input.dim() or len(term) < len(input):
            return term
        return term[rows]

    for start in range(0, len(input), step):
        yield Terms._make(part(term, slice(start, start + step)) for term in terms)


def _losses(terms: Terms, weights: Tensor | None) -> Tensor:
    """Return the losses of the elements times these weights; what is not selected has 0."""
    left, beta = terms.left, terms.beta
    losses, native_beta = torch.empty_like(left), _native_beta(beta)
    if native_beta is not None:
        torch_smooth_l1(left, terms.right, NONE, native_beta, out=losses)
    else:  # The slope times (x - clamp(x) / 2), where nothing is squared.
        slopes, bound = (left * terms.inverse_beta).clamp_(-1, 1), cast(Any, beta)
        torch.clamp(left, -bound, bound, out=losses).mul_(-0.5).add_(left).mul_(slopes)
    if weights is not None:
        losses.mul_(weights)
    if weights is not None or isinstance(beta, Tensor):
        _exclude(losses, terms.masks)
    return losses


def _inverse_divisor(problem: Problem) -> Tensor | None:
    """Return what the sum is multiplied by, or None for 1."""
    if problem.divisor is not None:
        return _cast(problem.divisor, problem.compute_dtype).reciprocal()
    number = problem.divisor_number
    return None if number == 1 else _number_tensor(1.0 / number, problem)


def _gradients(
    problem: Problem, terms: Terms, multiplier: Tensor | None, needs: Needs
) -> Gradients:
    """Return the needed gradients but that of outside weights, times the multiplier (None is 1).

    A weighted difference among the terms is overwritten.
    """
    left, right, inside, outside, beta, inverse_beta, steepness, masks = terms
    grad_input = grad_target = grad_inside = grad_beta = None
    if right is problem.target:
        gradient = torch.empty_like(left)
        upstream = _number_tensor(1.0, problem) if multiplier is None else multiplier
        smooth_l1_gradient(upstream, left, right, NONE, beta, grad_input=gradient)
    else:
        for factor in (inverse_beta, steepness):
            if isinstance(factor, Tensor) or factor != 1:
                left.mul_(factor)
        gradient = left.clamp_(-1, 1)
        if needs[4] and isinstance(beta, Tensor):
            # (At 0 with beta 0 the loss is linear, though its slope is 0.)
            is_linear_at_0 = (gradient == 0).logical_and_(beta == 0)
            grad_beta = torch.square(gradient, out=torch.empty_like(gradient))
            grad_beta.masked_fill_(is_linear_at_0, 1).mul_(-0.5)
        for weights in (multiplier, outside):
            for product in (gradient, grad_beta):
                if weights is not None and product is not None:
                    product.mul_(weights)
        if grad_beta is not None:
            _exclude(grad_beta, masks)
    if needs[2]:
        grad_inside = _difference(problem).mul_(gradient)
        _exclude(grad_inside, masks)
    if inside is not None:
        gradient.mul_(inside)
    if masks and not all(map(_is_known_to_be_finite, (multiplier, outside, inside, inverse_beta))):
        _exclude(gradient, masks)
    if needs[0]:
        grad_input = _cast(gradient, problem.input.dtype)
    if needs[1]:
        negative = torch.neg(gradient, out=torch.empty_like(gradient) if needs[0] else gradient)
        grad_target = _cast(negative, problem.target.dtype)
    return grad_input, grad_target, grad_inside, None, grad_beta


def _exclude(values: Tensor, masks: Masks) -> None:
    """Set what is not selected to 0, whatever it is.

    As integers, because 0 times NaN is NaN, and a choice of values takes many times as long.
    """
    for mask in masks:
        values.view(INTEGERS[values.dtype]).mul_(mask)


def _is_known_to_be_finite(value: Factor | None) -> bool:
    """Whether a product with it leaves 0 at 0, as far as one can tell without waiting."""
    if not isinstance(value, Tensor):
        return True
    return value.is_cpu and not value.dim() and math.isfinite(value.item())


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _number_tensor(value: float, problem: Problem) -> Tensor:
    """Return a number as a tensor of the compute dtype, so that products cost less."""
    if problem.input.is_cpu:
        return _cached_tensor(value, problem.compute_dtype)
    dtype = problem.compute_dtype
    return problem.input.new_full((), in_range(value, dtype), dtype=dtype)


@lru_cache(maxsize=256)
def _cached_tensor(value: float, dtype: torch.dtype) -> Tensor:
    return torch.tensor(value, dtype=dtype, device="cpu")
