"""How the kernel walks through its operands: in the cheapest way, and to every element once.

The interpreter of these tests refuses addresses outside of an operand, and accesses that are not as
aligned as the plan says.
"""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fused_smoothl1 import smooth_l1_loss
from tests import support
from tests.support import DEVICE, HAS_TRITON, Shape, values

if HAS_TRITON:
    import triton
    import triton.language as tl

    from fused_smoothl1 import launch
    from fused_smoothl1.kernel import _blocks

    @triton.jit(do_not_specialize=["numel"])
    def blocks_kernel(found_ptr, numel, BLOCK: tl.constexpr):  # type: ignore # noqa: N803
        """Store the first and the end of each program's whole blocks, then of its tail."""
        for TAIL in tl.static_range(2):  # noqa: N806
            start, stop = _blocks(numel, BLOCK, TAIL)
            tl.store(found_ptr + tl.program_id(0) * 4 + TAIL * 2, start)
            tl.store(found_ptr + tl.program_id(0) * 4 + TAIL * 2 + 1, stop)


pytestmark = support.on_kernel

Layout = tuple[Shape, Shape]  # sizes and strides
INT32_MAX = 2**31 - 1


def _plan(itemsize: int, *operands: Layout) -> Any:
    """Return the plan for an input that has no gaps, and other operands."""
    shape, order = operands[0]
    return launch._plan(shape, order, operands, itemsize)


@pytest.mark.parametrize("itemsize", [2, 4, 8])
@pytest.mark.parametrize("columns", [4, 5, 6, 8])
def test_cheapest_access(columns: int, itemsize: int) -> None:
    """Half the widest access is taken where it stays in one row; a quarter is not."""
    shape, widest = (9, columns), 16 // itemsize
    dense: Layout = shape, (columns, 1)
    group = math.gcd(columns, widest)
    is_aligned = 2 * group >= widest
    others: dict[str, list[Layout]] = {
        "scalar": [((), ()), ((1, 1), (7, 7)), (shape, (0, 0))],
        "flat": [dense],
        "row": [((9, 1), (1, 1)), ((9, 1), (7, 7)), (shape, (1, 0))],
        "vector": [((columns,), (1,)), (shape, (8 * columns, 1))],
        "strided": [((columns,), (2,)), (shape, (2 * columns, 2)), (shape, (1, 9))],
    }
    # (Where a group is one element, wherever it lies is aligned.)
    others["strided" if group > 1 else "vector"].append((shape, (8 * columns + 1, 1)))
    for access, layouts in others.items():
        for layout in layouts:
            plan = _plan(itemsize, dense, layout)
            if access in ("scalar", "flat"):
                assert plan[:2] == (None, (None,) * 3)
                expected = access, False, widest
            else:
                expected = (access, True, group) if is_aligned else ("strided", False, widest)
            assert (plan.access[1], plan.aligned, plan.lanes) == expected
            assert plan.access[0] == "flat"
    maps: Layout = (2, columns, 3, 4), (12 * columns, 1, 4 * columns, columns)
    pixels: Layout = (2, 1, 3, 4), (12, 12, 4, 1)
    row = "row" if is_aligned else "strided"
    assert _plan(itemsize, maps, maps, pixels).access == ("flat", "flat", row)


SIZES = st.sampled_from([1, 2, 3, 4, 1000, 2**15, 2**16, 2**30, 2**31 - 1025, 2**31 - 1024])


@given(
    shape=st.lists(SIZES, min_size=1, max_size=3),
    steps=st.lists(st.integers(0, 2) | SIZES, min_size=3, max_size=3),
    itemsize=st.sampled_from([2, 4, 8]),
)
def test_32_bits_where_they_are_enough(shape: list[int], steps: list[int], itemsize: int) -> None:
    """64 only if an offset, or the end of the last block, exceeds int32."""
    numel = math.prod(shape)
    dense = tuple(shape), tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))
    other = tuple(shape), tuple(steps[: len(shape)])
    plan = _plan(itemsize, dense, other)
    furthest = sum((size - 1) * step for size, step in zip(*other, strict=True))
    reach = max(furthest, numel + plan.block)
    # (At exactly the largest number either is right.)
    assert plan.is_long == (reach > INT32_MAX) or reach == INT32_MAX


@pytest.mark.parametrize("numel", [0, 1, 1023, 1024, 1025, 2**31 - 1024, 2**31 - 1023, 2**31 - 1])
def test_blocks_cover_everything(numel: int) -> None:
    """All programs walk the whole blocks, one the tail; also next to the largest int32."""
    programs, block = 3, 1024
    found = torch.empty((programs, 2, 2), dtype=torch.int64, device=DEVICE)
    blocks_kernel[(programs,)](found, numel, block)
    whole, tails = found.unbind(1)
    assert whole.tolist() == [[program, numel // block] for program in range(programs)]
    assert {start for start, _ in tails.tolist()} == {numel // block}
    lengths = [stop - start for start, stop in tails.tolist()]
    assert sorted(lengths) == [0, 0, 1 if numel % block else 0]


# What may be wrong in a plan for rows of 4 in memory of 5 columns, and what is said of it.
ABSENT = 4 * (None,)  # weights, beta and an upstream gradient
WRONG: list[tuple[str, dict[str, Any]]] = [
    ("a load outside", {"numel": 37}),
    ("a load outside", {"strides": ((5, -1), (5, 1), *ABSENT, None)}),
    ("a store outside", {"numel": 37, "access": ("scalar", "scalar", *ABSENT)}),
    ("not a multiple", {"access": ("vector", "strided", *ABSENT)}),
    (
        "not contiguous",
        {"access": ("vector", "strided", *ABSENT), "strides": ((8, 2), (5, 1), *ABSENT, None)},
    ),
]


@support.needs_no_gpu
@pytest.mark.parametrize(("said", "wrong"), WRONG)
def test_wrong_plans_are_refused(
    said: str, wrong: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the interpreter that the tests run in, as a GPU would not survive them."""
    plan_of = launch._plan
    monkeypatch.setattr(launch, "_plan", lambda *given: plan_of(*given)._replace(**wrong))
    monkeypatch.setattr(launch, "_launch_of", launch._launch_of.__wrapped__)  # keeps nothing
    input, target = (values(9, 5)[:, :4] for _ in range(2))
    with pytest.raises(Exception, match=said):
        smooth_l1_loss(input.requires_grad_(), target)
