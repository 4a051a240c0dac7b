"""The rivals: each takes a workload and returns steps.

A step is one forward and backward, or the forward pass alone where there is none. All get the same
tensors and give the same two: the loss and the input's gradient (fresh at each step, in the input's
type; None where a workload wants none). Some choices make the rivals as strong as they can be:

- Masks. The formulas know no masks, so they multiply. The eager ones get the mask as floats, made
  before the clock starts, because a mixed-type product is slower there; the compiled ones get the
  bool tensor itself, a quarter of the bytes and converted for free inside the loop.
- 16-bit operands are widened to float32 first. It is what torch.autocast does to
  `smooth_l1_loss`; without it a float16 sum overflows, and the mask-blended form is NaN.
- The compiled ones are specialised to each shape (`dynamic=False`), compile time not counted.
- FlagGems, a library of Triton operators, is there where it is installed, for what it can compute:
  a loss without weights, on a GPU. Its operators are called; PyTorch's stay as they are.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from bench.cases import Workload, drafter_normalizer
from fused_smoothl1 import smooth_l1_loss

ATEN_REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}  # as PyTorch's operators number them
Step = Callable[[], tuple[Tensor, Tensor | None]]
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
    """A name and a function that makes one step for each copy of a workload it is a rival of."""

    name: str
    prepare: Callable[[Sequence[Workload]], list[Step]]
    is_rival_of: Callable[[Workload], bool] = lambda workload: True
    compiles: bool = False


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


def composition_for_drafter(input: Tensor, operands: Operands, options: Options) -> Tensor:
    """Average over each hidden state, then over the selected tokens, as such training code does.

    The states stay in 16 bits, which is less to move; the mask's floats make the products float32.
    """
    mask = operands.outside
    assert mask is not None
    losses = functional.smooth_l1_loss(input, operands.target, reduction="none")
    return torch.sum(torch.mean(mask.float() * losses, 2)) / (mask.sum() + 1e-5)


def fused_for_drafter(input: Tensor, operands: Operands, options: Options) -> Tensor:
    """Call the library with all of the drafter's divisors as one normalizer."""
    mask = operands.outside
    assert mask is not None
    return fused(input, operands._replace(normalizer=drafter_normalizer(mask)), options)


def _operands(workload: Workload) -> Operands:
    w = workload
    return Operands(w.target, w.inside_weights, w.outside_weights, w.normalizer)


def _options(workload: Workload) -> Options:
    return Options(workload.sigma, workload.reduction)


def _formula_of(formula: Formula, workload: Workload) -> Formula:
    """Return what takes the formula's place on this workload, or the formula."""
    if workload.spec.case != "drafter":
        return formula
    in_place_of: dict[Formula, Formula] = {
        composition: composition_for_drafter,
        fused: fused_for_drafter,
    }
    return in_place_of.get(formula, formula)


def _autograd_step(formula: Formula, workload: Workload, operands: Operands) -> Step:
    """Differentiate with autograd.grad: the gradient is handed over, never added to an old one.

    The upstream gradient is made beforehand: in training it comes from the total loss.
    """
    input, options, upstream = workload.input, _options(workload), workload.upstream
    if upstream is None:
        upstream = torch.tensor(workload.loss_scale, device=input.device)

    def forward() -> tuple[Tensor, None]:
        return formula(input, operands, options), None

    def forward_and_backward() -> tuple[Tensor, Tensor]:
        loss = formula(input, operands, options)
        (gradient,) = torch.autograd.grad(loss, input, upstream)
        return loss.detach(), gradient

    return forward_and_backward if workload.backward else forward


def _prepare_as_given(formula: Formula, copies: Sequence[Workload]) -> list[Step]:
    formula = _formula_of(formula, copies[0])
    return [_autograd_step(formula, workload, _operands(workload)) for workload in copies]


def _prepare_as_floats(formula: Formula, copies: Sequence[Workload]) -> list[Step]:
    formula = _formula_of(formula, copies[0])

    def without_masks(operands: Operands) -> Operands:
        inside, outside = (
            w.float() if w is not None and w.dtype == torch.bool else w
            for w in (operands.inside, operands.outside)
        )
        return operands._replace(inside=inside, outside=outside)

    return [_autograd_step(formula, w, without_masks(_operands(w))) for w in copies]


def _prepare_compile(copies: Sequence[Workload]) -> list[Step]:
    formula = _formula_of(composition, copies[0])
    return _prepare_as_given(torch.compile(formula, fullgraph=True, dynamic=False), copies)


def _prepare_grad_and_value(copies: Sequence[Workload]) -> list[Step]:
    options, scale = _options(copies[0]), copies[0].loss_scale
    formula = _formula_of(composition, copies[0])

    def scaled(input: Tensor, operands: Operands) -> tuple[Tensor, Tensor]:
        loss = formula(input, operands, options)
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


@cache
def _flag_gems_operators() -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """Return FlagGems's loss and its backward; 5.0.2 leaves the latter to PyTorch's operator."""
    try:
        module: Any = import_module("flag_gems.ops.smooth_l1_loss")
    except ModuleNotFoundError:
        module = import_module("flag_gems.experimental_ops.smooth_l1_loss")
    backward = getattr(
        module, "smooth_l1_loss_backward", torch.ops.aten.smooth_l1_loss_backward.default
    )
    return module.smooth_l1_loss, backward


class _FlagGems(torch.autograd.Function):
    """FlagGems's operators as PyTorch's autograd would call them, had they been registered."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, target: Tensor, reduction: str, beta: float) -> Tensor:
        loss, ctx.operator = _flag_gems_operators()
        ctx.save_for_backward(input, target)
        ctx.options = (ATEN_REDUCTIONS[reduction], beta)
        return loss(input, target, reduction=reduction, beta=beta)

    @staticmethod
    def backward(ctx: Any, *upstreams: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.operator(*upstreams, *ctx.saved_tensors, *ctx.options), None, None, None


def flag_gems(input: Tensor, operands: Operands, options: Options) -> Tensor:
    """Call FlagGems."""
    loss: Tensor = _FlagGems.apply(input, operands.target, options.reduction, options.sigma**-2)
    return loss


def _is_weighted(workload: Workload) -> bool:
    return workload.inside_weights is not None or workload.outside_weights is not None


def _has_value_and_gradient(workload: Workload) -> bool:
    """Whether both can come out of one pass: a loss of every element is out before the gradient."""
    return workload.backward and workload.reduction != "none"


def _is_for_flag_gems(workload: Workload) -> bool:
    is_there = find_spec("flag_gems") is not None
    return is_there and workload.input.is_cuda and not _is_weighted(workload)


FUSED = "fused"
PROVIDERS = (
    Provider("eager_classic", partial(_prepare_as_floats, classic), _is_weighted),
    Provider("eager_composition", partial(_prepare_as_floats, composition)),
    Provider("compile", _prepare_compile, compiles=True),
    Provider(
        "compile_grad_and_value", _prepare_grad_and_value, _has_value_and_gradient, compiles=True
    ),
    Provider("flag_gems", partial(_prepare_as_given, flag_gems), _is_for_flag_gems),
    Provider(FUSED, partial(_prepare_as_given, fused)),
)
