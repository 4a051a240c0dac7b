"""The registered operators: what torch.library asks of one, autograd through it, and no data."""

import math
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close
from torch.utils._pytree import tree_map_only

from fused_smoothl1 import ops, smooth_l1_loss
from fused_smoothl1.problem import NO_NEEDS, Problem, gradient_in_forward, make_problem
from tests import support
from tests.support import CALLS, DEVICE, KINDS, REDUCTIONS, Loss, boxes, call, results, values

pytestmark = support.on_both

Case = tuple[list[Any], dict[str, Any]]  # operands and options
ALL = "float64 dense, a beta each, all gradients"
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t,
    "channels_last": lambda t: t.to(memory_format=torch.channels_last),
    "transposed": lambda t: t.transpose(1, 3),
    "sliced": lambda t: t[:, ::2, :, 1:],
    "expanded": lambda t: t[:, :1].expand_as(t),
    "empty": lambda t: t.new_zeros(2, 0, 3, 5),
    "scalar": lambda t: t[0, 0, 0, 0],
}
# (Of this one PyTorch's own operations have other strides with data than without.)
EMPTY = {"empty channels_last": lambda t: t.to(memory_format=torch.channels_last)[:0]}


def laid_out(view: Callable[[Tensor], Tensor], **options: Any) -> Case:
    input = view(values(2, 4, 3, 5, dtype=torch.float16)).requires_grad_()
    return [input, torch.zeros_like(input)], {"reduction": "none", **options}


def only(*wanted: int) -> Case:
    """Return a sum of which these operands alone require a gradient."""
    needs = [i in wanted for i in range(4)]
    return boxes(6, (6, 4), (6, 1), grad=needs), {"reduction": "sum"}


PROBLEMS: dict[str, Callable[..., Case]] = {
    **{name: partial(call, name) for name in KINDS},
    **{name: partial(call, name) for name in CALLS if not name.startswith("float32 ")},
    **{name: partial(laid_out, view) for name, view in (LAYOUTS | EMPTY).items()},
    "elementwise, all gradients": partial(call, ALL, reduction="none"),
    "no gradient": only,
    "target alone": partial(only, 1),
    "outside weights alone": partial(only, 3),
    "weights alone": partial(only, 2, 3),
    "beta alone": lambda: (only()[0], {"beta": values(4).abs().requires_grad_()}),
    "float64 weights": lambda: (boxes(6, values(6, 1).double()), {"reduction": "none"}),
    "L1 by a tensor": lambda: ([values(6, 4, scale=0, grad=True)] * 2, {"beta": values(scale=0)}),
}


def problem_of(
    input: Tensor, target: Tensor, inside: Any = None, outside: Any = 1.0, **options: Any
) -> Problem:
    """Return what a call of the loss evaluates."""
    reduction, divisor = options.get("reduction", "mean"), options.get("normalizer")
    sizes = {"mean": input.numel(), "batchmean": math.prod(input.shape[:1])}
    given = {
        "outside": options.get("outside_weights", outside),
        "beta": options.get("beta", options.get("sigma", 1.0) ** -2),
        "divisor": sizes.get(reduction, 1.0) if divisor is None else divisor,
    }
    fields: dict[str, Any] = {
        name if isinstance(value, Tensor) else f"{name}_number": value
        for name, value in given.items()
    }
    return make_problem(input, target, inside, **fields, reduce=reduction != "none")


def forward_arguments(problem: Problem) -> tuple[Any, ...]:
    needs = ops.needs_of(problem)
    return *problem, *(needs if gradient_in_forward(problem, needs) else NO_NEEDS)


def operator(*operands: Any, **options: Any) -> Tensor:
    """Return the loss from the operator itself."""
    loss: Tensor = ops.FORWARD(*forward_arguments(problem_of(*operands, **options)))[0]
    return loss


@pytest.mark.parametrize("name", PROBLEMS)
def test_opcheck(name: str) -> None:
    """Real, fake, and under AOTAutograd with static and dynamic shapes; nothing is an alias."""
    operands, options = PROBLEMS[name]()
    problem = problem_of(*operands, **options)
    upstream = torch.ones_like(operator(*operands, **options)).requires_grad_()
    for checked in (
        torch.library.opcheck(ops.FORWARD, forward_arguments(problem)),
        torch.library.opcheck(ops.BACKWARD, (upstream, *problem, *ops.needs_of(problem))),
    ):
        assert len(checked) >= 4
        assert set(checked.values()) == {"SUCCESS"}


def test_schema_mutates_nothing() -> None:
    for schema in (ops.FORWARD._schema, ops.BACKWARD._schema):
        assert not schema.is_mutable
        assert all(result.alias_info is None for result in schema.returns)


@pytest.mark.parametrize("upstream", [1 / 3, math.inf, math.nan])
@pytest.mark.parametrize("name", PROBLEMS)
def test_gradients(name: str, upstream: float) -> None:
    """As on the plain path, also where masks exclude what arrives: 0 times inf would be NaN."""
    operands, options = PROBLEMS[name]()
    found = results(operator, operands, upstream, **options)
    with support.backend_set("eager"):
        expected = results(smooth_l1_loss, operands, upstream, **options)
    assert not found[0].dim() or found[0].stride() == torch.empty_like(operands[0]).stride()
    for one, other in zip(found, expected, strict=True):
        if one.dtype.itemsize == 2:
            support.assert_same("loss or gradient", one, other)
            # Were 1/3 rounded to 16 bits first, every other element would be another number.
            assert ((one != other) & ~other.isnan()).sum() <= 0.2 * one.numel()
        else:
            bound = 1e-12 if one.dtype == torch.float64 else 1e-6
            assert_close(one, other, rtol=bound, atol=bound, equal_nan=True)


@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize("name", [*KINDS, ALL])
def test_second_order(name: str, reduction: str) -> None:
    """A gradient penalty needs the graph of the gradient: the saved one has none."""
    operands, options = call(name, reduction=reduction)

    def second(function: Loss) -> tuple[Tensor, ...]:
        loss = function(*operands, **options)
        upstream = torch.full_like(loss, 0.7).requires_grad_()
        wanted = support.requiring_grad(operands, options)
        first = torch.autograd.grad(loss, wanted, upstream, create_graph=True)
        penalty = torch.stack([g.square().sum() for g in first]).sum()
        return torch.autograd.grad(penalty, [*wanted, upstream])

    found = second(operator)
    with support.backend_set("eager"):
        assert_close(found, second(smooth_l1_loss))
    assert found[-1].any()


def test_what_is_not_wanted_is_empty() -> None:
    """An operator has no optional results: these cost neither memory nor a launch."""
    problem = problem_of(*boxes(6, (1, 4), ()), beta=values(6, 1).abs())
    _, *gradients = ops.FORWARD(*problem, *(False, True, False, False, False))
    gradients += ops.BACKWARD(values(), *problem, *(False, True, False, True, True))
    assert [gradient.numel() for gradient in gradients] == [0, 24, 0, 24, 0, 1, 6]


@support.on_kernel
def test_shares_no_workspace() -> None:
    """What torch.compile records in a graph must not use memory that is kept for other calls."""
    from fused_smoothl1 import launch

    problem, needs = problem_of(*boxes((20_011,))), (True, False, False, False, False)
    launch._kept_workspace.cache_clear()
    loss, gradient, _ = ops.FORWARD(*problem, *needs)
    assert not launch._kept_workspace.cache_info().currsize
    expected, gradients = launch.forward(problem, needs)
    assert launch._kept_workspace.cache_info().currsize, "calls on a stream share one"
    support.assert_equal([loss, gradient], [expected, gradients[0]])


def on_meta(tensor: Tensor) -> Tensor:
    return tensor.detach().to("meta").requires_grad_(tensor.requires_grad)


@pytest.mark.parametrize("kind", ["meta", "fake"])
@pytest.mark.parametrize("name", [*KINDS, *LAYOUTS])
def test_without_data(name: str, kind: str) -> None:
    """Shapes, dtypes and strides of the loss and the gradients are known."""
    mode = FakeTensorMode()
    empty, context = (on_meta, nullcontext()) if kind == "meta" else (mode.from_tensor, mode)
    for reduction in REDUCTIONS:
        operands, options = PROBLEMS[name](reduction=reduction)
        real = results(smooth_l1_loss, operands, **options)
        operands, options = tree_map_only(Tensor, empty, (operands, options))
        with context:
            unreal = results(smooth_l1_loss, operands, **options)
        for one, other in zip(unreal, real, strict=True):
            assert one.device.type == ("meta" if kind == "meta" else DEVICE)
            assert (one.shape, one.dtype) == (other.shape, other.dtype)
            assert one.stride() == other.stride()
