"""bool and uint8 weights are masks: what is not selected takes no part, whatever it holds.

Other weights multiply, and then 0 times NaN is NaN: test_nonfinite.py.
"""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import support
from tests.support import CALLS, DEVICE, FLOATS, MASKS, boxes, call, check, values

pytestmark = support.on_both

N, C = 12, 4
# What input and target hold in the odd rows.
BAD = [(math.nan, 0.5), (0.5, math.inf), (-math.inf, -math.inf)]


def even_rows(dtype: torch.dtype = torch.bool) -> Tensor:
    """Select them; nonzero selects, so a uint8 mask holds other numbers than 1."""
    selected = torch.arange(N, device=DEVICE)[:, None] % 2 == 0
    return selected if dtype == torch.bool else selected.to(dtype) * 255


@pytest.mark.parametrize("bad", BAD, ids=str)
@pytest.mark.parametrize("upstream", [2.5, math.inf, math.nan])
@pytest.mark.parametrize("dtype", MASKS, ids=str)
@pytest.mark.parametrize("role", ["inside", "outside"])
def test_unselected_rows(role: str, dtype: torch.dtype, upstream: float, bad: Any) -> None:
    """They take no part, whatever they hold, other weights too, and whatever gradient arrives."""
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


@pytest.mark.parametrize("name", [name for name in CALLS if "mask" in name])
def test_masks_of_other_shapes(name: str) -> None:
    """NaN and inf stand where they do not select, and of two where one does not."""
    for reduction in ("none", "sum"):
        operands, options = call(name, reduction=reduction)
        check(*operands, **options, upstream=1.5)


@pytest.mark.smoke
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("size", [1025, 4099])
def test_mask_at_the_tail_of_a_block(size: int, last: bool, dtype: torch.dtype) -> None:
    """Only the last element is selected, or all but the last: the tail's own mask counts too."""
    mask = torch.full((size,), not last, device=DEVICE)
    mask[-1] = last
    input, target = boxes((size,), grad=2, dtype=dtype)
    input.data[~mask] = math.nan
    check(input, target, mask, mask.to(torch.uint8), reduction="mean", upstream=2.0)
    check(input, target, None, mask, reduction="none", upstream=2.0)
