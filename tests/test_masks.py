"""bool and uint8 weights are masks: what is not selected takes no part, whatever it holds.

Float weights multiply instead, and then 0 times NaN is NaN, in the loss and in the gradient.
"""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_smoothl1 import smooth_l1_loss
from fused_smoothl1.functional import Reduction
from tests.support import check, gaussian

BAD = [math.nan, math.inf, -math.inf]
N, C = 12, 4


def _rows(device: str, dtype: torch.dtype = torch.bool) -> Tensor:
    """Select every second row; nonzero selects, so a uint8 mask holds other numbers than 1."""
    rows = (torch.arange(N, device=device) % 2 == 0).view(N, 1)
    return rows if dtype == torch.bool else rows.to(torch.uint8) * 255


def _operands(bad: float, where: str, device: str) -> tuple[Tensor, Tensor]:
    """Return input and target that hold `bad` in the odd rows."""
    tensors = [gaussian(N, C, seed=seed, device=device) for seed in (1, 2)]
    for tensor, name in zip(tensors, ("input", "target"), strict=True):
        if where in (name, "both"):
            tensor[1::2] = bad
        tensor.requires_grad_()
    return tensors[0], tensors[1]


@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "batchmean"])
@pytest.mark.parametrize("where", ["input", "target", "both"])
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8])
def test_unselected_rows_take_no_part(
    dtype: torch.dtype, bad: float, where: str, reduction: Reduction, backend: str, device: str
) -> None:
    input, target = _operands(bad, where, device)
    mask = _rows(device, dtype)
    for inside, outside in ((mask, None), (None, mask), (mask, mask)):
        loss = smooth_l1_loss(input, target, inside, outside, reduction=reduction)
        grads = torch.autograd.grad(loss, [input, target], torch.ones_like(loss))
        for values in (*grads, *([loss] if reduction == "none" else [])):
            assert values.isfinite().all()
            assert (values[1::2] == 0).all(), "what is not selected is exactly 0"
            assert (values[0::2] != 0).all(), "what is selected is not"
        assert loss.isfinite().all()
        check(input, target, inside, outside, reduction=reduction, upstream=2.5)


@pytest.mark.parametrize("shape", [(N, C), (N, 1), (1, C), (C,), (1, 1), (1,), ()], ids=str)
@pytest.mark.parametrize("role", ["inside", "outside"])
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8])
def test_mask_of_any_shape(
    dtype: torch.dtype, role: str, shape: tuple[int, ...], backend: str, device: str
) -> None:
    mask = (gaussian(*shape, seed=3) > 0).to(dtype).to(device)
    input = gaussian(N, C, seed=1, device=device)
    selected = (mask != 0).expand(N, C)
    input = torch.where(selected, input, math.nan).requires_grad_()
    other = gaussian(N, 1, seed=4, device=device)
    weights = (mask, other) if role == "inside" else (other, mask)
    target = gaussian(N, C, seed=2, device=device, requires_grad=True)
    for reduction in ("none", "sum"):
        check(input, target, *weights, sigma=3.0, reduction=reduction, upstream=1.5)


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("mask_role", ["inside", "outside"])
@pytest.mark.parametrize("learned", [False, True])
def test_float_weight_may_be_bad_where_a_mask_does_not_select(
    learned: bool, mask_role: str, bad: float, backend: str, device: str
) -> None:
    input, target = _operands(bad, "input", device)
    weights = gaussian(N, C, seed=3, device=device)
    weights[1::2] = bad
    weights.requires_grad_(learned)
    mask = _rows(device)
    pair = (mask, weights) if mask_role == "inside" else (weights, mask)
    for reduction in ("none", "mean"):
        check(input, target, *pair, reduction=reduction, upstream=-1.5)


def test_two_masks_select_what_both_do(backend: str, device: str) -> None:
    input = torch.full((N, C), math.nan, device=device)
    input[0::2, 1] = gaussian(N // 2, seed=1, device=device)
    input.requires_grad_()
    target = gaussian(N, C, seed=2, device=device)
    column = torch.tensor([0, 3, 0, 0], dtype=torch.uint8, device=device)
    for reduction in ("none", "sum", "mean"):
        check(input, target, _rows(device), column, reduction=reduction)
        check(input, target, column, _rows(device), reduction=reduction)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8])
def test_nothing_selected(dtype: torch.dtype, backend: str, device: str) -> None:
    """The step without positives: a zero with a graph, and zero gradients."""
    input = torch.full((N, C), math.nan, device=device, requires_grad=True)
    target = torch.full((N, C), math.inf, device=device)
    mask = torch.zeros(N, 1, dtype=dtype, device=device)
    loss = smooth_l1_loss(input, target, mask, mask, reduction="sum")
    assert loss.item() == 0.0
    loss.backward()
    assert input.grad is not None
    assert torch.equal(input.grad, torch.zeros_like(input))


@pytest.mark.parametrize("upstream", BAD)
@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_bad_upstream_gradient_of_unselected(
    reduction: Reduction, upstream: float, backend: str, device: str
) -> None:
    """Zero is exact: an upstream gradient of inf or NaN does not turn it into NaN."""
    input, target = _operands(math.nan, "both", device)
    for inside, outside in ((_rows(device), None), (None, _rows(device))):
        loss = smooth_l1_loss(input, target, inside, outside, reduction=reduction)
        above = torch.full_like(loss, upstream)
        for gradient in torch.autograd.grad(loss, [input, target], above):
            assert (gradient[1::2] == 0).all()
            assert not gradient[0::2].isfinite().any()


@pytest.mark.parametrize("upstream", BAD)
@pytest.mark.parametrize("swapped", [False, True])
def test_bad_upstream_gradient_beside_weights_of_another_dtype(
    swapped: bool, upstream: float, backend: str, device: str
) -> None:
    """Whichever of both is the mask."""
    input = gaussian(N, C, seed=1, device=device, requires_grad=True)
    weights = [_rows(device), gaussian(N, C, seed=3, dtype=torch.float16, device=device)]
    inside, outside = weights[::-1] if swapped else weights
    loss = smooth_l1_loss(input, torch.zeros_like(input), inside, outside, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, input, torch.full_like(loss, upstream))
    assert torch.equal(gradient == 0, ~_rows(device).expand_as(gradient))


@pytest.mark.parametrize(
    ("role", "zero"),
    [
        ("outside", 0),
        ("outside", 0.0),
        *itertools.product(
            ("inside", "outside"), ("float32", "float16", "bfloat16", "int64", "int8")
        ),
    ],
)
def test_numbers_multiply(role: str, zero: Any, backend: str, device: str) -> None:
    """A zero that is not a mask keeps NaN, as IEEE 754 and PyTorch have it."""
    if isinstance(zero, str):
        zero = torch.zeros(1, C, dtype=getattr(torch, zero), device=device)
    input, target = _operands(math.nan, "input", device)
    pair = (zero, None) if role == "inside" else (None, zero)
    loss = smooth_l1_loss(input, target, *pair, reduction="none")
    (gradient,) = torch.autograd.grad(loss, input, torch.ones_like(loss))
    for values in (loss, gradient):
        assert values[1::2].isnan().all()
        assert (values[0::2] == 0).all()
    assert smooth_l1_loss(input, target, *pair, reduction="sum").isnan()


@pytest.mark.smoke
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_masks_in_other_dtypes(dtype: torch.dtype, backend: str, device: str) -> None:
    values = gaussian(N, C, seed=1, dtype=dtype, device=device)
    values[1::2] = math.nan
    target = gaussian(N, C, seed=2, dtype=dtype, device=device, requires_grad=True)
    for reduction in ("none", "sum"):
        check(
            values.clone().requires_grad_(),
            target,
            _rows(device),
            _rows(device, torch.uint8),
            sigma=3.0,
            reduction=reduction,
            upstream=3.0,
        )


@pytest.mark.smoke
@pytest.mark.parametrize("size", [1025, 4099])
def test_mask_at_the_tail_of_a_block(size: int, backend: str, device: str) -> None:
    """Only the last element is selected, then all but the last: the tail's own mask counts too."""
    for last in (True, False):
        mask = torch.full((size,), not last, device=device)
        mask[-1] = last
        values = gaussian(size, seed=1, device=device)
        input = torch.where(mask, values, math.nan).requires_grad_()
        target = gaussian(size, seed=2, device=device, requires_grad=True)
        check(input, target, mask, None, reduction="mean", upstream=2.0)
        check(input, target, None, mask, reduction="none", upstream=2.0)


@pytest.mark.parametrize("rows", [0, 1, 2])
@pytest.mark.parametrize("columns", [0, 4, 8])
@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_few_rows_of_a_wider_tensor(
    reduction: str, columns: int, rows: int, backend: str, device: str
) -> None:
    """The stride of a dimension of size 1 or 0 may be anything."""
    wide = gaussian(rows, 11, seed=1, device=device, requires_grad=True)
    target = gaussian(rows, columns, seed=2, device=device)
    mask = torch.ones(rows, 1, dtype=torch.bool, device=device)
    outside = gaussian(rows, 1, seed=3, device=device)
    input = wide[:, :columns]
    check(input, target, mask, outside, reduction=reduction, upstream=math.inf)
    check(input.detach(), target, mask, reduction=reduction)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (N, 1), (N, C)], ids=str)
@pytest.mark.parametrize("bad", BAD)
def test_gradient_of_inside_weights_beside_a_mask(
    bad: float, shape: tuple[int, ...], backend: str, device: str
) -> None:
    """It holds the difference as a factor, which is not 0 where the loss and its slope are."""
    input, target = _operands(bad, "input", device)
    inside = gaussian(*shape, seed=3, device=device).abs().requires_grad_()
    found = check(input, target, inside, _rows(device), reduction="sum", upstream=2.0)
    assert found["inside_weights"].isfinite().all()
