"""The registered operators: what torch.library asks of one, autograd, no data, and shards.

A rule says how DTensor may run an operator. Each is carried out in this process: the operands are
cut as it says, the operator runs on each part, and the results are put together as it says. Two
real processes are in `test_distributed.py`.
"""

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
from fused_smoothl1.problem import NO_NEEDS, Problem, gradient_in_forward
from tests import support
from tests.composed import composed
from tests.support import CALLS, DEVICE, REDUCTIONS, Loss, boxes, call, results, values

pytestmark = support.on_both

Case = tuple[list[Any], dict[str, Any]]  # operands and options
LAYOUTS: dict[str, Callable[[], Tensor]] = {
    "expanded": lambda: values(2, 1, 3, 5).expand(2, 4, 3, 5),
    "empty": lambda: values(2, 0, 3, 5),
    "no dimensions": values,
}


def laid_out(input: Callable[[], Tensor], rows: int = 6, **options: Any) -> Case:
    return [input().requires_grad_(), input()], options


def only(wanted: tuple[int, ...], rows: int = 6, **options: Any) -> Case:
    """Return a call in which these operands alone require a gradient."""
    needs = [i in wanted for i in range(5)]
    *operands, beta = boxes(rows, (rows, 4), (rows, 1), (4,), grad=needs)
    beta.data.abs_()
    return operands, {"reduction": "sum", "beta": beta, **options}


KNOWN: dict[str, Callable[..., Case]] = {
    **{name: partial(call, name) for name in CALLS},
    **{name: partial(laid_out, input) for name, input in LAYOUTS.items()},
}
PROBLEMS: dict[str, Callable[..., Case]] = {
    **KNOWN,
    "target alone": partial(only, (1,)),
    "outside weights alone": partial(only, (3,)),
    "both weights alone": partial(only, (2, 3)),
    "beta alone": partial(only, (4,)),
}


def in_float64(case: Case) -> Case:
    """Return the call in float64, where sums need no tolerance of their own."""

    def wide(t: Tensor) -> Tensor:
        return t.detach().double().requires_grad_(t.requires_grad) if t.is_floating_point() else t

    return tree_map_only(Tensor, wide, case)  # type: ignore[no-any-return]


def problem_of(*operands: Any, **options: Any) -> Any:
    """Return what a call of the loss evaluates, as the operators get it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fused_smoothl1.functional.is_plain", lambda problem: False)
        patch.setattr(ops, "loss", lambda problem, sigma: problem)
        return smooth_l1_loss(*operands, **options)


def forward_arguments(problem: Problem) -> tuple[Any, ...]:
    needs = ops.needs_of(problem)
    return *problem, *(needs if gradient_in_forward(problem, needs) else NO_NEEDS)


def arguments_of(problem: Problem) -> dict[str, tuple[Any, ...]]:
    """Return the arguments of both operators, for the gradients that are required."""
    loss = ops.FORWARD(*problem, *NO_NEEDS)[0]
    upstream = torch.linspace(1, 2, loss.numel()).to(loss).view_as(loss).requires_grad_()
    return {
        "forward": forward_arguments(problem),
        "backward": (upstream, *problem, *ops.needs_of(problem)),
    }


def operator(*operands: Any, **options: Any) -> Tensor:
    """Return the loss from the operator itself."""
    loss: Tensor = ops.FORWARD(*forward_arguments(problem_of(*operands, **options)))[0]
    return loss


@pytest.mark.parametrize("name", PROBLEMS)
def test_opcheck(name: str) -> None:
    """Real, fake, and under AOTAutograd with static and dynamic shapes; nothing is an alias."""
    operands, options = PROBLEMS[name]()
    for which, arguments in arguments_of(problem_of(*operands, **options)).items():
        checked = torch.library.opcheck(getattr(torch.ops.fused_smoothl1, which), arguments)
        assert len(checked) >= 4
        assert set(checked.values()) == {"SUCCESS"}


@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_gradients(name: str, reduction: str) -> None:
    """Of three orders: the gradient that was saved with the loss has no graph."""
    operands, options = in_float64(PROBLEMS[name](reduction=reduction))
    wanted = support.requiring_grad(operands, options)

    def orders(function: Loss) -> list[Tensor]:
        loss = function(*operands, **options)
        upstream = torch.full_like(loss, 0.7).requires_grad_()
        found = [loss, *torch.autograd.grad(loss, wanted, upstream, create_graph=True)]
        for _ in range(2):
            penalty = torch.stack([one.square().sum() for one in found]).sum()
            graphs: Any = {"create_graph": True, "materialize_grads": True}
            found += torch.autograd.grad(penalty, [*wanted, upstream], **graphs)
        return found

    if wanted:
        found = orders(operator)
        with support.backend_set("eager"):
            assert_close(found, orders(smooth_l1_loss))


def test_an_upstream_gradient_is_not_rounded_to_16_bits() -> None:
    """That would change a third of the elements."""
    operands, options = call("bfloat16 dense", 300)
    _, found = results(operator, operands, 1 / 3, **options)
    _, expected = results(smooth_l1_loss, operands, 1 / 3, **options)
    assert (found != expected).sum() <= 0.2 * found.numel()


@support.on_kernel
def test_results_of_the_operator_are_differentiable() -> None:
    """Its gradient too, which a graph may hold by itself."""
    x, target = boxes(6, grad=2)
    found = ops.FORWARD(*forward_arguments(problem_of(x, target, beta=0.6)))
    loss = composed(x, target, beta=0.6)
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    assert_close(found, (loss, gradient, -gradient))
    for one, other in ((found[1], gradient), (found[2] + found[0], loss - gradient)):
        squares = (one.square().sum(), other.square().sum())
        assert_close(*(torch.autograd.grad(s, x, retain_graph=True) for s in squares))


@support.on_kernel
def test_shares_no_workspace() -> None:
    """What torch.compile records in a graph must not use memory that is kept for other calls."""
    from fused_smoothl1 import launch

    kept, operands = launch._kept_workspace, boxes((20_011,))
    for function, is_kept in ((operator, False), (smooth_l1_loss, True)):
        kept.cache_clear()
        function(*operands)
        assert bool(kept.cache_info().currsize) == is_kept


def on_meta(tensor: Tensor) -> Tensor:
    return tensor.detach().to("meta").requires_grad_(tensor.requires_grad)


@pytest.mark.parametrize("kind", ["meta", "fake"])
@pytest.mark.parametrize("name", KNOWN)
def test_without_data(name: str, kind: str) -> None:
    """Shapes, dtypes and strides of the loss and the gradients are known."""
    mode = FakeTensorMode()
    empty, context = (on_meta, nullcontext()) if kind == "meta" else (mode.from_tensor, mode)
    for reduction in REDUCTIONS:
        operands, options = KNOWN[name](reduction=reduction)
        real = results(smooth_l1_loss, operands, **options)
        operands, options = tree_map_only(Tensor, empty, (operands, options))
        with context:
            unreal = results(smooth_l1_loss, operands, **options)
        for one, other in zip(unreal, real, strict=True):
            assert one.device.type == ("meta" if kind == "meta" else DEVICE)
            assert (one.shape, one.dtype) == (other.shape, other.dtype)
            assert one.stride() == other.stride()


def parts(argument: Any, placement: Any) -> tuple[Any, ...]:
    """Return what each of two ranks has of an argument."""
    assert isinstance(argument, Tensor) == (placement is not None)
    if placement is None or placement.is_replicate():
        return argument, argument
    assert placement.is_shard(), "no operand is a partial sum"
    cut: tuple[Tensor, ...] = argument.tensor_split(2, placement.dim)
    return cut


def whole(parts: tuple[Tensor, ...], placement: Any) -> Tensor:
    if placement.is_partial("sum"):
        return torch.stack(parts).sum(0)
    if placement.is_shard():
        assert placement.dim < parts[0].dim(), "what is not wanted has one dimension"
        return torch.cat(parts, placement.dim)
    assert all(torch.equal(part, parts[0]) for part in parts), "the ranks differ"
    return parts[0]


@support.on_eager
@pytest.mark.skipif(
    not torch.distributed.is_available(), reason="waits for PyTorch with its distributed package"
)
@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_shards(name: str, reduction: str) -> None:
    """Each rule gives the whole result; one shards nothing, and each dimension has one."""
    from torch.distributed.tensor import Replicate, Shard

    from fused_smoothl1 import sharding

    for rows in (6, 1):  # Of one row, a rank has none.
        operands, options = in_float64(PROBLEMS[name](rows=rows, reduction=reduction))
        for which, arguments in arguments_of(problem_of(*operands, **options)).items():
            run, places = getattr(torch.ops.fused_smoothl1, which), set()
            expected = run(*arguments)
            for outputs, inputs in getattr(sharding, f"{which}_rules")(*arguments):
                ranks = zip(*map(parts, arguments, inputs), strict=True)
                found = zip(*(run(*given) for given in ranks), strict=True)
                assert_close([*map(whole, found, outputs)], [*expected], equal_nan=True)
                # (The input's; in backward the upstream gradient comes first.)
                places.add(inputs[which == "backward"])
            assert places == {Replicate(), *map(Shard, range(operands[0].dim()))}
