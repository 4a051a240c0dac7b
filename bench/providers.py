"""The rivals: each takes a workload and returns steps, a step being one forward and backward.

All get the same tensors and give the same two: the loss (0-d float32) and the input's gradient
(fresh at each step, in the input's type). Three choices make the rivals as strong as they can be:

- Masks. The formulas know no masks, so they multiply. The eager ones get the mask as floats, made
  before the clock starts, because a mixed-type product is slower there; the compiled ones get the
  bool tensor itself, a quarter of the bytes and converted for free inside the loop.
- 16-bit operands are widened to float32 first. It is what torch.autocast does to
  `smooth_l1_loss`; without it a float16 sum overflows, and the mask-blended form is NaN.
- The compiled ones are specialised to each shape (`dynamic=False`), compile time not counted.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from bench.cases import Workload
from fused_smoothl1 import smooth_l1_loss

Step = Callable[[], tuple[Tensor, Tensor]]
Weights = Tensor | None


class Operands(NamedTuple):
    """The loss's tensors beside the input."""

    target: Tensor
    inside: Weights
    outside: Weights
    normalizer: Tensor | None


class Options(NamedTuple):
    """The loss's options; sigma is in units of 1 / sqrt(beta)."""

    sigma: float
    reduction: str


Formula = Callable[[Tensor, Operands, Options], Tensor]


@dataclass(frozen=True)
class Provider:
    """A name and a function that makes one step for each copy of a workload."""

    name: str
    prepare: Callable[[Sequence[Workload]], list[Step]]


def forget_compiled() -> None:
    """Drop what torch.compile has made, so that a new shape is not taken for a dynamic one."""
    torch.compiler.reset()


def _widen(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _weighted(values: Tensor, weights: Weights) -> Tensor:
    return values if weights is None else weights * values


def _reduce(values: Tensor, normalizer: Tensor | None, rows: int, reduction: str) -> Tensor:
    if reduction == "mean":
        return values.mean()
    if reduction == "batchmean":
        return values.sum() / rows
    return values.sum() if normalizer is None else values.sum() / normalizer


def classic(input: Tensor, operands: Operands, options: Options) -> Tensor:
    """Blend the two branches by multiplying each with a 0/1 tensor, as the copied form does."""
    target, inside, outside, normalizer = operands
    sigma_squared = options.sigma**2
    x = _weighted(_widen(input) - _widen(target), inside)
    size = torch.abs(x)
    is_small = (size < 1.0 / sigma_squared).detach().float()
    quadratic = torch.pow(x, 2) * (sigma_squared / 2.0)
    linear = size - 0.5 / sigma_squared
    blended = quadratic * is_small + linear * (1.0 - is_small)
    return _reduce(_weighted(blended, outside), normalizer, input.shape[0], options.reduction)


def composition(input: Tensor, operands: Operands, options: Options) -> Tensor:
    """Put the weights around F.smooth_l1_loss, and let it reduce where it can."""
    target, inside, outside, normalizer = operands
    sigma, reduction = options
    input, target = _widen(input), _widen(target)
    if inside is not None:
        # The difference is weighted once. Weighting both operands costs as much and cancels digits.
        input, target = inside * (input - target), input.new_zeros(()).expand_as(input)
    reduces = outside is None and reduction != "batchmean"
    loss = functional.smooth_l1_loss(
        input, target, beta=sigma**-2, reduction=reduction if reduces else "none"
    )
    if reduces:
        return loss if normalizer is None else loss / normalizer
    return _reduce(_weighted(loss, outside), normalizer, input.shape[0], reduction)


def fused(input: Tensor, operands: Operands, options: Options) -> Tensor:
    """Call the library."""
    target, inside, outside, normalizer = operands
    sigma, reduction = options
    return smooth_l1_loss(
        input, target, inside, outside, sigma=sigma, reduction=reduction, normalizer=normalizer
    )


def _operands(workload: Workload) -> Operands:
    w = workload
    return Operands(w.target, w.inside_weights, w.outside_weights, w.normalizer)


def _options(workload: Workload) -> Options:
    return Options(workload.sigma, workload.reduction)


def _autograd_step(formula: Formula, workload: Workload, operands: Operands) -> Step:
    """Differentiate with autograd.grad: the gradient is handed over, never added to an old one.

    The upstream gradient is made beforehand: in training it comes from the total loss.
    """
    input, options = workload.input, _options(workload)
    upstream = torch.tensor(workload.loss_scale, device=input.device)

    def step() -> tuple[Tensor, Tensor]:
        loss = formula(input, operands, options)
        (gradient,) = torch.autograd.grad(loss, input, upstream)
        return loss.detach(), gradient

    return step


def _prepare_as_given(formula: Formula, copies: Sequence[Workload]) -> list[Step]:
    return [_autograd_step(formula, workload, _operands(workload)) for workload in copies]


def _prepare_as_floats(formula: Formula, copies: Sequence[Workload]) -> list[Step]:
    def without_masks(operands: Operands) -> Operands:
        inside, outside = (
            w.float() if w is not None and w.dtype == torch.bool else w
            for w in (operands.inside, operands.outside)
        )
        return operands._replace(inside=inside, outside=outside)

    return [_autograd_step(formula, w, without_masks(_operands(w))) for w in copies]


def _prepare_compile(copies: Sequence[Workload]) -> list[Step]:
    compiled = torch.compile(composition, fullgraph=True, dynamic=False)
    return _prepare_as_given(compiled, copies)


def _prepare_grad_and_value(copies: Sequence[Workload]) -> list[Step]:
    options, scale = _options(copies[0]), copies[0].loss_scale

    def scaled(input: Tensor, operands: Operands) -> tuple[Tensor, Tensor]:
        loss = composition(input, operands, options)
        # There is no upstream gradient to pass here: the loss scale has to be part of the function.
        return loss * scale, loss

    compiled = torch.compile(
        torch.func.grad_and_value(scaled, has_aux=True), fullgraph=True, dynamic=False
    )

    def step_for(workload: Workload) -> Step:
        operands = _operands(workload)
        input = workload.input.detach()  # else torch.compile would prepare a second derivative

        def step() -> tuple[Tensor, Tensor]:
            gradient, (_, loss) = compiled(input, operands)
            return loss, gradient

        return step

    return [step_for(workload) for workload in copies]


FUSED = "fused"
PROVIDERS = (
    Provider("eager_classic", partial(_prepare_as_floats, classic)),
    Provider("eager_composition", partial(_prepare_as_floats, composition)),
    Provider("compile", _prepare_compile),
    Provider("compile_grad_and_value", _prepare_grad_and_value),
    Provider(FUSED, partial(_prepare_as_given, fused)),
)
