"""The rules by which DTensor may run the operators are true: shards give what the whole gives.

Each rule is carried out in this process: the operands are cut as it says, the operator runs on each
part, and the results are put together as it says. Two real processes are in `test_distributed.py`.
"""

from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from fused_smoothl1.problem import OPERANDS, make_problem
from tests import support
from tests.support import DEVICE, boxes, coin, values

RANKS = 2
# Of the input, the inside weights, and outside weights and beta: every number of dimensions, and
# sizes of 1 on either side.
SHAPES: list[tuple[Any, Any, Any]] = [
    ((6, 4), None, None),
    ((6, 4), (6, 1), (4,)),
    ((6, 4), (1, 4), ()),
    ((3, 5), (3, 5), (5,)),
    ((1, 4), (1, 1), (4,)),
    ((4, 1), (1,), (4, 1)),
    ((7,), (7,), (1,)),
    ((2, 3, 4), (3, 1), (2, 1, 4)),
    ((), (), None),
]


def calls(operator: str) -> Iterator[tuple[Any, ...]]:
    """Return arguments of an operator, for all gradients that it may be asked for."""
    for sizes, make, reduce in product(SHAPES, (values, coin), (True, False)):
        input, target = boxes(sizes[0], grad=0, dtype=torch.float64)
        inside, outside = (None if size is None else make(*size) for size in sizes[1:])
        beta = None if sizes[2] is None else values(*sizes[2]).abs()
        divisor = torch.tensor(3.0, device=DEVICE) if reduce else None
        problem = make_problem(input, target, inside, outside, beta, divisor, reduce=reduce)
        if operator == "forward":  # A reduced loss may come with the gradients of input and target.
            upstream, possible = [], [reduce] * 2 + [False] * 3
        else:
            upstream = [values(*(() if reduce else sizes[0]), dtype=problem.loss_dtype)]
            possible = [t is not None and t.is_floating_point() for t in problem[:OPERANDS]]
        for needs in product(*((False, True) if may_be else (False,) for may_be in possible)):
            yield *upstream, *problem, *needs


def parts(argument: Any, placement: Any) -> tuple[Any, ...]:
    """Return what each rank has of an argument."""
    assert isinstance(argument, Tensor) == (placement is not None)
    if placement is None or placement.is_replicate():
        return (argument,) * RANKS
    assert placement.is_shard(), "no operand is a partial sum"
    cut: tuple[Tensor, ...] = argument.tensor_split(RANKS, placement.dim)
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
@pytest.mark.parametrize("name", ["forward", "backward"])
def test_rules(name: str) -> None:
    """Of which there is one for each dimension of the input, and one that shards nothing."""
    from torch.distributed.tensor import Replicate, Shard

    from fused_smoothl1 import sharding

    operator = getattr(torch.ops.fused_smoothl1, name).default
    for arguments in calls(name):
        expected, places = operator(*arguments), set()
        for outputs, inputs in getattr(sharding, f"{name}_rules")(*arguments):
            ranks = zip(*map(parts, arguments, inputs), strict=True)
            found = zip(*(operator(*given) for given in ranks), strict=True)
            assert_close([*map(whole, found, outputs)], [*expected])
            places.add(inputs[name == "backward"])
        input = arguments[name == "backward"]
        assert places == {Replicate(), *map(Shard, range(input.dim()))}
