"""Dtypes of results, accumulation, and gradients that do not underflow.

The arithmetic is float32, or float64 where an operand is float64, whatever is stored. The bounds
of `check` ask for just that. (Every mix of dtypes is drawn in test_properties.py.)
"""

from typing import Any

import pytest
import torch

from fused_smoothl1 import smooth_l1_loss
from tests import support
from tests.support import DEVICE, HAS_GPU, check, results, values

pytestmark = support.on_both

HALVES = (torch.float16, torch.bfloat16)

# The dtypes of operands, of their losses, and of a reduced loss.
PROMOTION = [
    ("float16 float16", "float16", "float32"),
    ("bfloat16 bfloat16", "bfloat16", "float32"),
    ("float16 bfloat16", "float32", "float32"),
    ("float16 float16 float32", "float32", "float32"),
    ("float16 float16 bool bfloat16", "float32", "float32"),
    ("float16 float16 int64 uint8", "float16", "float32"),
    ("bfloat16 bfloat16 int32 int8", "bfloat16", "float32"),
    ("float32 float16", "float32", "float32"),
    ("float16 float64", "float64", "float64"),
    ("float32 float32 float64", "float64", "float64"),
    ("float16 float16 bool float64", "float64", "float64"),
]


@pytest.mark.parametrize("shape", [(3, 4), ()], ids=["tensor", "0d"])
@pytest.mark.parametrize(("dtypes", "none", "reduced"), PROMOTION)
def test_promotion(dtypes: str, none: str, reduced: str, shape: tuple[int, ...]) -> None:
    """By dtype alone: 0-d weights count like others; integers, masks and normalizers never do."""
    operands, sizes = [], ((3, 4), (3, 4), shape, shape)
    for size, name in zip(sizes, dtypes.split(), strict=False):
        operand = values(*size, scale=2.0).round().abs().to(getattr(torch, name))
        operands.append(operand.requires_grad_(operand.is_floating_point()))
    two = torch.tensor(2.0, dtype=torch.float64, device=DEVICE)
    for reduction, normalizer, expected in (("none", None, none), ("sum", two, reduced)):
        found = check(*operands, reduction=reduction, normalizer=normalizer, upstream=1.5)
        assert found["loss"].dtype == getattr(torch, expected)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_numbers_beyond_16_bits(dtype: torch.dtype) -> None:
    """100 - 0.03125 is rounded there, and 60000 - (-60000) overflows in float16.

    So does the sum of 30,000 losses near 5; in bfloat16 it stops growing at 2048.
    """
    input = torch.tensor([100.0, 60000.0], dtype=dtype, device=DEVICE, requires_grad=True)
    target = torch.tensor([0.03125, -60000.0], dtype=dtype, device=DEVICE)
    check(input, target, torch.full_like(target, 2.0**-4), reduction="none")
    check(input, target, reduction="sum")
    many = values(30_000, scale=0.1, dtype=dtype) + 5.5
    check(many, torch.zeros_like(many), reduction="sum")


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_float16_gradient_does_not_underflow(reduction: str, backend: str) -> None:
    """Outside weights 1/256, sigma 3, a gradient scaler's 65536: only their product is a float16.

    Slope times 1/256 / 1e6 is below float16's smallest number (6e-8); times 65536 it is not. The
    interpreter takes a small input with its divisor made up for in the weights.
    """
    n = 1_000_000 if HAS_GPU or backend == "eager" else 2110
    weight, upstream = (n / 1e6 / 256, 65536.0) if reduction == "mean" else (1 / 256, 64.0)
    input, target = (values(n, dtype=torch.float16, scale=0.05, grad=True) for _ in range(2))
    for outside in (weight, torch.tensor(weight, device=DEVICE)):
        options: Any = {"outside_weights": outside, "reduction": reduction, "upstream": upstream}
        found = check(input, target, sigma=3.0, **options)
        assert found["input"].count_nonzero() >= 0.999 * (input != target).sum()


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_gradient_narrower_than_the_loss(dtype: torch.dtype) -> None:
    """The upstream gradient meets it in the wider type: either may be beyond the narrower's."""
    input = torch.tensor([0.0, 1.0, -3.0], dtype=dtype, device=DEVICE, requires_grad=True)
    target = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64, device=DEVICE)
    check(input, target, None, 1e-45, reduction="sum", upstream=1e45)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_float64_is_rounded_to_16_bits_by_float32(dtype: torch.dtype) -> None:
    """As PyTorch rounds it: what is hardly above the middle of two numbers goes to the even one."""
    above = 1 + torch.finfo(dtype).eps / 2 + 2.0**-40
    weight = torch.tensor([above], dtype=torch.float64, device=DEVICE)
    input = torch.full((1,), 9.0, dtype=dtype, device=DEVICE, requires_grad=True)
    _, gradient = results(smooth_l1_loss, [input, torch.zeros_like(input), None, weight])
    assert gradient == weight.to(dtype)
