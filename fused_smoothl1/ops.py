"""The loss as a registered operator, for all that looks through a call: compile, export, DTensor.

Two operators, neither of which mutates anything: the loss with the gradients for an upstream
gradient of 1, and the gradients for any upstream gradient. They take numbers and tensors in
separate arguments, because a schema has no argument that is either. A result that is not wanted is
a tensor of no elements, because it has no optional results.
"""

import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from fused_smoothl1.composition import composition, differentiable_backward
from fused_smoothl1.contract import (
    NOTHING,
    Gradients,
    Needs,
    Problem,
    full_size_gradients,
    gradient_in_forward,
    is_mask,
    sum_to_weights,
)
from fused_smoothl1.dispatch import backend_for, is_eager, is_recorded, is_transformed


def smooth_l1(problem: Problem) -> Tensor:
    """Return the loss by operations that PyTorch's transformations can look through."""
    # The composition has every derivative and every batching rule, which the transforms of
    # functorch need; and in eager PyTorch it is what a compiler fuses best.
    if is_transformed() or is_eager(problem.input.device):
        return composition(problem)
    _register_sharding()
    needs = _needs(problem) if torch.is_grad_enabled() else NOTHING
    now = gradient_in_forward(problem, needs)
    results: Results = FORWARD(*_flatten(problem), now and needs[0], now and needs[1])
    return results[0]


# What both operators take of a `Problem`, in the order of `_flatten`. A number that a compiler has
# put a symbol for is a tensor by now, but for `count`.
PROBLEM = (
    "Tensor input, Tensor target, "
    "Tensor? inside, Tensor? outside, Tensor? divisor, Tensor? beta, "
    "float inside_number, float outside_number, float divisor_number, SymInt count, "
    "float beta_number, bool reduce, ScalarType loss_dtype"
)
TENSORS = 6

Results = tuple[Tensor, ...]
# How an operator computes: what it is given is a problem, the upstream gradient (of the second
# operator alone), and the needed gradients; what it gives is the loss (of the first) and these.
Way = Callable[[Problem, Tensor | None, Needs], tuple[Tensor | None, Gradients]]

# The operators outlive this module if it is imported anew, and would be defined twice then.
_namespace: Any = torch.ops.fused_smoothl1
if hasattr(_namespace, "_library"):
    _namespace._library._destroy()
_library = _namespace._library = torch.library.Library("fused_smoothl1", "DEF")
_library.define(
    f"forward({PROBLEM}, bool needs_input, bool needs_target) -> (Tensor, Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
_library.define(
    f"backward(Tensor upstream, {PROBLEM}, bool needs_input, bool needs_target, "
    "bool needs_inside, bool needs_outside) -> (Tensor, Tensor, Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
FORWARD = _namespace.forward.default
BACKWARD = _namespace.backward.default


def _real(
    problem: Problem, upstream: Tensor | None, needs: Needs
) -> tuple[Tensor | None, Gradients]:
    """By the backend."""
    backend = backend_for(problem.input)
    if upstream is None:
        return backend.forward(problem, needs, is_recorded=True)
    return None, backend.backward(problem, upstream, needs)


def _fake(
    problem: Problem, upstream: Tensor | None, needs: Needs
) -> tuple[Tensor | None, Gradients]:
    """By what is known of the results before there are any: shape, strides and dtype."""
    input, gradients = problem.input, full_size_gradients(problem, needs)
    if upstream is not None:
        return None, sum_to_weights(problem, gradients)
    if problem.reduce:
        return input.new_empty((), dtype=problem.loss_dtype), gradients
    return torch.empty_like(input, dtype=problem.loss_dtype), gradients


def _composed(
    problem: Problem, upstream: Tensor | None, needs: Needs
) -> tuple[Tensor | None, Gradients]:
    """By operations that PyTorch's transformations can look through."""
    if upstream is not None:
        return None, differentiable_backward(problem, upstream, needs)
    loss = composition(problem)
    return loss, differentiable_backward(problem, torch.ones_like(loss), needs)


def _forward(way: Way) -> Callable[..., Results]:
    def operator(*arguments: Any) -> Results:
        *given, needs_input, needs_target = arguments
        problem = _unflatten(*given)
        loss, gradients = way(problem, None, (needs_input, needs_target, False, False))
        return _present(problem.input, (loss, *gradients[:2]))

    return operator


def _backward(way: Way) -> Callable[..., Results]:
    def operator(upstream: Tensor, *arguments: Any) -> Results:
        problem = _unflatten(*arguments[:-4])
        return _present(problem.input, way(problem, upstream, arguments[-4:])[1])

    return operator


class _Forward(torch.autograd.Function):
    """The first operator; its gradient is the saved one times what arrives, if that is exact."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Results:
        ctx.set_materialize_grads(False)
        with torch._C._AutoDispatchBelowAutograd():
            results: Results = FORWARD(*arguments)
        ctx.save_for_backward(*arguments[:TENSORS], *results[1:])
        ctx.numbers = arguments[TENSORS:]
        return results

    @staticmethod
    def backward(ctx: Any, upstream: Any, *others: Any) -> tuple[Tensor | None, ...]:
        *tensors, grad_input, grad_target = ctx.saved_tensors
        *numbers, has_input, has_target = ctx.numbers
        if upstream is None or any(other is not None for other in others):
            # One of the gradients that were computed with the loss is differentiated itself.
            arguments = (*tensors, *ctx.numbers)
            above = (upstream, *others)
            return _pulled_back(_forward(_composed), arguments, ctx.needs_input_grad, above)
        needs: Needs = ctx.needs_input_grad[:4]
        is_saved = (
            needs == (has_input, has_target, False, False)
            # A graph of make_fx cuts off what is saved, and could not be differentiated again.
            and not is_recorded()
            # A product with what is not finite would make NaN of what masks exclude.
            and not _unflatten(*tensors, *numbers).has_masks
        )
        if is_saved:
            # In the wider dtype: a product of 16 bits with float32 may round the latter first.
            saved = (grad_input, grad_target)
            scaled = ((g.to(upstream.dtype) * upstream).to(g.dtype) for g in saved)
            gradients = (*scaled, upstream, upstream)
        else:
            gradients = BACKWARD(upstream, *tensors, *numbers, *needs)
        chosen = (g if needed else None for g, needed in zip(gradients, needs, strict=True))
        return *chosen, *(None for _ in ctx.needs_input_grad[4:])


class _Backward(torch.autograd.Function):
    """The second operator, whose own gradients are those of the composition."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Results:
        ctx.save_for_backward(*arguments[: 1 + TENSORS])
        ctx.numbers = arguments[1 + TENSORS :]
        with torch._C._AutoDispatchBelowAutograd():
            results: Results = BACKWARD(*arguments)
        return results

    @staticmethod
    def backward(ctx: Any, *upstreams: Tensor) -> tuple[Tensor | None, ...]:
        arguments = (*ctx.saved_tensors, *ctx.numbers)
        return _pulled_back(_backward(_composed), arguments, ctx.needs_input_grad, upstreams)


def _pulled_back(
    operator: Callable[..., Results],
    arguments: tuple[Any, ...],
    wanted: tuple[bool, ...],
    upstreams: tuple[Tensor | None, ...],
) -> tuple[Tensor | None, ...]:
    """Return the wanted gradients of a composed operator, for upstream gradients of its results."""
    with torch.enable_grad():
        # (By views, because what the arguments were computed from is not to be differentiated.)
        given = [v.view_as(v) if w else v for v, w in zip(arguments, wanted, strict=True)]
        results = operator(*given)
    pairs = [
        (result, torch.zeros_like(result) if upstream is None else upstream)
        for result, upstream in zip(results, upstreams, strict=True)
        if result.requires_grad
    ]
    found = iter(
        torch.autograd.grad(
            [result for result, _ in pairs],
            [value for value, is_wanted in zip(given, wanted, strict=True) if is_wanted],
            [upstream for _, upstream in pairs],
            create_graph=torch.is_grad_enabled(),
            allow_unused=True,
        )
    )
    return tuple(next(found) if is_wanted else None for is_wanted in wanted)


def _register(operator: Any, form: Callable[[Way], Callable[..., Results]], function: Any) -> None:
    composed, name = form(_composed), operator.__name__.partition(".")[0]

    def differentiated(*arguments: Any) -> Results:
        # A graph that was captured before may be transformed now. A Function like these would lose
        # the tangents, and functorch refuses it.
        results: Results = composed(*arguments) if is_transformed() else function.apply(*arguments)
        return results

    def batched(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> Any:
        """Call the operator for each sample."""
        given = tuple(zip(arguments, in_dims, strict=True))
        samples = [
            operator(*(value if dim is None else value.select(dim, i) for value, dim in given))
            for i in range(info.batch_size)
        ]
        results = tuple(torch.stack(parts) for parts in zip(*samples, strict=True))
        return results, (0,) * len(results)

    _library.impl(name, form(_real), "CompositeExplicitAutograd")
    _library.impl(name, differentiated, "Autograd")
    torch.library.register_fake(operator, form(_fake), lib=_library)
    torch.library.register_vmap(operator, batched, lib=_library)


_register(FORWARD, _forward, _Forward)
_register(BACKWARD, _backward, _Backward)


def _register_sharding() -> None:
    """Tell DTensor how to shard the operators, if it is in use: importing it takes a second."""
    if "torch.distributed.tensor" in sys.modules:
        import_module("fused_smoothl1.sharding")


# As in `dispatch`: torch.compile calls this while it traces.
_register_sharding._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _needs(problem: Problem) -> Needs:
    a, b, c, d = (isinstance(v, Tensor) and v.requires_grad for v in problem[:4])
    return a, b, c, d


def _flatten(problem: Problem) -> tuple[Any, ...]:
    """Return the operators' arguments: six tensors or None, then the numbers."""
    given = problem[:6]
    tensors = (v if isinstance(v, Tensor) else None for v in given)
    inside, outside, divisor, beta = (1.0 if isinstance(v, Tensor) else v for v in given[2:])
    # A number of elements may be symbolic, which only an integer argument can be.
    is_count = not isinstance(divisor, float)
    divisor, count = (1.0, divisor) if is_count else (divisor, 1)
    return *tensors, inside, outside, divisor, count, beta, problem.reduce, problem.loss_dtype


def _unflatten(*arguments: Any) -> Problem:
    input, target, *given = arguments[:TENSORS]
    inside, outside, divisor, count, beta, reduce, loss_dtype = arguments[TENSORS:]
    numbers = (inside, outside, count * divisor, beta)
    four = [number if t is None else t for t, number in zip(given, numbers, strict=True)]
    compute_dtype = torch.float64 if loss_dtype == torch.float64 else torch.float32
    has_masks = any(map(is_mask, four[:2]))
    return Problem._make((input, target, *four, reduce, compute_dtype, loss_dtype, has_masks))


def _present(input: Tensor, results: tuple[Tensor | None, ...]) -> Results:
    return tuple(input.new_empty(0) if result is None else result for result in results)
