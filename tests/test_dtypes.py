"""Every dtype and every mix: dtypes of results, accumulation, and gradients that do not underflow.

The arithmetic is float32, or float64 where an operand is float64, whatever is stored. The bounds
of `support.check` ask for just that: a result in 16 bits may be off by its one rounding.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from fused_smoothl1 import smooth_l1_loss
from fused_smoothl1.functional import Reduction
from tests.support import (
    DEVICE,
    FLOATS,
    HAS_GPU,
    MASKS,
    boxes,
    check,
    on_both,
    on_eager,
    on_kernel,
    results,
    values,
)

pytestmark = on_both

HALVES = (torch.float16, torch.bfloat16)
REAL = (*FLOATS, torch.int8, torch.int16, torch.int32, torch.int64, *MASKS)


@pytest.mark.parametrize("target", FLOATS, ids=str)
@pytest.mark.parametrize("input", FLOATS, ids=str)
def test_input_and_target(input: torch.dtype, target: torch.dtype) -> None:
    """Neither numbers nor normalizers, be they float64, promote the loss."""
    normalizer = torch.tensor(2.0, dtype=torch.float64, device=DEVICE)
    pair = [values(13, 9, dtype=dtype, grad=True) for dtype in (input, target)]
    options: Any
    for options in ({"reduction": "none"}, {"reduction": "sum", "normalizer": normalizer}, {}):
        check(*pair, None, -2, sigma=3.0, upstream=1.5, **options)


def weights(*shape: int, dtype: torch.dtype) -> Tensor:
    """Return small integers, which every dtype holds."""
    drawn = values(*shape, scale=2.0).round().abs().to(dtype)
    return drawn.requires_grad_(dtype.is_floating_point)


def check_weights(dtype: torch.dtype, inside: torch.dtype, outside: torch.dtype) -> None:
    for reduction in ("none", "sum"):
        own = weights(13, 1, dtype=inside), weights(13, 9, dtype=outside)
        check(*boxes((13, 9), *own, grad=2, dtype=dtype), reduction=reduction)


@on_eager
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("outside", REAL, ids=str)
@pytest.mark.parametrize("inside", REAL, ids=str)
def test_weights(inside: torch.dtype, outside: torch.dtype, dtype: torch.dtype) -> None:
    """All combinations on the eager path; the kernel takes the diagonal and the mixes below."""
    check_weights(dtype, inside, outside)


@on_kernel
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("weight", REAL, ids=str)
def test_weights_in_the_kernel(weight: torch.dtype, dtype: torch.dtype) -> None:
    check_weights(dtype, weight, weight)
    check_weights(dtype, weight, torch.float32)
    check_weights(dtype, torch.bfloat16, weight)


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


@pytest.mark.parametrize("shape", [(4,), ()], ids=["tensor", "0d"])
@pytest.mark.parametrize(("operands", "none", "reduced"), PROMOTION)
def test_promotion(operands: str, none: str, reduced: str, shape: tuple[int, ...]) -> None:
    """By dtype alone: a 0-d tensor counts like any other, integers and masks never do."""
    shapes = [(3, 4), (3, 4), shape, shape]
    dtypes = [getattr(torch, name) for name in operands.split()]
    tensors = [weights(*s, dtype=d) for s, d in zip(shapes, dtypes, strict=False)]
    assert smooth_l1_loss(*tensors, reduction="none").dtype == getattr(torch, none)
    assert smooth_l1_loss(*tensors, reduction="sum").dtype == getattr(torch, reduced)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_16_bit_sum_is_finite(dtype: torch.dtype, backend: str) -> None:
    """1e5 losses near 5: a float16 sum is inf, a bfloat16 sum stops growing at 2048."""
    n = 100_000 if backend == "eager" else 30_000
    input = values(n, scale=0.1, dtype=dtype) + 5.5
    loss = check(input, torch.zeros_like(input), reduction="sum")["loss"]
    assert 4.5 * n < loss.item() < 6.0 * n


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_differences_are_not_those_of_16_bits(dtype: torch.dtype) -> None:
    """100 - 0.03125 is rounded there, and 60000 - (-60000) beyond float16."""
    input = torch.tensor([100.0, 60000.0], dtype=dtype, device=DEVICE, requires_grad=True)
    target = torch.tensor([0.03125, -60000.0], dtype=dtype, device=DEVICE)
    small = torch.tensor(2.0**-4, dtype=dtype, device=DEVICE)
    check(input, target, reduction="sum")
    check(input, target, small, reduction="none")


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_float16_gradient_does_not_underflow(reduction: Reduction, backend: str) -> None:
    """Outside weights 1/256, sigma 3, a gradient scaler's 65536: only their product is a float16.

    Slope times 1/256 / 1e6 is below float16's smallest number (6e-8); times 65536 it is not. The
    interpreter takes a small input with its divisor made up for in the weights.
    """
    n = 1_000_000 if HAS_GPU or backend == "eager" else 2110
    weight, upstream = (n / 1e6 / 256, 65536.0) if reduction == "mean" else (1 / 256, 64.0)
    pair = boxes((n,), grad=2, dtype=torch.float16, scale=0.05)
    for outside in (weight, torch.tensor(weight, device=DEVICE)):
        found = check(*pair, None, outside, sigma=3.0, reduction=reduction, upstream=upstream)
        moved = (pair[0] != pair[1]).sum()
        assert found["input"].count_nonzero() >= 0.999 * moved


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
    operands = input, torch.zeros_like(input), None, weight
    _, gradient = results(smooth_l1_loss, operands, reduction="sum")
    assert gradient == weight.to(dtype)
