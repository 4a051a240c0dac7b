"""The loss as a registered operator, for all that looks through a call: compile, export, DTensor.

Two operators, neither of which mutates anything: the loss with the gradients for an upstream
gradient of 1, and the gradients for any upstream gradient. They take numbers and tensors in
separate arguments, because a schema has no argument that is either. A result that is not wanted is
a tensor of no elements, because it has no optional results.
"""

import sys
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
from fused_smoothl1.dispatch import backend_for, is_eager, is_transformed


def smooth_l1(problem: Problem) -> Tensor:
    """Return the loss by operations that PyTorch's transformations can look through."""
    # The composition has every derivative and every batching rule, which the transforms of
    # functorch need; and in eager PyTorch it is what a compiler fuses best.
    if is_transformed() or is_eager(problem.input.device):
        return composition(problem)
    _register_sharding()
    needs = _needs(problem) if torch.is_grad_enabled() else NOTHING
    now = gradient_in_forward(problem, needs)
    results: tuple[Tensor, Tensor, Tensor] = forward(
        *_flatten(problem), now and needs[0], now and needs[1]
    )
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


@torch.library.custom_op(
    "fused_smoothl1::forward",
    mutates_args=(),
    schema=f"({PROBLEM}, bool needs_input, bool needs_target) -> (Tensor, Tensor, Tensor)",
)
def forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss and, where needed, the gradients for an upstream gradient of 1."""
    *given, needs_input, needs_target = arguments
    problem, needs = _unflatten(*given), (needs_input, needs_target, False, False)
    loss, gradients = backend_for(problem.input).forward(problem, needs, is_recorded=True)
    grad_input, grad_target, _, _ = _present(problem.input, gradients)
    return loss, grad_input, grad_target


@torch.library.custom_op(
    "fused_smoothl1::backward",
    mutates_args=(),
    schema=(
        f"(Tensor upstream, {PROBLEM}, bool needs_input, bool needs_target, bool needs_inside, "
        "bool needs_outside) -> (Tensor, Tensor, Tensor, Tensor)"
    ),
)
def backward(upstream: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the needed gradients for any upstream gradient."""
    problem, needs = _unflatten(*arguments[:-4]), arguments[-4:]
    backend = backend_for(problem.input)
    return _present(problem.input, backend.backward(problem, upstream, needs))


@forward.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    *given, needs_input, needs_target = arguments
    problem = _unflatten(*given)
    input = problem.input
    if problem.reduce:
        loss = input.new_empty((), dtype=problem.loss_dtype)
    else:
        loss = torch.empty_like(input, dtype=problem.loss_dtype)
    gradients = full_size_gradients(problem, (needs_input, needs_target, False, False))
    return loss, *_present(input, gradients)[:2]


@backward.register_fake
def _(upstream: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    problem = _unflatten(*arguments[:-4])
    gradients = sum_to_weights(problem, full_size_gradients(problem, arguments[-4:]))
    return _present(problem.input, gradients)


def _setup_forward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:TENSORS], *output[1:])
    ctx.numbers = inputs[TENSORS:]


def _backward_of_forward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    *tensors, grad_input, grad_target = ctx.saved_tensors
    *numbers, has_input, has_target = ctx.numbers
    needs: Needs = ctx.needs_input_grad[:4]
    # A saved gradient is not differentiable; and its product with an upstream gradient that is not
    # finite would make NaN of what masks exclude.
    is_saved = needs == (has_input, has_target, False, False)
    if is_saved and not torch.is_grad_enabled() and not _unflatten(*tensors, *numbers).has_masks:
        # In the wider dtype: a product of 16 bits with float32 may round the latter first.
        scaled = ((g.to(upstream.dtype) * upstream).to(g.dtype) for g in (grad_input, grad_target))
        gradients = (*scaled, upstream, upstream)
    else:
        gradients = backward(upstream, *tensors, *numbers, *needs)
    chosen = (g if needed else None for g, needed in zip(gradients, needs, strict=True))
    return *chosen, *(None for _ in ctx.needs_input_grad[4:])


def _setup_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[: TENSORS + 1])
    ctx.numbers = inputs[TENSORS + 1 :]


def _backward_of_backward(ctx: Any, *upstreams: Tensor) -> tuple[Tensor | None, ...]:
    upstream, *tensors = ctx.saved_tensors
    *numbers, a, b, c, d = ctx.numbers
    needs, wanted = (a, b, c, d), ctx.needs_input_grad[:5]
    problem = _unflatten(*tensors, *numbers)
    operands = (upstream, *problem[:4])

    def gradients_of(*chosen: Tensor) -> tuple[Tensor, ...]:
        values = iter(chosen)
        upstream, *four = (
            next(values) if is_wanted else operand
            for operand, is_wanted in zip(operands, wanted, strict=True)
        )
        found = differentiable_backward(Problem._make((*four, *problem[4:])), upstream, needs)
        return tuple(gradient for gradient in found if gradient is not None)

    pullback = torch.func.vjp(gradients_of, *_only(operands, wanted))[1]
    found = iter(pullback(tuple(_only(upstreams, needs))))
    gradients = (next(found) if is_wanted else None for is_wanted in wanted)
    return *gradients, *(None for _ in ctx.needs_input_grad[5:])


torch.library.register_autograd(forward, _backward_of_forward, setup_context=_setup_forward)
torch.library.register_autograd(backward, _backward_of_backward, setup_context=_setup_backward)


def _register_vmap(operator: Any) -> None:
    """Make torch.vmap over a graph that contains the operator call it for each sample."""

    @operator.register_vmap
    def _(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> Any:
        given = tuple(zip(arguments, in_dims, strict=True))
        samples = [
            operator(*(value if dim is None else value.select(dim, i) for value, dim in given))
            for i in range(info.batch_size)
        ]
        results = tuple(torch.stack(parts) for parts in zip(*samples, strict=True))
        return results, (0,) * len(results)


_register_vmap(forward)
_register_vmap(backward)


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


def _present(input: Tensor, gradients: Gradients) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    a, b, c, d = (input.new_empty(0) if g is None else g for g in gradients)
    return a, b, c, d


def _only(values: Any, chosen: Any) -> list[Any]:
    return [value for value, is_chosen in zip(values, chosen, strict=True) if is_chosen]
