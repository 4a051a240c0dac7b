"""bool and uint8 weights are masks: what is not selected takes no part, whatever it holds.

Float weights multiply instead, and then 0 times NaN is NaN, in the loss and in the gradient.
"""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_smoothl1 import smooth_l1_loss
from tests.support import DEVICE, MASKS, Shape, boxes, check, coin, on_both, results, values

pytestmark = on_both

N, C = 12, 4
# What input and target hold in the odd rows.
BAD = [(math.nan, 0.5), (0.5, math.inf), (-math.inf, -math.inf), (math.nan, math.nan)]


def even_rows(dtype: torch.dtype = torch.bool) -> Tensor:
    """Select them; nonzero selects, so a uint8 mask holds other numbers than 1."""
    selected = torch.arange(N, device=DEVICE)[:, None] % 2 == 0
    return selected if dtype == torch.bool else selected.to(dtype) * 255


@pytest.mark.parametrize("bad", BAD, ids=str)
@pytest.mark.parametrize("upstream", [2.5, math.inf, math.nan])
@pytest.mark.parametrize("dtype", MASKS, ids=str)
@pytest.mark.parametrize("role", ["inside", "outside"])
def test_unselected_rows_take_no_part(
    role: str, dtype: torch.dtype, upstream: float, bad: tuple[float, float]
) -> None:
    """Whatever they hold, also in the other weights, and whatever gradient arrives."""
    others: list[Any] = [None, even_rows(), values(N, C, dtype=torch.float16)]
    # Trained. The gradient of inside weights has the difference as a factor, which is not 0.
    others += [(), (1, 1), (N, 1), values(N, C, grad=True)]
    others[-1].data[1::2] = bad[0]
    for other in others:
        mask = even_rows(dtype)
        operands = boxes(N, *((mask, other) if role == "inside" else (other, mask)), grad=4)
        for operand, value in zip(operands, bad, strict=False):
            operand.data[1::2] = value
        for reduction in ("none", "mean"):
            found = check(*operands, reduction=reduction, upstream=upstream)
            for result in found.values():
                if result.shape == (N, C):
                    assert (result[1::2] == 0).all(), "what is not selected is exactly 0"


@pytest.mark.parametrize("shape", [(N, C), (N, 1), (1, C), (C,), (1, 1), (1,), ()], ids=str)
@pytest.mark.parametrize("dtype", MASKS, ids=str)
def test_masks_of_any_shape(dtype: torch.dtype, shape: Shape) -> None:
    """Beside weights, and beside a mask: the two select what both do."""
    mask, column = coin(*shape).to(dtype), torch.arange(C, device=DEVICE) == 1
    for other, selected in (((N, 1), mask != 0), (column, (mask != 0) & column)):
        for weights in ((mask, other), (other, mask)):
            operands = boxes(N, *weights, grad=2)
            operands[0].data[~selected.expand(N, C)] = math.nan
            for reduction in ("none", "sum"):
                check(*operands, sigma=3.0, reduction=reduction, upstream=1.5)


@pytest.mark.parametrize("shape", [(N, 1), ()], ids=str)
@pytest.mark.parametrize("dtype", MASKS, ids=str)
def test_nothing_selected(dtype: torch.dtype, shape: Shape) -> None:
    """The step without positives: a zero with a graph, and zero gradients."""
    input = torch.full((N, C), math.nan, device=DEVICE, requires_grad=True)
    mask = torch.zeros(shape, dtype=dtype, device=DEVICE)
    operands = [input, torch.full_like(input, math.inf), mask, mask]
    for value in results(smooth_l1_loss, operands, reduction="sum"):
        assert (value == 0).all()


@pytest.mark.parametrize("zero", [0, 0.0, torch.float32, torch.float16, torch.int64, torch.int8])
def test_numbers_multiply(zero: Any) -> None:
    """A zero that is not a mask keeps NaN, as IEEE 754 and PyTorch have it."""
    is_number = not isinstance(zero, torch.dtype)
    zeros = zero if is_number else torch.zeros(1, C, dtype=zero, device=DEVICE)
    for weights in ([None, zeros],) if is_number else ([None, zeros], [zeros], [zeros, zeros]):
        operands = boxes(N, *weights)
        operands[0].data[1::2] = math.nan
        for value in results(smooth_l1_loss, operands, reduction="none"):
            assert value[1::2].isnan().all()
            assert (value[0::2] == 0).all()
        assert smooth_l1_loss(*operands, reduction="sum").isnan()


@pytest.mark.smoke
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_masks_in_other_dtypes(dtype: torch.dtype) -> None:
    operands = boxes(N, even_rows(), even_rows(torch.uint8), grad=2, dtype=dtype)
    operands[0].data[1::2] = math.nan
    for reduction in ("none", "sum"):
        check(*operands, sigma=3.0, reduction=reduction, upstream=3.0)


@pytest.mark.smoke
@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("size", [1025, 4099])
def test_mask_at_the_tail_of_a_block(size: int, last: bool) -> None:
    """Only the last element is selected, or all but the last: the tail's own mask counts too."""
    mask = torch.full((size,), not last, device=DEVICE)
    mask[-1] = last
    input, target = boxes((size,), grad=2)
    input.data[~mask] = math.nan
    check(input, target, mask, None, reduction="mean", upstream=2.0)
    check(input, target, None, mask, reduction="none", upstream=2.0)


@pytest.mark.parametrize("rows", [0, 1, 2])
@pytest.mark.parametrize("columns", [0, 4, 8])
def test_few_rows_of_a_wider_tensor(columns: int, rows: int) -> None:
    """The stride of a dimension of size 1 or 0 may be anything."""
    input = values(rows, 11, grad=True)[:, :columns]
    weights = torch.ones(rows, 1, dtype=torch.bool, device=DEVICE), values(rows, 1)
    for reduction in ("none", "sum"):
        check(input, values(rows, columns), *weights, reduction=reduction, upstream=math.inf)
        check(input.detach(), values(rows, columns), *weights, reduction=reduction)
