"""The rivals: each takes a workload and returns a step.

A step is one forward and backward, or the forward pass alone. All get the same tensors and give the
same two: the loss and the input's gradient (fresh at each step, in the input's type; None where a
workload wants none). Some choices make the rivals as strong as they can be:

- Masks. The formulas know none, so they multiply: the eager ones by floats, made before the clock
  starts, because a mixed-type product is slower there; the compiled ones by the bool tensor itself,
  a quarter of the bytes and converted for free inside the loop.
- 16-bit operands are widened to float32 first, as torch.autocast does for `smooth_l1_loss`; without
  it a float16 sum overflows, and the mask-blended form is NaN.
- The compiled ones are specialised to each shape (`dynamic=False`), compile time not counted.
- FlagGems, a library of Triton operators, is there where it is installed, for a loss without
  weights on a GPU. Its operators are called; PyTorch's stay as they are.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 (the name PyTorch users know it by)

from bench.workloads import Workload, drafter_normalizer
from fused_smoothl1 import functional, smooth_l1_loss

ATEN_REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}  # as PyTorch's operators number them
Step = Callable[[], tuple[Tensor, Tensor | None]]
Formula = Callable[..., Tensor]  # of the arguments of `smooth_l1_loss`


@dataclass(frozen=True)
class Rival:
    """A name, a function that makes steps, and for which workloads it does.

    `what` says in a line what it is, where the name does not.
    """

    name: str
    step: Callable[[Workload], Step]
    is_rival_of: Callable[[Workload], bool] = lambda workload: True
    compiles: bool = False
    what: str | None = None


def classic(
    input: Tensor,
    target: Tensor,
    inside: Tensor | None = None,
    outside: Tensor | None = None,
    *,
    sigma: float,
    reduction: str,
    normalizer: Tensor | None = None,
) -> Tensor:
    """Blend the two branches by multiplying each with a 0/1 tensor, as the copied form does."""
    sigma_squared = sigma**2
    x = _weighted(_widen(input) - _widen(target), inside)
    size = torch.abs(x)
    is_small = (size < 1.0 / sigma_squared).detach().float()
    quadratic = torch.pow(x, 2) * (sigma_squared / 2.0)
    linear = size - 0.5 / sigma_squared
    blended = quadratic * is_small + linear * (1.0 - is_small)
    return _reduce(_weighted(blended, outside), normalizer, input.shape[0], reduction)


def composition(
    input: Tensor,
    target: Tensor,
    inside: Tensor | None = None,
    outside: Tensor | None = None,
    *,
    sigma: float = 1.0,
    beta: Tensor | None = None,
    reduction: str,
    normalizer: Tensor | None = None,
) -> Tensor:
    """Put the weights around F.smooth_l1_loss, and let it reduce where it can.

    It takes no tensor as beta: with one the formula is written out.
    """
    input, target = _widen(input), _widen(target)
    if inside is not None:
        # The difference is weighted once. Weighting both operands costs as much and cancels digits.
        input, target = inside * (input - target), input.new_zeros(()).expand_as(input)
    reduces = outside is None and beta is None and reduction != "batchmean"
    if beta is None:
        own = reduction if reduces else "none"
        loss = F.smooth_l1_loss(input, target, beta=sigma**-2, reduction=own)
    else:
        size = (input - target).abs()
        loss = torch.where(size < beta, 0.5 * size**2 / beta, size - 0.5 * beta)
    if reduces:
        return loss if normalizer is None else loss / normalizer
    return _reduce(_weighted(loss, outside), normalizer, input.shape[0], reduction)


def by_index(
    input: Tensor,
    target: Tensor,
    mask: Tensor,
    outside: None,
    *,
    sigma: float,
    reduction: str,
    normalizer: Tensor,
) -> Tensor:
    """Pick the selected rows, as detectors do: the host waits until it knows how many there are."""
    rows = torch.nonzero(mask.squeeze(1)).squeeze(1)
    input, target = _widen(input[rows]), _widen(target[rows])
    return F.smooth_l1_loss(input, target, beta=sigma**-2, reduction=reduction) / normalizer


def composition_for_drafter(
    input: Tensor, target: Tensor, inside: None, mask: Tensor, **options: Any
) -> Tensor:
    """Average over each hidden state, then over the selected tokens, as such training code does.

    The states stay in 16 bits, which is less to move; the mask's floats make the products float32.
    """
    losses = F.smooth_l1_loss(input, target, reduction="none")
    return torch.sum(torch.mean(mask.float() * losses, 2)) / (mask.sum() + 1e-5)


def fused_for_drafter(
    input: Tensor, target: Tensor, inside: None, mask: Tensor, **options: Any
) -> Tensor:
    """Call the library with all of the drafter's divisors as one normalizer."""
    options["normalizer"] = drafter_normalizer(mask, input.shape[-1])
    return smooth_l1_loss(input, target, inside, mask, **options)


def fused_on(backend: Any) -> Any:
    """Return `smooth_l1_loss` as it would be if the dispatch chose this `problem.Backend`."""
    namespace = {**vars(functional), "backend_for": lambda input: backend}
    code, defaults = smooth_l1_loss.__code__, smooth_l1_loss.__defaults__
    copy: Any = FunctionType(code, namespace, argdefs=defaults)
    copy.__kwdefaults__ = smooth_l1_loss.__kwdefaults__
    return copy


def autograd_step(formula: Formula, workload: Workload, *, masks_as_floats: bool = False) -> Step:
    """Call the formula and differentiate it with autograd.grad.

    So the gradient is handed over, never added to an old one. The upstream gradient is made
    beforehand: in training it comes from the total loss.
    """
    formula, input, options = _for_case(formula, workload), workload.input, workload.options
    operands = [
        t.float() if masks_as_floats and t is not None and t.dtype == torch.bool else t
        for t in workload.operands
    ]
    upstream = workload.upstream
    if upstream is None:
        upstream = torch.tensor(workload.loss_scale, device=input.device)

    def forward() -> tuple[Tensor, None]:
        return formula(input, *operands, **options), None

    def forward_and_backward() -> tuple[Tensor, Tensor]:
        loss = formula(input, *operands, **options)
        (gradient,) = torch.autograd.grad(loss, input, upstream)
        return loss.detach(), gradient

    return forward_and_backward if workload.backward else forward


def _widen(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _weighted(values: Tensor, weights: Tensor | None) -> Tensor:
    return values if weights is None else weights * values


def _reduce(values: Tensor, normalizer: Tensor | None, rows: int, reduction: str) -> Tensor:
    if reduction == "none":
        return values
    if reduction == "mean":
        return values.mean()
    if reduction == "batchmean":
        return values.sum() / rows
    return values.sum() if normalizer is None else values.sum() / normalizer


def _for_case(formula: Formula, workload: Workload) -> Formula:
    """Return what takes the formula's place on this workload, or the formula."""
    if workload.spec.case != "drafter":
        return formula
    in_place_of: dict[Formula, Formula] = {
        composition: composition_for_drafter,
        smooth_l1_loss: fused_for_drafter,
    }
    return in_place_of.get(formula, formula)


def _compiled_step(workload: Workload) -> Step:
    return autograd_step(_compiled(_for_case(composition, workload)), workload)


@cache
def _compiled(function: Callable[..., Any]) -> Any:
    return torch.compile(function, fullgraph=True, dynamic=False)


def _grad_and_value_step(workload: Workload) -> Step:
    compiled = _grad_and_value(_for_case(composition, workload), workload.loss_scale)
    operands, options = workload.operands, workload.options
    input = workload.input.detach()  # else torch.compile would prepare a second derivative

    def step() -> tuple[Tensor, Tensor]:
        gradient, (_, loss) = compiled(input, *operands, **options)
        return loss, gradient

    return step


@cache
def _grad_and_value(formula: Formula, scale: float) -> Any:
    def scaled(input: Tensor, *operands: Tensor | None, **options: Any) -> tuple[Tensor, Tensor]:
        loss = formula(input, *operands, **options)
        # There is no upstream gradient to pass here: the loss scale has to be part of the function.
        return loss * scale, loss

    return _compiled(torch.func.grad_and_value(scaled, has_aux=True))


@cache
def _flag_gems_operators() -> tuple[Formula, Formula]:
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


def _flag_gems(input: Tensor, target: Tensor, *weights: None, **options: Any) -> Any:
    return _FlagGems.apply(input, target, options["reduction"], options["sigma"] ** -2)


FUSED = "fused"
RIVALS = (
    Rival(
        "eager_classic",
        partial(autograd_step, classic, masks_as_floats=True),
        lambda workload: workload.is_weighted,
        what="the formula of Faster R-CNN ports, written out: both branches of every element, each"
        " multiplied by 0 or 1",
    ),
    Rival(
        "eager_composition",
        partial(autograd_step, composition, masks_as_floats=True),
        what="the best composition found in eager PyTorch: `F.smooth_l1_loss` with the weights"
        " around it; for tensor_beta the formula written out, for drafter EAGLE's own",
    ),
    Rival(
        "eager_index",
        partial(autograd_step, by_index),
        # A graph cannot wait for the host.
        lambda workload: workload.spec.case == "row_mask" and not workload.spec.graph,
        what="picks the selected rows with `nonzero` and indexing, as detectors do; on a GPU the"
        " host waits",
    ),
    Rival(
        "compile",
        _compiled_step,
        compiles=True,
        what="eager_composition under `torch.compile`, with an ordinary backward",
    ),
    Rival(
        "compile_grad_and_value",
        _grad_and_value_step,
        # Both come out of one pass: not where the loss of every element is out before the gradient.
        lambda workload: workload.backward and workload.reduction != "none",
        compiles=True,
        what="eager_composition and its gradient, by `torch.func.grad_and_value`, compiled as one"
        " function",
    ),
    Rival(
        "flag_gems",
        partial(autograd_step, _flag_gems),
        lambda w: (
            find_spec("flag_gems") is not None
            and w.input.is_cuda
            and not w.is_weighted
            and w.beta is None
        ),
        what="the operator of FlagGems, a library of Triton operators; without weights, on a GPU",
    ),
    Rival(FUSED, partial(autograd_step, smooth_l1_loss), what="this library's `smooth_l1_loss`"),
)


def lines_of(rivals: Sequence[Rival]) -> dict[str, str]:
    """Return what is said of each, by name."""
    return {rival.name: rival.what for rival in rivals if rival.what is not None}
