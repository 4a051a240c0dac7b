"""How the kernel walks through its operands: every element is found, in the cheapest way there is.

The interpreter of these tests refuses addresses outside of an operand, and accesses that are not as
aligned as the plan says.
"""

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests import support
from tests.support import DEVICE, FLOATS, REDUCTIONS, Shape, check, values

pytestmark = support.on_kernel

Layout = tuple[Shape, Shape]  # sizes and strides
INT32_MAX = 2**31 - 1


@st.composite
def layouts(draw: st.DrawFn, shape: Shape) -> Layout:
    """Any permutation of the dimensions, with gaps between them or expanded."""
    strides, step = [0] * len(shape), 1
    for dim in draw(st.permutations(range(len(shape)))):
        if draw(st.integers(0, 9)):
            strides[dim] = step
            step = step * shape[dim] + draw(st.sampled_from([0, 0, 0, 1, 2, 4, 8]))
            step *= draw(st.sampled_from([1, 1, 1, 2]))
    return shape, tuple(strides)


@st.composite
def walks(draw: st.DrawFn) -> list[Layout | None]:
    """Input, target and weights, of sizes that wide accesses divide, or do not."""
    shape = tuple(draw(st.lists(st.sampled_from([1, 2, 3, 4, 8, 12, 16, 31]), max_size=4)))
    while math.prod(shape) > 2048:
        shape = shape[1:]
    operands: list[Layout | None] = [draw(layouts(shape)) for _ in range(2)]
    for _ in range(draw(st.integers(0, 2))):
        own = tuple(n if draw(st.booleans()) else 1 for n in shape)
        own = own[draw(st.integers(0, next((i for i, n in enumerate(own) if n > 1), 0))) :]
        operands.append(draw(st.none() | layouts(own) | layouts(shape)))
    return operands


def _plan(order: Shape, itemsize: int, *operands: Layout | None) -> Any:
    from fused_smoothl1 import launch

    assert operands[0] is not None
    return launch._plan(operands[0][0], order, operands, itemsize)


def _dense(*shape: int) -> Layout:
    return shape, tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))


def _furthest(layout: Layout) -> int:
    """Return the position of the last element in memory."""
    return sum((size - 1) * stride for size, stride in zip(*layout, strict=True))


def _positions(layout: Layout, shape: Shape) -> npt.NDArray[np.int64]:
    """Return where each element is of a tensor that broadcasts to the shape."""
    memory = torch.arange(_furthest(layout) + 1)
    return memory.as_strided(*layout).expand(shape).flatten().numpy()


def _best_accesses(found: npt.NDArray[np.int64], plan: Any) -> str:
    """Return the cheapest way to reach elements that lie there, or several that cost the same."""
    if not found.any():
        return "scalar"
    if np.array_equal(found, np.arange(found.size)):
        return "flat"
    if plan.lanes == 1:
        return "row vector strided"
    if plan.aligned:
        groups = found.reshape(-1, plan.lanes)
        if (groups == groups[:, :1]).all():
            return "row"
        is_contiguous = (groups - groups[:, :1] == np.arange(plan.lanes)).all()
        if is_contiguous and not (groups[:, 0] % plan.lanes).any():
            return "vector"
    return "strided"


@support.needs_no_gpu
@given(
    walk=walks(),
    reduction=st.sampled_from(REDUCTIONS),
    grad=st.booleans(),
    dtype=st.sampled_from(FLOATS),
)
def test_every_element_is_found(
    walk: list[Layout | None], reduction: str, grad: bool, dtype: torch.dtype
) -> None:
    """In the order of the outputs where there are any; otherwise in one order for all operands."""
    operands: list[Any] = [
        layout and values(_furthest(layout) + 1, dtype=dtype).as_strided(*layout) for layout in walk
    ]
    operands[0].requires_grad_(grad)
    check(*operands, reduction=reduction, upstream=1.5)


@given(walk=walks(), itemsize=st.sampled_from([2, 4, 8]))
def test_kinds_of_access(walk: list[Layout], itemsize: int) -> None:
    """In the order of outputs."""
    shape, strides = walk[0]
    order = torch.empty_like(torch.empty_strided(shape, strides, device="meta")).stride()
    plan = _plan(order, itemsize, *walk)
    written = np.argsort(_positions((shape, order), shape))
    for layout, access, steps in zip(walk, plan.access, plan.strides, strict=False):
        assert (access is None) == (layout is None)
        assert (steps is None) == (access in (None, "scalar", "flat"))
        if layout is not None:
            assert access in _best_accesses(_positions(layout, shape)[written], plan).split()
    assert (plan.sizes is None) == (not any(plan.strides))


@pytest.mark.parametrize("itemsize", [2, 4, 8])
@pytest.mark.parametrize("columns", [4, 5, 6, 8])
def test_groups(columns: int, itemsize: int) -> None:
    """An access may be half as wide as it could, if all of a group are of one row then."""
    dense, widest = _dense(9, columns), 16 // itemsize
    group = math.gcd(columns, widest)
    plan = _plan(dense[1], itemsize, dense, ((9, 1), (1, 1)))
    expected = (group, True) if 2 * group >= widest else (widest, False)
    assert (plan.lanes, plan.aligned) == expected
    plan = _plan(dense[1], itemsize, dense, dense)
    assert (plan.lanes, plan.aligned) == (widest, False)


LARGE = st.sampled_from([1, 2, 3, 4, 1000, 2**15, 2**16, 2**30, 2**31 - 1025, 2**31 - 1024])


@given(
    shape=st.lists(LARGE, min_size=1, max_size=3),
    steps=st.lists(st.integers(0, 2) | LARGE, min_size=3, max_size=3),
    itemsize=st.sampled_from([2, 4, 8]),
)
def test_32_bits_where_they_are_enough(shape: list[int], steps: list[int], itemsize: int) -> None:
    """For the largest number that the kernel computes on the way to an operand's elements."""
    dense, other = _dense(*shape), (tuple(shape), tuple(steps[: len(shape)]))
    plan = _plan(dense[1], itemsize, dense, other)
    reach = max(_furthest(dense), _furthest(other), math.prod(shape) + plan.block)
    # (At exactly the largest number either is right.)
    assert plan.is_long == (reach > INT32_MAX) or reach == INT32_MAX


@pytest.mark.parametrize("numel", [0, 1, 1023, 1024, 1025, 2**31 - 1024, 2**31 - 1023, 2**31 - 1])
def test_blocks_cover_everything(numel: int) -> None:
    """Whole blocks, and the tail once: also where a 32-bit index of one more would overflow."""
    from tests.kernels import blocks_kernel

    programs, block = 3, 1024
    found = torch.empty((programs, 2, 2), dtype=torch.int64, device=DEVICE)
    blocks_kernel[(programs,)](found, numel, block)
    whole, tails = found.unbind(1)
    assert whole.tolist() == [[program, numel // block] for program in range(programs)]
    assert {start for start, _ in tails.tolist()} == {numel // block}
    lengths = [stop - start for start, stop in tails.tolist()]
    assert sorted(lengths) == [0, 0, 1 if numel % block else 0]
