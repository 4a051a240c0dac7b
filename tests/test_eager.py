"""Eager PyTorch has several ways to one answer, and takes as few operations as there are.

Each way is the oracle's answer, on both sides of where it begins.
"""

import math
from itertools import permutations, product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_smoothl1 import eager, smooth_l1_loss
from tests import support
from tests.support import CALLS, FLOATS, REDUCTIONS, boxes, call, check, coin, values

pytestmark = support.on_eager


@pytest.fixture(autouse=True)
def _on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make all operands there, also where there is a GPU, on which not every way is taken."""
    monkeypatch.setattr(support, "DEVICE", "cpu")


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Gather at any size, and collect how many rows are computed: of all, then of each batch."""
    rows: list[int] = []
    original = eager.forward

    def spied(problem: Any, needs: Any) -> Any:
        rows.append(len(problem.input))
        return original(problem, needs)

    monkeypatch.setattr(eager, "forward", spied)
    monkeypatch.setattr(eager, "GATHER_FROM", 1)
    return rows


def _is_own(*operands: Any, **options: Any) -> bool:
    """Return whether PyTorch's own loss computes this call."""
    loss: Any = smooth_l1_loss(*operands, **options)
    return bool(loss.grad_fn.name() == "SmoothL1LossBackward0")


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_pytorchs_own_loss(reduction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is taken for small sums and means, and at any size without a reduction."""
    operands = boxes((40, 5), grad=2)
    for large in (200, 201):
        monkeypatch.setattr(eager, "NATIVE_BELOW", large)
        expected = reduction == "none" or (large == 201 and reduction != "batchmean")
        assert _is_own(*operands, reduction=reduction) == expected
        check(*operands, reduction=reduction, sigma=1.5, upstream=2.0)


def test_where_pytorchs_own_loss_would_be_wrong() -> None:
    """By its value, or by the memory format of its gradient."""
    operands = boxes(4, grad=0)
    # The strides of dimensions of size 1 may be anything, and are the gradient's too.
    for input, target in (operands, [t.t() for t in operands], [t.t()[:, :1] for t in operands]):
        input = input.detach().requires_grad_()
        check(input, target, reduction="sum", normalizer=torch.tensor(3))
        check(input, target, upstream=1.5)


@pytest.mark.parametrize("beta", [0.0, 1e-44, 1e-30, 2**-21, 2**-20, 2**20, 2**21, 1e30, 3e38])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_any_beta(dtype: torch.dtype, beta: float) -> None:
    """Also where PyTorch's operators would leave their range: they square before they divide."""
    pair = boxes((9, 5), grad=2, dtype=dtype, scale=min(max(beta, 1e-36), 1e36))
    assert _is_own(*pair, beta=beta) == (2**-20 <= beta <= 2**20)
    for weights in ([], [None, values(9, 5, dtype=dtype)], [coin(9, 5)]):
        for reduction in ("none", "sum", "mean"):
            check(*pair, *weights, beta=beta, reduction=reduction, upstream=0.75)


def test_l1_where_subnormal_numbers_are_0() -> None:
    """A CPU can be told to take them for 0: the derivative is 0 there, and the sign elsewhere."""
    if not torch.set_flush_denormal(True):
        pytest.skip("waits for a CPU that can flush subnormal numbers")
    try:
        input = torch.tensor([0.0, 1e-45, 1e-37, -1e-37, -3.0] * 8, requires_grad=True)
        for weights in ((), (None, torch.ones(40))):
            loss = smooth_l1_loss(input, torch.zeros(40), *weights, beta=0.0, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, input)
            assert gradient.tolist() == [0.0, 0.0, 1.0, -1.0, -1.0] * 8
    finally:
        torch.set_flush_denormal(False)


# How many elements one thread may take, and how many of 4 rows of 6 are then taken at a time.
BATCHES = {"sum": (5, 1, 1, 1, 1), "mean": (23, 3, 1), "batchmean": (24, 4), "none": (1,)}


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("other", [None, (80, 3, 2), (80, 1, 1), (3, 2), (), "mask"], ids=str)
def test_few_rows(
    transposed: bool, other: Any, forwards: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gathered with weights and beta of the shape `other`; the rows left out may hold NaN."""
    row_mask = torch.zeros(80, 1, 1, dtype=torch.uint8)
    row_mask[[3, 4, 40, 79]] = 2
    beta = values(*other).abs() if isinstance(other, tuple) else None
    other = coin(80, 3, 2, p=0.005) if other == "mask" else other
    for weights in ([row_mask, other], [other, row_mask]):
        operands = boxes((80, 3, 2), *weights, grad=0)
        for i in range(2):
            excluded = torch.where(row_mask != 0, operands[i], math.nan)
            laid_out = excluded.mT.contiguous().mT if transposed else excluded
            operands[i] = laid_out.requires_grad_()
        # (Of two masks, the inside one is asked.)
        is_asked = weights[0] is row_mask or not isinstance(other, Tensor)
        for reduction, (alone, *batches) in BATCHES.items():
            monkeypatch.setattr(eager, "THREAD_NUMEL", alone)
            forwards.clear()
            check(*operands, beta=beta, reduction=reduction, upstream=-1.5)
            assert forwards == ([80, *batches] if is_asked else [80])


def test_few_rows_of_anything(forwards: list[int]) -> None:
    """What is left out has a gradient of exactly 0; 0 / 0 is NaN, even for an empty mask."""
    row = torch.arange(80)[:, None] == 7
    for upstream in (math.inf, math.nan):
        check(*boxes((80, 6), None, row, grad=2), reduction="sum", upstream=upstream)
    for divisor, mask in product((0.0, math.nan, math.inf, 7.0), (row, row & False)):
        normalizer = torch.tensor(divisor)
        check(*boxes((80, 6), mask, grad=2), reduction="sum", normalizer=normalizer, upstream=2.0)
    for dtypes in permutations(FLOATS, 2):
        input, target = (values(80, 6, dtype=dtype, grad=True) for dtype in dtypes)
        check(input, target, row, upstream=3.0)
    assert 1 in forwards


@pytest.mark.parametrize("name", CALLS)
def test_losses_in_parts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of whole rows, the last of them shorter, with the rows of the weights that have any."""
    for rows, part in [(23, 1), (23, 60), (23, 91), (23, 92), (1, 2)]:
        monkeypatch.setattr(eager, "PART_NUMEL", part)
        operands, options = call(name, rows)
        check(*operands, **options, upstream=1.25)


def test_parts_of_what_broadcasts(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is one for each column is not split, be there as many rows."""
    monkeypatch.setattr(eager, "PART_NUMEL", 8)
    for shape in [(), (4,), (1, 4), (4, 1), (4, 4)]:
        check(*boxes(4, None, shape), beta=values(*shape).abs(), upstream=1.5)


def test_number_of_operations(unpoisoned: None) -> None:
    """It does not grow with the operands, and is what the formula has."""
    # The difference, weighted; the loss, weighted, summed and divided; and the gradient: the
    # clamped difference, divided, weighted twice.
    forward = ["sub", "mul_", "smooth_l1_loss", "mul_", "sum", "mul_"]
    for rows in (64, 1 << 20):
        operands, upstream = boxes((rows, 1), (rows, 1), (rows, 1)), torch.tensor(1.0)
        smooth_l1_loss(*operands).backward(upstream)  # Numbers are made once, and kept.
        with torch.autograd.profiler.profile() as profile:
            torch.autograd.grad(smooth_l1_loss(*operands), operands[0], upstream)
        outer = [event for event in profile.function_events if event.cpu_parent is None]
        names = [event.name for one in outer for event in (one, *one.cpu_children)]
        found = [name.removeprefix("aten::") for name in names if name.startswith("aten::")]
        found = [name for name in found if name not in ("empty", "empty_like", "item", "detach")]
        assert found == [*forward, "clamp_", "mul_", "mul_", "mul_"]


def test_numbers_on_another_device() -> None:
    """They are made there, without a copy; beyond float32 they are infinite, as on the CPU."""
    there = SimpleNamespace(is_cpu=False, new_full=lambda shape, number, dtype: number)
    problem: Any = SimpleNamespace(input=there, compute_dtype=torch.float32)
    found: list[Any] = [eager._number_tensor(value, problem) for value in (2.5, 1e50, -1e50)]
    assert found == [2.5, math.inf, -math.inf]
