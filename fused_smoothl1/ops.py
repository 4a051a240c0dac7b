"""The loss as registered operators, for all that looks through a call: compile, export, DTensor.

`forward` is the loss with the gradients for an upstream gradient of 1, and `backward` the gradients
for any upstream gradient; neither mutates anything. Their arguments are the upstream gradient (of
`backward` alone), the fields of a `Problem`, and which gradients are needed. A result that is not
needed is an empty tensor, because a result cannot be None.
"""

from typing import Any, cast, get_type_hints

import torch
from torch import Tensor

from fused_smoothl1 import composition
from fused_smoothl1.dispatch import backend_for, is_eager
from fused_smoothl1.hooks import (
    below_autograd,
    is_in_make_fx,
    is_static,
    is_transformed,
    new_library,
)
from fused_smoothl1.problem import (
    LARGEST,
    NO_NEEDS,
    OPERANDS,
    OUTSIDE,
    TENSORS,
    TO_NUMBER,
    Gradients,
    Needs,
    Problem,
    empty_gradients,
    empty_loss,
    gradient_in_forward,
    sum_to_operands,
)

# The types of a problem's fields in a schema.
SCHEMA_TYPES = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    float: "float",
    torch.dtype: "ScalarType",
    bool: "bool",
}
# DTensor caches placements by the first integer argument, which a ScalarType is, and those behind
# it. So `reduce` and `needs`, which decide placements, must come later.
PROBLEM_SCHEMA = ", ".join(
    f"{SCHEMA_TYPES[kind]} {name}" for name, kind in get_type_hints(Problem).items()
)
# (torch.jit.trace knows no list of bools.)
NEEDS_SCHEMA = ", ".join(f"bool needs_{name}" for name in Problem._fields[:OPERANDS])
library = new_library("fused_smoothl1")
OPERAND_GRADIENTS = ", ".join(["Tensor"] * OPERANDS)
for schema in (
    f"forward({PROBLEM_SCHEMA}, {NEEDS_SCHEMA}) -> (Tensor, Tensor, Tensor)",
    f"backward(Tensor upstream, {PROBLEM_SCHEMA}, {NEEDS_SCHEMA}) -> ({OPERAND_GRADIENTS})",
):
    library.define(schema, tags=torch.Tag.pt2_compliant_tag)
FORWARD = torch.ops.fused_smoothl1.forward.default
BACKWARD = torch.ops.fused_smoothl1.backward.default
FIELDS = len(Problem._fields)
BETA = Problem._fields.index("beta")

Results = tuple[Tensor, ...]


def loss(problem: Problem, sigma: float | None) -> Tensor:
    """Return the loss by operations that PyTorch's transformations can look through.

    `sigma` is given if `beta_number` was computed from it.
    """
    problem = _without_symbols(problem, sigma)
    # The composition has every derivative and every batching rule, which the transforms of
    # functorch need; and in eager PyTorch it is what a compiler fuses best.
    if is_transformed() or is_eager(problem.input.device):
        return composition.loss(problem)
    needs = needs_of(problem) if torch.is_grad_enabled() else NO_NEEDS
    needs = needs if gradient_in_forward(problem, needs) else NO_NEEDS
    results: Results = FORWARD(*problem, *needs)
    return results[0]


def needs_of(problem: Problem) -> Needs:
    """Return which operands require a gradient."""
    needs = (t is not None and t.requires_grad for t in problem[:OPERANDS])
    return cast(Needs, tuple(needs))


def _without_symbols(problem: Problem, sigma: float | None) -> Problem:
    """Return the problem with tensors in the place of the symbols that a tracer has for numbers.

    Whatever takes such a symbol itself is compiled anew for every value, or cannot take it.
    """
    fields: list[Any] = list(problem)
    for tensor in range(OUTSIDE, TENSORS):
        number = fields[tensor + TO_NUMBER]
        if not is_static(number):
            # (With new_ones, the product would be compiled for every value under torch.vmap.)
            one: Any = torch.ones((), dtype=problem.compute_dtype, device=problem.input.device)
            value = one * number
            if tensor == BETA:
                if sigma is not None:
                    # PyTorch 2.11 compiles a quotient of symbols for every value.
                    value = one / sigma / sigma
                # Make it finite, as `beta_and_inverse` does.
                value = value.clamp(max=LARGEST[problem.compute_dtype])
            fields[tensor], fields[tensor + TO_NUMBER] = value, 1.0
    return Problem(*fields)


class _Shapes:
    """A backend that computes nothing: its results have shape, strides and dtype alone."""

    @staticmethod
    def forward(
        problem: Problem, needs: Needs, *, may_be_replayed: bool = False
    ) -> tuple[Tensor, Gradients]:
        return empty_loss(problem), empty_gradients(problem, needs)

    @staticmethod
    def backward(problem: Problem, upstream: Tensor, needs: Needs) -> Gradients:
        return sum_to_operands(problem, empty_gradients(problem, needs))


def _run(*arguments: Any) -> Results:
    """Return an operator's results from the backend."""
    problem = Problem(*arguments[-OPERANDS - FIELDS : -OPERANDS])
    return _results(arguments, backend_for(problem.input))


def _results(arguments: tuple[Any, ...], backend: Any) -> Results:
    """Return the results of an operator for its arguments, from this backend."""
    values, needs = arguments[:-OPERANDS], arguments[-OPERANDS:]
    problem = Problem(*values[-FIELDS:])
    results: tuple[Tensor | None, ...]
    if len(values) > FIELDS:
        results = backend.backward(problem, values[0], needs)
    else:
        loss, gradients = backend.forward(problem, needs, may_be_replayed=True)
        results = (loss, *gradients[:2])
    return tuple(problem.input.new_empty(0) if r is None else r for r in results)


class _Differentiable(torch.autograd.Function):
    """An operator as autograd sees it."""

    @staticmethod
    def forward(ctx: Any, operator: Any, *arguments: Any) -> Results:
        ctx.set_materialize_grads(False)
        with below_autograd():
            results: Results = operator(*arguments)
        end_of_tensors = TENSORS - FIELDS - OPERANDS
        gradients = results[1:] if operator is FORWARD else ()
        ctx.save_for_backward(*arguments[:end_of_tensors], *gradients)
        ctx.operator, ctx.options = operator, arguments[end_of_tensors:]
        return results

    @staticmethod
    def backward(ctx: Any, *upstreams: Any) -> tuple[Tensor | None, ...]:
        tensors, saved = ctx.saved_tensors, ()
        if ctx.operator is FORWARD:
            tensors, saved = tensors[:TENSORS], tensors[TENSORS:]
        arguments = *tensors, *ctx.options
        _, *needed = ctx.needs_input_grad
        upstream, *others = upstreams
        if not saved or upstream is None or any(other is not None for other in others):
            # A gradient is itself differentiated, perhaps one that was computed with the loss.
            return None, *_vjp(arguments, needed, upstreams)
        *_, has_masks = ctx.options[:-OPERANDS]
        needs = tuple(needed[:OPERANDS])
        if (
            needs == ctx.options[-OPERANDS:]
            # A graph of make_fx cuts off what is saved, so it could not be differentiated again.
            and not is_in_make_fx()
            # A product with what is not finite would turn excluded elements into NaN.
            and not has_masks
        ):
            # In the wider dtype: a product of 16 bits and float32 may round the latter first.
            products = ((g.to(upstream.dtype) * upstream).to(g.dtype) for g in saved)
            gradients = (*products, *[None] * (OPERANDS - 2))
        else:
            gradients = BACKWARD(upstream, *arguments[:-OPERANDS], *needs)
        rest = (None for _ in needed[OPERANDS:])
        return None, *(g if need else None for g, need in zip(gradients, needs, strict=True)), *rest


def _vjp(
    arguments: tuple[Any, ...], needed: list[bool], upstreams: tuple[Tensor | None, ...]
) -> tuple[Tensor | None, ...]:
    """Return the needed gradients of an operator, differentiable again."""
    sources = [v for v, need in zip(arguments, needed, strict=True) if need]

    def results(*sources: Tensor) -> Results:
        given = iter(sources)
        pairs = zip(arguments, needed, strict=True)
        return _composed(*(next(given) if need else v for v, need in pairs))

    def filled(found: Results) -> Results:
        pairs = zip(found, upstreams, strict=True)
        return tuple(torch.zeros_like(r) if upstream is None else upstream for r, upstream in pairs)

    if is_transformed():
        # Here autograd's own graph is out of sight. (Where it is not, hooks may save tensors, which
        # torch.func refuses.)
        found, pullback = cast(Any, torch.func.vjp(results, *sources))
        gradients = iter(pullback(filled(found)))
    else:
        with torch.enable_grad():
            # (Through views, so that nothing beyond the arguments themselves is differentiated.)
            views = [source.view_as(source) for source in sources]
            found = results(*views)
        pairs = [(r, u) for r, u in zip(found, filled(found), strict=True) if r.requires_grad]
        gradients = iter(
            torch.autograd.grad(
                [result for result, _ in pairs],
                views,
                [upstream for _, upstream in pairs],
                create_graph=torch.is_grad_enabled(),
                allow_unused=True,
            )
        )
    return tuple(next(gradients) if need else None for need in needed)


def _composed(*arguments: Any) -> Results:
    """Return an operator's results by operations that a transformation knows how to treat."""
    return _results(arguments, composition)


def _register(operator: Any) -> None:
    name = operator.__name__.partition(".")[0]

    def differentiable(*arguments: Any) -> Results:
        # A graph that was captured earlier may be transformed now. Functorch refuses the Function,
        # which would lose tangents.
        if is_transformed():
            return _composed(*arguments)
        results: Results = _Differentiable.apply(operator, *arguments)
        return results

    library.impl(name, _run, "CompositeExplicitAutograd")
    library.impl(name, differentiable, "Autograd")
    library.impl(name, _composed, "FuncTorchBatched")
    torch.library.register_fake(operator, lambda *a: _results(a, _Shapes), lib=library)


_register(FORWARD)
_register(BACKWARD)
