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

from fused_smoothl1 import eager
from fused_smoothl1.contract import (
    NOTHING,
    Gradients,
    Needs,
    Problem,
    full_size_gradients,
    gradient_in_forward,
    make_problem,
    sum_to_weights,
)
from fused_smoothl1.dispatch import backend_for, is_eager, is_transformed


def smooth_l1(problem: Problem) -> Tensor:
    """Return the loss by operations that PyTorch's transformations can look through."""
    # The composition has every derivative and every batching rule, which the transforms of
    # functorch need; and in eager PyTorch it is what a compiler fuses best.
    if is_transformed() or is_eager(problem.input.device):
        return eager.composition(problem)
    _register_sharding()
    needs = _needs(problem) if torch.is_grad_enabled() else NOTHING
    now = gradient_in_forward(problem, needs)
    results: tuple[Tensor, Tensor, Tensor] = forward(
        *_flatten(problem), now and needs[0], now and needs[1]
    )
    return results[0]


@torch.library.custom_op("fused_smoothl1::forward", mutates_args=())
def forward(
    input: Tensor,
    target: Tensor,
    inside: Tensor | None,
    outside: Tensor | None,
    divisor: Tensor | None,
    inside_number: float,
    outside_number: float,
    divisor_number: float,
    count: int,
    beta: float,
    reduce: bool,
    needs_input: bool,
    needs_target: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss and, where needed, the gradients for an upstream gradient of 1."""
    tensors = (input, target, inside, outside, divisor)
    problem = _unflatten(
        *tensors, inside_number, outside_number, divisor_number, count, beta, reduce
    )
    needs = (needs_input, needs_target, False, False)
    loss, gradients = backend_for(input).forward(problem, needs, is_recorded=True)
    grad_input, grad_target, _, _ = _present(input, gradients)
    return loss, grad_input, grad_target


@torch.library.custom_op("fused_smoothl1::backward", mutates_args=())
def backward(
    upstream: Tensor,
    input: Tensor,
    target: Tensor,
    inside: Tensor | None,
    outside: Tensor | None,
    divisor: Tensor | None,
    inside_number: float,
    outside_number: float,
    divisor_number: float,
    count: int,
    beta: float,
    reduce: bool,
    needs_input: bool,
    needs_target: bool,
    needs_inside: bool,
    needs_outside: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the needed gradients for any upstream gradient."""
    tensors = (input, target, inside, outside, divisor)
    problem = _unflatten(
        *tensors, inside_number, outside_number, divisor_number, count, beta, reduce
    )
    needs = (needs_input, needs_target, needs_inside, needs_outside)
    return _present(input, backend_for(input).backward(problem, upstream, needs))


@forward.register_fake
def _(input: Tensor, target: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    *problem_arguments, needs_input, needs_target = arguments
    problem = _unflatten(input, target, *problem_arguments)
    if problem.reduce:
        loss = input.new_empty((), dtype=problem.loss_dtype)
    else:
        loss = torch.empty_like(input, dtype=problem.loss_dtype)
    gradients = full_size_gradients(problem, (needs_input, needs_target, False, False))
    return loss, *_present(input, gradients)[:2]


@backward.register_fake
def _(upstream: Tensor, input: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    problem = _unflatten(input, *arguments[:-4])
    return _present(input, sum_to_weights(problem, full_size_gradients(problem, arguments[-4:])))


def _setup_forward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:5], *output[1:])
    ctx.numbers = inputs[5:]


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
    ctx.save_for_backward(*inputs[:6])
    ctx.numbers = inputs[6:]


def _backward_of_backward(ctx: Any, *upstreams: Tensor) -> tuple[Tensor | None, ...]:
    upstream, *tensors = ctx.saved_tensors
    *numbers, a, b, c, d = ctx.numbers
    needs, wanted = (a, b, c, d), ctx.needs_input_grad[:5]
    operands = (upstream, *_unflatten(*tensors, *numbers)[:4])

    def gradients_of(*chosen: Tensor) -> tuple[Tensor, ...]:
        values = iter(chosen)
        upstream, *four = (
            next(values) if is_wanted else operand
            for operand, is_wanted in zip(operands, wanted, strict=True)
        )
        problem = _unflatten(*tensors, *numbers)._replace(
            input=four[0], target=four[1], inside=four[2], outside=four[3]
        )
        found = eager.differentiable_backward(problem, upstream, needs)
        return tuple(gradient for gradient in found if gradient is not None)

    pullback = torch.func.vjp(gradients_of, *_only(operands, wanted))[1]
    found = iter(pullback(tuple(_only(upstreams, needs))))
    gradients = (next(found) if is_wanted else None for is_wanted in wanted)
    return *gradients, *(None for _ in ctx.needs_input_grad[5:])


torch.library.register_autograd(forward, _backward_of_forward, setup_context=_setup_forward)
torch.library.register_autograd(backward, _backward_of_backward, setup_context=_setup_backward)


@forward.register_vmap
def _(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> Any:
    *problem_arguments, needs_input, needs_target = arguments
    problem = _batched(info.batch_size, in_dims, problem_arguments)
    # One elementwise loss for the whole batch, not rounded yet, and then a sum for each sample.
    unrounded = problem._replace(input=problem.input.to(problem.compute_dtype))
    loss = forward(*_flatten(unrounded._replace(divisor=1, reduce=False)), False, False)[0]
    if problem.reduce:
        loss = (loss / problem.divisor).flatten(1).sum(1)
    needs = (needs_input, needs_target, False, False)
    gradients = _batched_backward(problem, torch.ones_like(loss), needs)
    return (loss.to(problem.loss_dtype), *gradients[:2]), (0, 0, 0)


@backward.register_vmap
def _(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> Any:
    upstream, *problem_arguments = arguments[:-4]
    problem = _batched(info.batch_size, in_dims[1:], problem_arguments)
    upstream = _batch_first(info.batch_size, in_dims[0], upstream)
    gradients = _batched_backward(problem, upstream, arguments[-4:])
    samples = (_unbatched_shape(in_dims[i + 1], arguments[i + 1]) for i in range(4))
    shaped = (
        gradient.view(info.batch_size, *shape) if needed else gradient
        for gradient, shape, needed in zip(gradients, samples, arguments[-4:], strict=True)
    )
    return tuple(shaped), (0, 0, 0, 0)


def _batched(size: int, in_dims: tuple[int | None, ...], arguments: Any) -> Problem:
    """Return the problem of a whole batch, with the batch as the first dimension of each tensor."""
    values = list(arguments)
    for position, dim in enumerate(in_dims[:5]):
        if values[position] is not None:
            first = _batch_first(size, dim, values[position])
            # Broadcasting aligns at the right, so the batch must stay left of all dimensions.
            values[position] = _pad_samples(first, values[0].dim() if position else first.dim())
    return _unflatten(*values)


def _batched_backward(problem: Problem, upstream: Tensor, needs: Needs) -> tuple[Tensor, ...]:
    """Return the needed gradients of each sample, for upstream gradients of each sample's loss."""
    factor = _pad_samples(upstream, problem.input.dim()) / problem.divisor
    elementwise = problem._replace(divisor=1, reduce=False)
    gradients = backward(factor.expand_as(problem.input), *_flatten(elementwise), *needs)
    return tuple(
        gradient if needed else gradient.expand(problem.input.shape[0], 0)
        for gradient, needed in zip(gradients, needs, strict=True)
    )


def _batch_first(size: int, dim: int | None, value: Tensor) -> Tensor:
    return value.expand(size, *value.shape) if dim is None else value.movedim(dim, 0)


def _pad_samples(value: Tensor, dims: int) -> Tensor:
    return value[(slice(None), *(None,) * (dims - value.dim()))]


def _unbatched_shape(dim: int | None, value: Tensor | None) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(value.shape if dim is None else value.movedim(dim, 0).shape[1:])


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
    """Return the operators' arguments: five tensors or None, then the numbers."""
    tensors = (v if isinstance(v, Tensor) else None for v in problem[:5])
    divisor = problem.divisor
    # A number of elements may be symbolic, which only an integer argument can be.
    is_count = isinstance(divisor, int | torch.SymInt)
    numbers = (problem.inside, problem.outside, 1.0 if is_count else divisor)
    return (
        *tensors,
        *(1.0 if isinstance(v, Tensor) else v for v in numbers),
        divisor if is_count else 1,
        problem.beta,
        problem.reduce,
    )


def _unflatten(
    input: Tensor,
    target: Tensor,
    inside: Tensor | None,
    outside: Tensor | None,
    divisor: Tensor | None,
    inside_number: float,
    outside_number: float,
    divisor_number: float,
    count: int,
    beta: float,
    reduce: bool,
) -> Problem:
    return make_problem(
        input,
        target,
        inside_number if inside is None else inside,
        outside_number if outside is None else outside,
        count * divisor_number if divisor is None else divisor,
        beta,
        reduce,
    )


def _present(input: Tensor, gradients: Gradients) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    a, b, c, d = (input.new_empty(0) if g is None else g for g in gradients)
    return a, b, c, d


def _only(values: Any, chosen: Any) -> list[Any]:
    return [value for value, is_chosen in zip(values, chosen, strict=True) if is_chosen]
