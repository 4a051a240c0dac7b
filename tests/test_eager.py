"""Eager PyTorch has several ways to one answer, and takes as few operations as there are.

The way depends on what is asked for: PyTorch's own loss, few rows that are gathered, losses in
parts, or the composition where PyTorch's operators are not exact. Each is the oracle's answer, on
both sides of where it begins.
"""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_smoothl1 import eager, smooth_l1_loss
from fused_smoothl1.functional import Reduction
from tests.support import check, coin, gaussian

REDUCTIONS = ("none", "sum", "mean", "batchmean")

pytestmark = pytest.mark.usefixtures("eager_backend")


def _pair(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> list[Tensor]:
    return [
        gaussian(*shape, seed=seed, scale=scale, dtype=dtype, requires_grad=True) for seed in (1, 2)
    ]


def _is_own(loss: Tensor) -> bool:
    """Whether PyTorch's own loss made this one."""
    assert loss.grad_fn is not None
    return loss.grad_fn.name() == "SmoothL1LossBackward0"


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pytorchs_own_loss(
    dtype: torch.dtype, reduction: Reduction, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is taken below a size, but for a divisor of its own; without a reduction at any size."""
    input, target = _pair(40, 5, dtype=dtype)
    for large, is_small in ((201, True), (200, False)):
        monkeypatch.setattr(eager, "LARGE", large)
        expected = reduction == "none" or (is_small and reduction != "batchmean")
        assert _is_own(smooth_l1_loss(input, target, reduction=reduction)) == expected
        check(input, target, reduction=reduction, sigma=1.5, upstream=2.0)


@pytest.mark.parametrize(
    "call",
    [
        {"inside_weights": torch.tensor(2.0)},
        {"outside_weights": 0.5},
        {"outside_weights": torch.ones(4, 1, dtype=torch.bool)},
        {"beta": 0.0},
        {"beta": eager.LEAST_BETA / 2},
        {"beta": eager.MOST_BETA * 2},
        {"reduction": "sum", "normalizer": 3},
        {"reduction": "sum", "normalizer": torch.tensor(3)},
        {"dtype": torch.float16},
        {"dtype": torch.bfloat16, "reduction": "none"},
        {"target_dtype": torch.float64},
        {"permuted": True},
        {"permuted": True, "reduction": "none"},
        {"sliced": True, "reduction": "none"},
        {"empty": True},
    ],
    ids=str,
)
def test_where_pytorchs_own_loss_is_not_all(call: dict[str, Any]) -> None:
    """Another gradient, dtype, memory format, or value would come out."""
    options = dict(call)
    dtype = options.pop("dtype", torch.float32)
    input, target = _pair(4, 6, dtype=dtype)
    target = target.detach().to(options.pop("target_dtype", dtype))
    if options.pop("permuted", False):
        input, target = input.detach().t().requires_grad_(), target.t()
    if options.pop("sliced", False):
        input, target = input.detach()[:, ::2].requires_grad_(), target[:, ::2]
    if options.pop("empty", False):
        input, target = input.detach()[:0].requires_grad_(), target[:0]
    assert not _is_own(smooth_l1_loss(input, target, **options))
    check(input, target, **options, upstream=1.5)


@pytest.mark.parametrize("shape", [(6, 1), (1, 6), (1, 1), (1,)], ids=str)
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_strides_of_dimensions_of_size_1(reduction: str, shape: tuple[int, ...]) -> None:
    """They may be anything, and are the gradient's too."""
    for strides in (torch.empty(shape).stride(), tuple(17 for _ in shape)):
        values = gaussian(200, seed=1)
        input = values.as_strided(shape, strides).requires_grad_()
        check(input, gaussian(*shape, seed=2), reduction=reduction)


BETAS = [
    *(0.0, 1e-44, 1e-30, 2.0**-21, 2.0**-20, 1e-3, 1.0, 2.5),
    *(2.0**20, 2.0**21, 1e18, 1e30, 3e38),
]


@pytest.mark.parametrize("weights", ["none", "floats", "mask"])
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_any_beta(dtype: torch.dtype, beta: float, weights: str) -> None:
    """Also where PyTorch's operators would leave their range: they square before they divide."""
    scale = min(max(beta, 1e-36), 1e36)
    input, target = _pair(9, 5, dtype=dtype, scale=scale)
    chosen: dict[str, list[Any]] = {
        "none": [],
        "floats": [None, gaussian(9, 5, seed=3, dtype=dtype)],
        "mask": [coin(9, 5, seed=3)],
    }
    for reduction in ("none", "sum", "mean"):
        check(input, target, *chosen[weights], beta=beta, reduction=reduction, upstream=0.75)


def test_l1_where_subnormal_numbers_are_0() -> None:
    """A CPU can be told to take them for 0: the derivative is 0 there, and 1 everywhere else."""
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush subnormal numbers")
    try:
        input = torch.tensor([0.0, 1e-45, 1e-37, -1e-37, -3.0] * 8, requires_grad=True)
        for weights in ((), (None, torch.ones(40))):
            loss = smooth_l1_loss(input, torch.zeros(40), *weights, beta=0.0, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, input)
            assert gradient.tolist() == [0.0, 0.0, 1.0, -1.0, -1.0] * 8
    finally:
        torch.set_flush_denormal(False)


def _weights(kind: str, rows: int) -> Tensor | None:
    """Return weights for (rows, 3, 2) elements."""
    shapes = {"whole": (rows, 3, 2), "rows": (rows, 1, 1), "columns": (3, 2), "number": ()}
    return gaussian(*shapes[kind], seed=5).requires_grad_() if kind in shapes else None


def _is_gathered(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Collect how many rows were gathered, call by call."""
    gathered: list[int] = []
    original = eager._forward_of_rows

    def spied(problem: Any, needs: Any, rows: Tensor) -> Any:
        gathered.append(rows.numel())
        return original(problem, needs, rows)

    monkeypatch.setattr(eager, "_forward_of_rows", spied)
    return gathered


@pytest.mark.parametrize("other", ["nothing", "whole", "rows", "columns", "number", "mask"])
@pytest.mark.parametrize("role", ["inside", "outside"])
@pytest.mark.parametrize("layout", ["dense", "sliced", "transposed"])
def test_few_rows(layout: str, role: str, other: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are gathered with all that belongs to them, and what is left out may be anything."""
    monkeypatch.setattr(eager, "MANY", 6 * 80)
    gathered = _is_gathered(monkeypatch)
    mask = torch.zeros(80, 1, 1, dtype=torch.uint8)
    mask[[3, 4, 40, 79]] = 2
    operands = [torch.where(mask != 0, gaussian(80, 3, 2, seed=s), math.nan) for s in (1, 2)]
    if layout == "sliced":
        operands = [t.repeat_interleave(2, 2)[:, :, ::2] for t in operands]
    elif layout == "transposed":
        operands = [t.transpose(0, 2).contiguous().transpose(0, 2) for t in operands]
    input, target = (t.requires_grad_() for t in operands)
    weights = coin(80, 3, 2, seed=5) if other == "mask" else _weights(other, 80)
    if weights is not None and other != "mask":
        weights = weights.detach()
    pair = (mask, weights) if role == "inside" else (weights, mask)
    for reduction, rows in (("sum", 4), ("mean", 4), ("batchmean", 4), ("none", None)):
        # Some rows at a time: one, three and the last, or all.
        monkeypatch.setattr(eager, "ALONE", {"sum": 1, "mean": 18}.get(reduction, eager.ALONE))
        gathered.clear()
        check(input, target, *pair, reduction=reduction, upstream=-1.5)
        # (Of two masks, the inside one is asked.)
        is_asked = rows is not None and not (role == "outside" and other == "mask")
        assert gathered == ([rows] if is_asked else [])


@pytest.mark.parametrize(
    ("selected", "shape", "is_few"),
    [
        (10, (80, 1), True),
        (11, (80, 1), False),
        (0, (80, 1), False),
        (10, (80, 6), False),
        (1, (1, 6), False),
        (1, (6,), False),
        (1, (), False),
    ],
)
def test_what_few_rows_are(
    selected: int, shape: tuple[int, ...], is_few: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some, at most an eighth of all, of a mask of whole rows, and of enough elements."""
    gathered = _is_gathered(monkeypatch)
    mask = torch.zeros(shape, dtype=torch.bool)
    mask.view(-1)[:selected] = True
    input, target = _pair(80, 6)
    for many, is_many in ((480, True), (481, False)):
        monkeypatch.setattr(eager, "MANY", many)
        gathered.clear()
        check(input, target, mask, reduction="sum", normalizer=torch.tensor(7), upstream=2.0)
        assert bool(gathered) == (is_few and is_many)


def test_few_rows_under_an_upstream_gradient_that_is_not_finite(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is left out has a gradient of exactly 0."""
    monkeypatch.setattr(eager, "MANY", 1)
    mask = torch.arange(80)[:, None] == 7
    input, target = _pair(80, 6)
    for upstream in (math.inf, math.nan):
        check(input, target, None, mask, reduction="sum", upstream=upstream)


def test_few_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as PyTorch leaves to one thread, and at least one."""
    rows: list[int] = []
    original = eager.forward

    def spied(problem: Any, needs: Any) -> Any:
        rows.append(len(problem.input))
        return original(problem, needs)

    monkeypatch.setattr(eager, "forward", spied)
    monkeypatch.setattr(eager, "MANY", 1)
    mask = torch.arange(80)[:, None] % 20 == 7
    for alone, expected in ((23, [80, 3, 1]), (5, [80, 1, 1, 1, 1]), (24, [80, 4])):
        monkeypatch.setattr(eager, "ALONE", alone)
        rows.clear()
        input, target = _pair(80, 6)
        check(input, target, mask, reduction="sum")
        assert rows == expected


@pytest.mark.parametrize("selected", [0, 1])
@pytest.mark.parametrize("normalizer", [0.0, math.nan, math.inf])
def test_few_rows_under_a_bad_normalizer(
    normalizer: float, selected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """0 by 0 is NaN, be it a sum of nothing."""
    monkeypatch.setattr(eager, "MANY", 1)
    mask = torch.arange(80)[:, None] < selected
    input, target = _pair(80, 6)
    check(input, target, mask, reduction="sum", normalizer=torch.tensor(normalizer))


@pytest.mark.parametrize("input", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("target", [torch.float64, torch.float32, torch.bfloat16])
def test_few_rows_of_several_dtypes(
    target: torch.dtype, input: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(eager, "MANY", 1)
    mask = torch.arange(80)[:, None] == 7
    one, other = (t.detach() for t in _pair(80, 6))
    one, other = one.to(input).requires_grad_(), other.to(target).requires_grad_()
    check(one, other, mask, reduction="mean", upstream=3.0)


@pytest.mark.parametrize("kind", ["nothing", "whole", "rows", "columns", "number", "mask"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_losses_in_parts(reduction: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of whole rows, the last of them shorter, with the rows of the weights that have any."""
    monkeypatch.setattr(eager, "LARGE", 1)
    input, target = _pair(23, 3, 2)
    weights = coin(23, 3, 2, seed=5) if kind == "mask" else _weights(kind, 23)
    for part in (1, 60, 6 * 23 - 1, 6 * 23):
        monkeypatch.setattr(eager, "PART", part)
        check(input, target, None, weights, reduction=reduction, upstream=1.25)
        check(input, target, weights, _weights("rows", 23), reduction=reduction, beta=0.5)


@pytest.mark.parametrize("shape", [(600,), (1, 600), (600, 0), (23, 23)], ids=str)
def test_parts_of_odd_shapes(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """One row is one part; weights for each column are not split, be there as many rows."""
    monkeypatch.setattr(eager, "PART", 250)
    input, target = _pair(*shape)
    check(input, target, None, 2.0, reduction="sum")
    columns = gaussian(shape[-1], seed=5) if len(shape) == 2 else None
    check(input, target, None, columns, reduction="sum")


def test_number_of_operations(unpoisoned: None) -> None:
    """It does not grow with the operands, and is what the formula has."""

    def operations(numel: int) -> list[str]:
        operands = [gaussian(numel, 1, seed=seed) for seed in range(4)]
        operands[0].requires_grad_()
        upstream = torch.tensor(1.0)
        smooth_l1_loss(*operands).backward(upstream)  # Numbers are made once, and kept.
        with torch.autograd.profiler.profile() as profile:
            loss = smooth_l1_loss(*operands)
            torch.autograd.grad(loss, operands[0], upstream)
        events = [event for event in profile.function_events if event.cpu_parent is None]
        events += [child for event in events for child in event.cpu_children]
        names = [e.name for e in events if e.name.startswith("aten::")]
        return [n for n in names if n not in ("aten::empty", "aten::empty_like", "aten::item")]

    # The difference, weighted; the loss, weighted, summed and divided; and the gradient: the
    # clamped difference, divided, weighted twice.
    forward = ["sub", "mul_", "smooth_l1_loss", "mul_", "sum", "mul_"]
    expected = [*forward, "clamp_", "mul_", "mul_", "mul_"]
    found = operations(1 << 20)
    assert [n.removeprefix("aten::") for n in found if "detach" not in n] == expected
    assert operations(64) == found


@pytest.mark.parametrize(("value", "expected"), [(1e50, math.inf), (-1e50, -math.inf), (2.5, 2.5)])
def test_numbers_on_another_device(value: float, expected: float) -> None:
    """They are made there, without a copy; beyond float32 they are infinite, as on the CPU."""
    filled: list[tuple[float, torch.dtype]] = []

    class Input:
        is_cpu = False

        def new_full(self, shape: tuple[()], value: float, dtype: torch.dtype) -> None:
            filled.append((value, dtype))

    problem: Any = SimpleNamespace(input=Input(), compute_dtype=torch.float32)
    eager._as_tensor(problem, value)
    assert filled == [(expected, torch.float32)]
    problem.input = torch.empty(3)
    assert eager._as_tensor(problem, value).item() == expected
