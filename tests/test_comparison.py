"""The README's table of comparison says what is true of this loss and of PyTorch's own.

What it says of mmdetection stands in that library's source.
"""

import inspect
import warnings
from math import inf, nan
from typing import Any

import pytest
import torch
from torch.autograd import grad
from torch.nn import functional as F  # noqa: N812 (the name PyTorch users know it by)

from bench.traffic import Traffic
from fused_smoothl1 import smooth_l1_loss
from tests.support import DEVICE, REDUCTIONS, ROOT, boxes, values

LOSSES: list[Any] = [smooth_l1_loss, F.smooth_l1_loss, F.huber_loss]
SECTION = (ROOT / "README.md").read_text(encoding="utf-8").split("## Compared\n")[1]
LINES = [line.split("|")[1:5] for line in SECTION.partition("\n[1]")[0].splitlines() if line]
TABLE = {row.strip(): [cell.strip() for cell in cells] for row, *cells in LINES[2:]}


def attempt(loss: Any, *operands: Any, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        try:
            return loss(*operands, **options)
        except UserWarning:
            return "a warning"
        except (RuntimeError, TypeError, ValueError):
            return "an error"


def cell(row: str, loss: Any) -> str:
    """Find out what stands in a row of the table for a loss."""
    (input, target), options = boxes(6), inspect.signature(loss).parameters
    point = "beta" if "beta" in options else "delta"
    weight = "weight" if "weight" in options else "outside_weights"
    ones = torch.ones(6, 4, device=DEVICE, requires_grad=True)
    holds: Any = True
    match row:
        case "transition point":
            names = [f"`{name}`" for name in ("sigma", "beta", "delta") if name in options]
            scaled = 0.5 * F.smooth_l1_loss(input, target, beta=0.5)
            is_scaled = loss(input, target, **{point: 0.5}).allclose(scaled)
            return f"{' or '.join(names)}{', scaled by it' * is_scaled}"
        case "one for each sample or element, its gradient":
            found = attempt(loss, input, target, **{point: ones})
            holds = found != "an error" and grad(found, ones)[0].all()
        case "beta 0 is L1":
            found = attempt(loss, input, target, **{point: 0.0})
            if found == "an error":
                return "an error"
            holds = found.allclose(F.l1_loss(input, target))
        case "inside weights" | "outside weights":
            name = weight if row == "outside weights" else "inside_weights"
            if name not in options:
                return "no"
            column = values(6, 1)
            found = attempt(loss, input, target, **{name: column})
            full = loss(input, target, **{name: column.repeat(1, 4)})
            return "full size" if found == "an error" else "broadcast" * found.allclose(full)
        case "gradient of weights":
            if weight not in options:
                return ""
            holds = grad(loss(input, target, **{weight: ones}), ones)[0].all()
        case "masks that keep NaN out":
            input.data[0], mask = nan, torch.arange(6, device=DEVICE)[:, None] > 0
            if "inside_weights" in options:
                found = loss(input, target, mask)
            else:  # one multiplies, or fills the loss and waits for a NaN
                found = (mask * loss(input, target, reduction="none")).sum()
            holds = found.isfinite() and grad(found, input)[0].isfinite().all()
        case "normalizer that stays on the device":
            return "`normalizer`" if "normalizer" in options else "no"
        case "reductions":
            found = {f"`{r}`": attempt(loss, input, target, reduction=r) for r in REDUCTIONS}
            refused = [f"no {name}" for name, value in found.items() if value == "an error"]
            return ", ".join(refused or found)
        case "double backward":
            (first,) = grad(loss(input, target, reduction="sum"), input, create_graph=True)
            (second,) = grad(first.sum(), input)
            holds = second.equal(((input - target).abs() < 1).float())
        case "sum of 16-bit values":
            twos = torch.full((100_000,), 2.0, dtype=torch.float16, device=DEVICE)
            found = loss(twos, torch.zeros_like(twos), reduction="sum")
            return "overflows" if found == inf else f"{found.dtype}".removeprefix("torch.")
        case "mean of an empty input":
            return f"{loss(input[:0], target[:0]):g}".replace("nan", "NaN")
        case "shapes that differ":
            return f"{attempt(loss, input, target[:1])}"
        case "CPU and GPU":
            found = loss(input.cpu(), target.cpu()).to(DEVICE)
            return "both" if found.isclose(loss(input, target)) else "one of them"
        case "launches on a GPU, both passes, no weights":
            if loss is smooth_l1_loss:
                return "at most 2"  # What tests/test_costs.py counts.
            with Traffic() as seen:
                grad(loss(input, target), input)
            return "several" if len(seen.kernels) > 2 else f"{len(seen.kernels)}"
        case _:
            pytest.fail("nobody finds out what this row says")
    return "yes" if holds else "no"


@pytest.mark.parametrize("row", TABLE)
def test_row(row: str) -> None:
    assert [cell(row, loss) for loss in LOSSES] == TABLE[row]
