"""What a backend is given and what it gives back: the one contract that both of them keep."""

import math
from typing import Any, NamedTuple, Protocol, TypeGuard

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

# Which of (input, target, inside weights, outside weights) need a gradient.
Needs = tuple[bool, bool, bool, bool]
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]

NOTHING: Needs = (False, False, False, False)
FLOAT_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
MASK_DTYPES = (torch.bool, torch.uint8)
# For each dtype of arithmetic: the dtypes that have its range, and its largest finite number.
FULL_RANGE = {
    torch.float32: (torch.float32, torch.bfloat16),
    torch.float64: (torch.float64,),
}
# What tracers put in the place of numbers. (torch.compile shows numbers where it has symbols.)
SYMBOLS = (torch.SymFloat, torch.SymInt)
LARGEST = {dtype: torch.finfo(dtype).max for dtype in (torch.float32, torch.float64)}


class Problem(NamedTuple):
    """One evaluation of the loss: checked operands on one device, and options that fit them."""

    input: Tensor
    """Any float dtype, any shape."""
    target: Tensor
    """Any float dtype, the input's shape."""
    inside: Tensor | float
    """A factor, or a tensor that broadcasts to the input: of `MASK_DTYPES` it selects."""
    outside: Tensor | float
    """Like `inside`."""
    divisor: Tensor | float
    """What the sum is divided by: a number, or a tensor of one element that stays on its device."""
    beta: Tensor | float
    """Where the quadratic part ends, likewise; 0 is L1."""
    reduce: bool
    """Whether the loss is a sum over all elements, or one loss an element."""
    compute_dtype: torch.dtype
    """The dtype of arithmetic and accumulation: float64 where any operand is, else float32."""
    loss_dtype: torch.dtype
    """The dtype of the loss."""
    has_masks: bool
    """Whether `inside` or `outside` is a mask, so that some elements may not be selected."""


def make_problem(
    input: Tensor,
    target: Tensor,
    inside: Tensor | float,
    outside: Tensor | float,
    divisor: Tensor | float,
    sigma: float | None,
    beta: float | None,
    reduce: bool,
    plain: bool = True,
) -> Problem:
    """Return the problem with its dtypes, which the operands decide.

    One of sigma and beta is given. Unless the call is plain, a tracer may have put symbols in the
    place of numbers. These become tensors: an operator with a number as its argument is compiled
    anew for every value.
    """
    # As torch.promote_types, which would leave an operation of its own in a traced graph.
    promoted, has_masks = input.dtype, False
    for operand in (target, inside, outside):
        if isinstance(operand, Tensor) and operand.dtype != promoted:
            has_masks = has_masks or operand.dtype in MASK_DTYPES
            if operand.dtype == torch.float64 or promoted == torch.float64:
                promoted = torch.float64
            elif operand.dtype in FLOAT_DTYPES:
                promoted = torch.float32
    compute_dtype = torch.float64 if promoted == torch.float64 else torch.float32
    numbers: tuple[Any, ...] = (inside, outside, divisor, beta)
    one: Any = 1.0
    if not plain:
        symbols = [
            isinstance(v, (float, torch.SymFloat)) and not is_static(v) for v in (*numbers, sigma)
        ]
        if any(symbols):
            # (Made by new_ones, under torch.vmap the product would be compiled for every value.)
            ones = torch.ones((), dtype=compute_dtype, device=input.device)
            numbers = tuple(
                ones * v if is_symbol else v for v, is_symbol in zip(numbers, symbols, strict=False)
            )
            one = ones if symbols[-1] else one
    inside, outside, divisor, chosen_beta = numbers
    if sigma is not None:
        chosen_beta = one / sigma / sigma
    if isinstance(chosen_beta, Tensor):
        chosen_beta = chosen_beta.clamp(max=LARGEST[compute_dtype])  # Finite, as in `transition`.
    return Problem(
        input,
        target,
        inside,
        outside,
        divisor,
        chosen_beta,
        reduce,
        compute_dtype,
        compute_dtype if reduce else promoted,
        has_masks,
    )


class Backend(Protocol):
    """The loss of a `Problem`, by some means."""

    def forward(
        self, problem: Problem, needs: Needs, *, is_recorded: bool = False
    ) -> tuple[Tensor, Gradients]:
        """Return the loss, and those gradients for an upstream gradient of 1 that are needed.

        Only input and target may need one here, and only if `problem.reduce`. A call that is
        recorded may be replayed later: it must share no memory with other calls.
        """
        ...

    def backward(self, problem: Problem, upstream: Tensor, needs: Needs) -> Gradients:
        """Return the needed gradients for an upstream gradient of the loss's shape."""
        ...

    def rescale(
        self, gradients: Gradients, upstream: Tensor, has_masks: bool = False
    ) -> Gradients | None:
        """Multiply what `forward` returned by an upstream gradient, overwriting it.

        Or return None where the product may make NaN of what masks exclude: where the upstream
        gradient is not known to be finite.
        """
        ...

    def refresh(
        self, problem: Problem, gradients: Gradients, upstream: Tensor, needs: Needs
    ) -> Gradients:
        """Return what `backward` does, given what `forward` returned, which may be overwritten."""
        ...


def gradient_in_forward(problem: Problem, needs: Needs) -> bool:
    """Whether the forward pass may compute the gradients for an upstream gradient of 1.

    Not in a dtype of less range than the arithmetic's: in float16, gradients without the upstream
    gradient of a loss scaler in them underflow. Not for weights: their gradients need temporaries,
    and are summed up to another shape.
    """
    needs_input, needs_target, needs_inside, needs_outside = needs
    wide = FULL_RANGE[problem.compute_dtype]
    return (
        problem.reduce
        and not (needs_inside or needs_outside)
        and (not needs_input or problem.input.dtype in wide)
        and (not needs_target or problem.target.dtype in wide)
    )


def transition(problem: Problem) -> tuple[Tensor | float, Tensor | float]:
    """Return where the quadratic part ends, finite in the dtype of arithmetic, and 1 / beta.

    The latter is inf where the loss is L1: for a beta of 0, or one of which that dtype has no
    inverse.
    """
    beta, largest = problem.beta, LARGEST[problem.compute_dtype]
    if isinstance(beta, Tensor):
        return beta, beta.reciprocal()
    # Beyond the largest number there is no difference either.
    return (min(beta, largest), 1.0 / beta) if beta * largest >= 1.0 else (0.0, math.inf)


def is_static(number: float | torch.SymFloat | torch.SymInt) -> bool:
    """Whether this is a number, not what a tracer has put in its place to serve all numbers."""
    if not is_dynamo_compiling() and not isinstance(number, SYMBOLS):
        return True
    # Imported here because it imports SymPy, which only who traces has loaded already.
    from torch.fx.experimental.symbolic_shapes import has_static_value

    return has_static_value(number)


def may_hold(condition: bool) -> bool:
    """Whether a condition holds, or might: a tracer does not know the numbers that data decide."""
    if not is_dynamo_compiling() and not isinstance(condition, torch.SymBool):
        return bool(condition)
    from torch.fx.experimental.symbolic_shapes import guard_or_true

    return guard_or_true(condition)


def is_mask(weights: Tensor | float) -> TypeGuard[Tensor]:
    """Whether these weights select elements instead of multiplying them."""
    return isinstance(weights, Tensor) and weights.dtype in MASK_DTYPES


def full_size_gradients(problem: Problem, needs: Needs) -> Gradients:
    """Allocate the gradients, all of the input's shape and memory format.

    Those of weights have the compute dtype, because what is summed up must not be rounded before.
    """
    input, dtype = problem.input, problem.compute_dtype
    needs_input, needs_target, needs_inside, needs_outside = needs
    return (
        torch.empty_like(input) if needs_input else None,
        torch.empty_like(input, dtype=problem.target.dtype) if needs_target else None,
        torch.empty_like(input, dtype=dtype) if needs_inside else None,
        torch.empty_like(input, dtype=dtype) if needs_outside else None,
    )


def sum_to_weights(problem: Problem, gradients: Gradients) -> Gradients:
    """Sum full-size gradients of broadcast weights to the shape and dtype of the weights."""

    def summed(gradient: Tensor | None, weights: Tensor | float) -> Tensor | None:
        if gradient is None or not isinstance(weights, Tensor):
            return None
        return gradient.sum_to_size(weights.shape).to(weights.dtype)

    grad_input, grad_target, grad_inside, grad_outside = gradients
    return (
        grad_input,
        grad_target,
        summed(grad_inside, problem.inside),
        summed(grad_outside, problem.outside),
    )
