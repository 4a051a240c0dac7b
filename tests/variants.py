"""Calls of every kind, for the tests that run the same calls under some machinery of PyTorch."""

from typing import Any

import torch
from torch import Tensor

from fused_smoothl1.functional import Reduction
from tests.support import coin, gaussian

REDUCTIONS: tuple[Reduction, ...] = ("none", "sum", "mean", "batchmean")
VARIANTS = (
    "plain",
    "number",
    "row_weights",
    "trained_weights",
    "bool_rows",
    "uint8_mask",
    "two_masks",
    "l1",
    "beta_of_rows",
    "beta_and_mask",
)


def make(
    variant: str,
    rows: int = 6,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    poison: bool = True,
) -> tuple[list[Any], dict[str, Any]]:
    """Return the operands and options of a call on (rows, 4) values.

    With `poison`, NaN and inf stand where masks do not select.
    """

    def values(*shape: int, seed: int, requires_grad: bool = False) -> Tensor:
        return gaussian(*shape, seed=seed, dtype=dtype, device=device, requires_grad=requires_grad)

    input, target = values(rows, 4, seed=rows), values(rows, 4, seed=rows + 1)
    inside: Tensor | None = None
    outside: Any = None
    options: dict[str, Any] = {"sigma": 1.5}
    if variant == "number":
        outside = -2.0
    elif variant == "row_weights":
        inside, outside = values(rows, 1, seed=3), values(4, seed=4)
        target.requires_grad_()
    elif variant == "trained_weights":
        inside = values(1, 4, seed=5, requires_grad=True)
        outside = values(rows, 1, seed=6, requires_grad=True)
        target.requires_grad_()
    elif variant == "bool_rows":
        inside = coin(rows, 1, seed=7, device=device)
    elif variant == "uint8_mask":
        outside = coin(rows, 4, seed=8, device=device).to(torch.uint8) * 3
        inside = values(rows, 4, seed=9)
    elif variant == "two_masks":
        inside, outside = coin(rows, 1, seed=10, device=device), coin(4, seed=11, device=device)
        target.requires_grad_()
    elif variant == "l1":
        options = {"beta": 0.0}
        outside = 0.5
    elif variant == "beta_of_rows":
        options = {"beta": values(rows, 1, seed=12).abs()}
        outside = values(4, seed=13)
    elif variant == "beta_and_mask":
        options = {"beta": values(seed=14).abs()}
        inside = coin(rows, 1, seed=15, device=device)
    if poison:
        with torch.no_grad():
            for mask in (inside, outside):
                if isinstance(mask, Tensor) and mask.dtype in (torch.bool, torch.uint8):
                    excluded = (mask == 0).expand(rows, 4)
                    input[excluded] = float("nan")
                    target[excluded] = float("inf")
    return [input.requires_grad_(), target, inside, outside], options


def detached(operands: list[Any]) -> list[Any]:
    """Return the same operands without requiring any gradient."""
    return [t.detach() if isinstance(t, Tensor) else t for t in operands]


def fresh(operands: list[Any]) -> list[Any]:
    """Return copies of the operands that require what the originals do."""
    return [
        t.detach().clone().requires_grad_(t.requires_grad) if isinstance(t, Tensor) else t
        for t in operands
    ]


def trained(operands: list[Any]) -> list[Tensor]:
    """Return the operands that require a gradient."""
    return [t for t in operands if isinstance(t, Tensor) and t.requires_grad]
