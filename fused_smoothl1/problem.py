"""One evaluation of the loss, in the kernel's own shape, and what its backends have in common.

A value that may be a tensor or a number has two fields: the tensor, which is None where the number
is used, and the number, which is 1 where the tensor is used.
"""

import math
from collections.abc import Callable
from textwrap import shorten
from typing import Final, NamedTuple, Protocol, TypeGuard

import torch
from torch import Tensor

# Which of (input, target, inside weights, outside weights, beta) need a gradient.
Needs = tuple[bool, bool, bool, bool, bool]
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]

NO_NEEDS: Needs = (False, False, False, False, False)
NO_GRADIENTS: Gradients = (None, None, None, None, None)
FLOAT_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
MASK_DTYPES = (torch.bool, torch.uint8)
# For each dtype of arithmetic: the dtypes that have its range, and its largest finite number.
FULL_RANGE = {
    torch.float32: (torch.float32, torch.bfloat16),
    torch.float64: (torch.float64,),
}
LARGEST = {dtype: torch.finfo(dtype).max for dtype in (torch.float32, torch.float64)}
# The first OPERANDS fields of a problem may need gradients, and the first TENSORS are tensors. From
# OUTSIDE on a number may stand for a tensor, TO_NUMBER fields behind it.
OUTSIDE: Final = 3
OPERANDS: Final = 5
TENSORS: Final = 6
TO_NUMBER: Final = 3


class Problem(NamedTuple):
    """One evaluation of the loss: checked operands on one device, and options that fit them."""

    input: Tensor
    """Any float dtype, any shape."""
    target: Tensor
    """Any float dtype, the input's shape."""
    inside: Tensor | None
    """Any real dtype, broadcasts to the input; one of `MASK_DTYPES` selects elements."""
    outside: Tensor | None
    """Like `inside`."""
    beta: Tensor | None
    """Where the quadratic part ends: any float dtype, broadcasts to the input.

    0 is L1, and where it is not in [0, inf), loss and gradients are NaN.
    """
    divisor: Tensor | None
    """One element that stays on its device: what the sum is divided by."""
    outside_number: float
    beta_number: float
    divisor_number: float
    compute_dtype: torch.dtype
    """The dtype of arithmetic and accumulation: float64 where any operand is, else float32."""
    loss_dtype: torch.dtype
    reduce: bool
    """Whether the loss is a sum over all elements, or one loss per element.

    (Why it stands behind the dtypes: see `ops.PROBLEM_SCHEMA`.)
    """
    has_masks: bool
    """Whether `inside` or `outside` is a mask. (Last: `autograd` and `ops` read it there.)"""


def make_problem(
    input: Tensor,
    target: Tensor,
    inside: Tensor | None = None,
    outside: Tensor | None = None,
    beta: Tensor | None = None,
    divisor: Tensor | None = None,
    outside_number: float = 1.0,
    beta_number: float = 1.0,
    divisor_number: float = 1.0,
    reduce: bool = True,
) -> Problem:
    """Return the problem with the dtypes that its operands lead to."""
    # As torch.promote_types, which would add an operation of its own to a traced graph.
    promoted, has_masks = input.dtype, False
    for operand in (target, inside, outside, beta):
        if operand is not None and operand.dtype != promoted:
            has_masks = has_masks or operand.dtype in MASK_DTYPES
            if operand.dtype == torch.float64 or promoted == torch.float64:
                promoted = torch.float64
            elif operand.dtype in FLOAT_DTYPES:
                promoted = torch.float32
    compute_dtype = torch.float64 if promoted == torch.float64 else torch.float32
    return Problem(
        input,
        target,
        inside,
        outside,
        beta,
        divisor,
        outside_number,
        beta_number,
        divisor_number,
        compute_dtype,
        compute_dtype if reduce else promoted,
        reduce,
        has_masks,
    )


class NoKernelError(Exception):
    """Why Triton's kernels cannot serve a device, and the way out."""

    def __init__(self, reason: str, way_out: str = "", error: Exception | None = None) -> None:
        """Take the error of PyTorch or Triton, if there is one behind it."""
        cause = f" ({type(error).__name__}: {shorten(str(error), 300)})" if error else ""
        super().__init__(f"{reason}{cause}{way_out and ': '}{way_out}")


class Backend(Protocol):
    """The loss of a `Problem`, by some means.

    Triton's may raise `NoKernelError`, before anything is computed.
    """

    def forward(
        self, problem: Problem, needs: Needs, *, may_be_replayed: bool = False
    ) -> tuple[Tensor, Gradients]:
        """Return the loss, and the needed gradients for an upstream gradient of 1.

        Only input and target may need one here, and only if `problem.reduce`. A call that may be
        replayed later must share no memory with other calls.
        """
        ...

    def backward(self, problem: Problem, upstream: Tensor, needs: Needs) -> Gradients:
        """Return the needed gradients for an upstream gradient of the loss's shape."""
        ...

    def scale(self, gradients: Gradients, upstream: Tensor, has_masks: bool) -> Gradients | None:
        """Multiply what `forward` returned by an upstream gradient, overwriting it.

        Return None where the product could turn excluded elements into NaN, because the upstream
        gradient is not known to be finite.
        """
        ...

    def recompute(
        self, problem: Problem, gradients: Gradients, upstream: Tensor, needs: Needs
    ) -> Gradients:
        """Return what `backward` does; the gradients from `forward` may be overwritten."""
        ...


def gradient_in_forward(problem: Problem, needs: Needs) -> bool:
    """Whether the forward pass may compute the gradients for an upstream gradient of 1.

    Not in a dtype of narrower range than the arithmetic's: float16 gradients underflow unless the
    upstream gradient of a loss scaler is already in them. Not for weights and beta: their gradients
    need temporaries and are summed to another shape.
    """
    needs_input, needs_target, needs_inside, needs_outside, needs_beta = needs
    wide = FULL_RANGE[problem.compute_dtype]
    return (
        problem.reduce
        and not (needs_inside or needs_outside or needs_beta)
        and (not needs_input or problem.input.dtype in wide)
        and (not needs_target or problem.target.dtype in wide)
    )


def beta_and_inverse(problem: Problem) -> tuple[float, float]:
    """Return the number beta, finite in the dtype of arithmetic, and its inverse.

    The inverse is inf where the loss is L1: if beta is 0, or so small that its inverse overflows.
    """
    beta, largest = problem.beta_number, LARGEST[problem.compute_dtype]
    # No difference lies beyond the largest number either.
    return (min(beta, largest), 1.0 / beta) if beta * largest >= 1.0 else (0.0, math.inf)


def tensor_beta(beta: Tensor, dtype: torch.dtype) -> Tensor:
    """Return beta in the dtype of arithmetic, and NaN where it is not in [0, inf)."""
    beta = beta.to(dtype)
    return nan_unless((beta >= 0) & (beta < math.inf), beta)


def is_l1(beta: Tensor) -> Tensor:
    """Return where the loss is L1, as in `beta_and_inverse`."""
    return beta * LARGEST[beta.dtype] < 1


def nan_unless(condition: Tensor, values: Tensor) -> Tensor:
    """Return the values, and NaN where the condition does not hold.

    It is a sum with NaN: if that took their place, they would get a gradient of 0.
    """
    return torch.where(condition, values, values + math.nan)


def in_range(number: float, dtype: torch.dtype) -> float:
    """Return the number, or inf or -inf where a tensor of this dtype refuses to hold it."""
    return math.copysign(math.inf, number) if abs(number) > LARGEST[dtype] else number


def is_mask(operand: Tensor | None) -> TypeGuard[Tensor]:
    """Whether this operand selects elements instead of multiplying them."""
    return operand is not None and operand.dtype in MASK_DTYPES


def split_weights(
    problem: Problem, as_tensor: Callable[[float], Tensor]
) -> tuple[list[Tensor], Tensor | None, Tensor | None]:
    """Return the masks, as bool, and what inside and outside weights multiply by; None is 1."""
    masks: list[Tensor] = []
    multipliers: list[Tensor | None] = []
    for weights in (problem.inside, problem.outside):
        if is_mask(weights):
            masks.append(weights if weights.dtype == torch.bool else weights != 0)
            weights = None
        multipliers.append(weights)
    inside, outside = multipliers
    if problem.outside_number != 1:
        outside = as_tensor(problem.outside_number)
    return masks, inside, outside


def empty_loss(problem: Problem) -> Tensor:
    """Allocate the loss; if it is not reduced, in the input's shape and memory format."""
    if problem.reduce:
        return problem.input.new_empty((), dtype=problem.loss_dtype)
    return torch.empty_like(problem.input, dtype=problem.loss_dtype)


def empty_gradients(problem: Problem, needs: Needs) -> Gradients:
    """Allocate the needed gradients, all of the input's shape and memory format.

    Those of weights and beta have the compute dtype, as they must not be rounded before they are
    summed.
    """
    input, dtype = problem.input, problem.compute_dtype
    return (
        torch.empty_like(input) if needs[0] else None,
        torch.empty_like(input, dtype=problem.target.dtype) if needs[1] else None,
        torch.empty_like(input, dtype=dtype) if needs[2] else None,
        torch.empty_like(input, dtype=dtype) if needs[3] else None,
        torch.empty_like(input, dtype=dtype) if needs[4] else None,
    )


def sum_to_operands(problem: Problem, gradients: Gradients) -> Gradients:
    """Sum the full-size gradients of broadcast operands to their shapes, in their dtypes."""

    def sum_to(operand: Tensor | None, gradient: Tensor | None) -> Tensor | None:
        if gradient is None or operand is None:
            return None
        return gradient.sum_to_size(operand.shape).to(operand.dtype)

    inside, outside, beta = map(sum_to, problem[2:OPERANDS], gradients[2:])
    return *gradients[:2], inside, outside, beta
