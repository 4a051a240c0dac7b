"""The rules by which DTensor may run the operators are true: shards give what the whole gives.

Each rule is carried out in this process: the operands are cut as it says, the operator runs on each
part, and the results are put together as it says. Two real processes are in `test_distributed.py`.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_smoothl1 import ops
from fused_smoothl1.problem import OPERANDS, Problem, make_problem
from tests.support import coin, gaussian

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="waits for PyTorch with its distributed package"
)

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


def _problems(masks: bool) -> Iterator[Problem]:
    for (shape, inside, outside), reduce in itertools.product(SHAPES, (True, False)):

        def weights(own: Any, seed: int) -> Tensor | None:
            if own is None:
                return None
            return coin(*own, seed=seed) if masks else gaussian(*own, seed=seed)

        input, target = (gaussian(*shape, seed=s, dtype=torch.float64) for s in (1, 2))
        yield make_problem(
            input,
            target,
            weights(inside, 11),
            weights(outside, 12),
            None if outside is None else gaussian(*outside, seed=5).abs(),
            divisor=torch.tensor(3.0) if reduce else None,
            outside_number=0.5 if outside is None else 1.0,
            beta_number=0.5 if outside is None else 1.0,
            reduce=reduce,
        )


def _parts(argument: Any, placement: Any) -> tuple[Any, ...]:
    """Return what each rank has of an argument."""
    assert isinstance(argument, Tensor) == (placement is not None)
    if placement is None or placement.is_replicate():
        return (argument,) * RANKS
    assert placement.is_shard(), "no operand is a partial sum"
    parts: tuple[Tensor, ...] = argument.tensor_split(RANKS, placement.dim)
    return parts


def _whole(parts: tuple[Tensor, ...], placement: Any) -> Tensor:
    if placement.is_partial("sum"):
        return torch.stack(parts).sum(0)
    if placement.is_shard():
        assert placement.dim < parts[0].dim(), "what is not wanted has one dimension"
        return torch.cat(parts, placement.dim)
    assert all(torch.equal(part, parts[0]) for part in parts), "the ranks differ"
    return parts[0]


def _check(operator: Any, rules: Any, arguments: tuple[Any, ...]) -> set[Any]:
    """Carry out every rule; return where the input may be."""
    expected = operator(*arguments)
    position = int(operator is ops.BACKWARD)
    for outputs, inputs in rules:
        parts = map(_parts, arguments, inputs)
        found = zip(*(operator(*given) for given in zip(*parts, strict=True)), strict=True)
        for one, placement, other in zip(found, outputs, expected, strict=True):
            torch.testing.assert_close(_whole(one, placement), other)
    return {inputs[position] for _, inputs in rules}


def _every_placement(problem: Problem) -> set[Any]:
    from torch.distributed.tensor import Replicate, Shard

    return {Replicate(), *map(Shard, range(problem.input.dim()))}


@pytest.mark.parametrize("masks", [False, True])
def test_rules_of_forward(masks: bool, eager_backend: str) -> None:
    from fused_smoothl1.sharding import forward_rules

    for problem in _problems(masks):
        for pair in itertools.product((False, True), repeat=2):
            needs = *pair, False, False, False
            if any(needs) and not problem.reduce:
                continue  # These gradients come with a reduced loss only.
            arguments = *problem, *needs
            found = _check(ops.FORWARD, forward_rules(*arguments), arguments)
            assert found == _every_placement(problem)


@pytest.mark.parametrize("masks", [False, True])
def test_rules_of_backward(masks: bool, eager_backend: str) -> None:
    from fused_smoothl1.sharding import backward_rules

    for problem in _problems(masks):
        upstream = gaussian(
            *(() if problem.reduce else problem.input.shape), seed=5, dtype=problem.loss_dtype
        )
        for needs in itertools.product((False, True), repeat=OPERANDS):
            if not any(needs) or any(
                needed and not (isinstance(operand, Tensor) and operand.is_floating_point())
                for needed, operand in zip(needs, problem[:OPERANDS], strict=True)
            ):
                continue
            arguments = upstream, *problem, *needs
            found = _check(ops.BACKWARD, backward_rules(*arguments), arguments)
            assert found == _every_placement(problem)
