"""How the kernel walks through its operands: what a plan makes it load, against plain enumeration.

The kernel's own loads are run on an operand that holds its own positions. So what comes back says
where each element was looked for, whatever the plan is made of; and the interpreter of these tests
refuses addresses outside of the operand, and accesses that are not as aligned as the plan says.
"""

import itertools
import math
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.conftest import on_interpreter

Ints = tuple[int, ...]
Layout = tuple[Ints, Ints]
INT32_MAX = 2**31 - 1


class Walk(NamedTuple):
    """What a plan is made for."""

    order: Ints
    """Strides of the outputs, or of the input where there are none."""
    has_outputs: bool
    operands: tuple[Layout | None, ...]
    """Shape and strides; the first has the shape of all."""
    itemsize: int

    @property
    def shape(self) -> Ints:
        assert self.operands[0] is not None
        return self.operands[0][0]


@st.composite
def layouts(draw: st.DrawFn, shape: Ints) -> Layout:
    """Any permutation of the dimensions, with gaps between them or expanded."""
    strides, step = [0] * len(shape), 1
    for dim in draw(st.permutations(range(len(shape)))):
        if draw(st.integers(0, 9)):
            strides[dim] = step
            step = step * shape[dim] + draw(st.sampled_from([0, 0, 0, 1, 4, 8]))
            step *= draw(st.sampled_from([1, 1, 1, 2]))
    return shape, tuple(strides)


@st.composite
def walks(draw: st.DrawFn) -> Walk:
    shape = tuple(draw(st.lists(st.sampled_from([1, 2, 3, 4, 8, 12, 16, 31]), max_size=4)))
    while math.prod(shape) > 4000:
        shape = shape[1:]
    operands: list[Layout | None] = [draw(layouts(shape))]
    for _ in range(draw(st.integers(0, 3))):
        kept = draw(st.lists(st.booleans(), min_size=len(shape), max_size=len(shape)))
        own = tuple(n if keep else 1 for n, keep in zip(shape, kept, strict=True))
        own = own[draw(st.integers(0, next((i for i, n in enumerate(own) if n > 1), 0))) :]
        operands.append(draw(st.none() | layouts(own) | layouts(shape)))
    has_outputs = draw(st.booleans())
    input = torch.empty_strided(*operands[0], device="meta")  # type: ignore[misc]
    order = torch.empty_like(input).stride() if has_outputs else input.stride()
    return Walk(order, has_outputs, tuple(operands), draw(st.sampled_from([2, 4, 8])))


def _plan(walk: Walk) -> Any:
    from fused_smoothl1 import launch

    return launch._plan(walk.shape, walk.order, walk.operands, walk.itemsize)


def _enumerated(shape: Ints, layout: Layout) -> npt.NDArray[np.int64]:
    """Return where each element of a tensor is that broadcasts to the shape, in row-major order."""
    own, strides = layout
    padded = (0,) * (len(shape) - len(own)) + tuple(
        0 if n == 1 else stride for n, stride in zip(own, strides, strict=True)
    )
    indices = itertools.product(*map(range, shape))
    return np.array([sum(map(int.__mul__, index, padded)) for index in indices])


def _loaded(plan: Any, operand: int, numel: int, extent: int) -> npt.NDArray[np.int64]:
    """Return where the kernel looks for each element."""
    from tests.kernels import load_kernel

    # In one piece of memory that ends where the operand does.
    positions: list[Tensor | None] = [None] * len(plan.access)
    positions[operand] = torch.arange(extent, dtype=torch.int32)
    found = torch.full((numel,), -1, dtype=torch.int32)
    load_kernel[(2,)](
        tuple(positions),
        found,
        plan.sizes,
        plan.strides,
        numel,
        plan.access,
        operand,
        plan.aligned,
        plan.lanes,
        plan.block,
    )
    return found.numpy().astype(np.int64)


@on_interpreter
@given(walk=walks())
def test_every_element_is_found(walk: Walk, triton_backend: str) -> None:
    """In the order of the outputs where there are any; otherwise in one order for all operands."""
    plan = _plan(walk)
    numel = math.prod(walk.shape)
    present = {i: layout for i, layout in enumerate(walk.operands) if layout is not None}
    expected = [_enumerated(walk.shape, layout) for layout in present.values()]
    found = [
        _loaded(plan, operand, numel, int(one.max()) + 1)
        for one, operand in zip(expected, present, strict=True)
    ]
    for operand in range(len(walk.operands)):
        assert (plan.access[operand] is None) == (operand not in present)
        is_walked = plan.access[operand] in ("row", "vector", "strided")
        assert (plan.strides[operand] is not None) == is_walked

    if walk.has_outputs:
        written = _enumerated(walk.shape, (walk.shape, walk.order))
        expected = [one[np.argsort(written)] for one in expected]
        assert all(map(np.array_equal, found, expected))
    else:
        # (The order is any, but the same for all.)
        assert sorted(zip(*found, strict=True)) == sorted(zip(*expected, strict=True))
    for one, operand in zip(found, present, strict=True):
        assert plan.access[operand] in _best_accesses(one, plan).split()


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


def _dense(*shape: int) -> Layout:
    return shape, tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))


BOXES, TALL = _dense(9, 4), _dense(64, 16)
# Operands; bytes an element; the kinds of access; the lanes of a group, and whether it is aligned.
EXAMPLES: dict[str, tuple[list[Layout], int, str, int, bool]] = {
    "dense": ([BOXES, BOXES, BOXES], 4, "flat flat flat", 4, False),
    "16 bits": ([BOXES, BOXES], 2, "flat flat", 8, False),
    "64 bits": ([BOXES, BOXES], 8, "flat flat", 2, False),
    "one element": ([BOXES, ((), ()), ((1, 1), (1, 1))], 4, "flat scalar scalar", 4, False),
    "weight of a row": ([BOXES, ((9, 1), (1, 1))], 4, "flat row", 4, True),
    "weight of a column": ([BOXES, ((4,), (1,))], 4, "flat vector", 4, True),
    "weight of a row, half wide": ([BOXES, ((9, 1), (1, 1))], 2, "flat row", 4, True),
    "weight of a row of 6": ([_dense(9, 6), ((9, 1), (1, 1))], 4, "flat row", 2, True),
    "weight of a row of 6, 16 bits": (
        [_dense(9, 6), ((9, 1), (1, 1))],
        2,
        "flat strided",
        8,
        False,
    ),
    "weight of a row of 5": ([_dense(9, 5), ((9, 1), (1, 1))], 4, "flat strided", 4, False),
    "columns": ([BOXES, ((9, 4), (8, 1))], 4, "flat vector", 4, True),
    "columns that are not aligned": ([BOXES, ((9, 4), (7, 1))], 4, "flat strided", 4, True),
    "columns that are half aligned": ([BOXES, ((9, 4), (6, 1))], 4, "flat strided", 4, True),
    "columns, half wide": ([BOXES, ((9, 4), (12, 1))], 2, "flat vector", 4, True),
    "columns, half wide, not aligned": ([BOXES, ((9, 4), (10, 1))], 2, "flat strided", 4, True),
    "every second column": ([BOXES, ((9, 4), (8, 2))], 4, "flat strided", 4, True),
    "transposed": ([TALL, ((64, 16), (1, 64))], 4, "flat strided", 4, True),
    "both transposed": ([((9, 4), (1, 9)), ((9, 4), (1, 9))], 4, "flat flat", 4, False),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_kinds_of_access(name: str, triton_backend: str) -> None:
    operands, itemsize, kinds, lanes, aligned = EXAMPLES[name]
    plan = _plan(Walk(operands[0][1], True, tuple(operands), itemsize))
    assert " ".join(plan.access) == kinds
    assert (plan.lanes, plan.aligned) == (lanes, aligned)
    assert (plan.sizes is None) == ({*kinds.split()} <= {"flat", "scalar"})


@pytest.mark.parametrize(("itemsize", "block"), [(2, 1024), (4, 1024), (8, 512)])
def test_size_of_a_tile(itemsize: int, block: int, triton_backend: str) -> None:
    """At most two wide accesses of each of 128 threads, and at most eight elements."""
    assert _plan(Walk((4, 1), True, (BOXES, BOXES), itemsize)).block == block


def _reach(plan: Any, layout: Layout, numel: int) -> int:
    """Return the largest number that the kernel computes on the way to an operand's elements."""
    block: int = plan.block
    furthest = sum((n - 1) * stride for n, stride in zip(*layout, strict=True))
    return max(furthest, numel + block)


LARGE = st.sampled_from([1, 2, 3, 4, 1000, 2**15, 2**16, 2**30, 2**31 - 1025, 2**31 - 1024])


@given(
    shape=st.lists(LARGE, min_size=1, max_size=3).map(tuple),
    steps=st.lists(st.integers(0, 2) | LARGE, min_size=3, max_size=3),
    itemsize=st.sampled_from([2, 4, 8]),
)
def test_32_bits_where_they_are_enough(
    shape: Ints, steps: list[int], itemsize: int, triton_backend: str
) -> None:
    strides = tuple(steps[: len(shape)])
    dense = _dense(*shape)
    plan = _plan(Walk(dense[1], True, (dense, (shape, strides)), itemsize))
    reach = max(_reach(plan, layout, math.prod(shape)) for layout in (dense, (shape, strides)))
    # (At exactly the largest number either is right.)
    assert plan.is_long == (reach > INT32_MAX) or reach == INT32_MAX


@pytest.mark.parametrize("numel", [0, 1, 1023, 1024, 1025, 2**31 - 1024, 2**31 - 1023, 2**31 - 1])
def test_blocks_cover_everything(numel: int, device: str, triton_backend: str) -> None:
    """Whole blocks, and the tail once: also where a 32-bit index of one more would overflow."""
    from tests.kernels import blocks_kernel

    programs, block = 3, 1024
    found = torch.empty((programs, 2, 2), dtype=torch.int64, device=device)
    blocks_kernel[(programs,)](found, numel, block)
    whole, tails = found.unbind(1)
    assert whole.tolist() == [[program, numel // block] for program in range(programs)]
    lengths = [stop - start for start, stop in tails.tolist()]
    assert sorted(lengths) == [0, 0, 1 if numel % block else 0]
    assert {start for start, _ in tails.tolist()} == {numel // block}
