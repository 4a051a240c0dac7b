"""The loss and the gradients of input and target equal the oracle's.

The shapes, and what each is for:
- (10, 5, 1, 1): the Caffe layer's own test;
- (1, 36, 38, 63): the regression targets of an RPN on a 600x1000 image, many thread blocks;
- (128, 84): the regression targets of a detection head, 21 classes of 4 coordinates;
- 1, 3, 127, 1023, 1025, 4099, 8193: one element, less than a vector access, and one off every
  power of two that a block size may be, so that the masked tail is taken.
"""

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 (the name PyTorch users know it by)
from torch import Tensor
from torch.testing import assert_close

from fused_smoothl1 import SmoothL1Loss, smooth_l1_loss
from fused_smoothl1.functional import Reduction
from tests.support import (
    DEVICE,
    FLOATS,
    REDUCTIONS,
    Shape,
    assert_equal,
    boxes,
    call,
    check,
    coin,
    on_both,
    on_eager,
    results,
)

pytestmark = on_both

SHAPES = [(10, 5, 1, 1), *((size,) for size in (1, 3, 127, 1023, 1025, 4099, 8193))]


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape: Shape, weighted: bool) -> None:
    """With the Caffe layer's sigma, weights of both signs, and its test's gradient from above."""
    weights = [shape, shape] if weighted else []
    for reduction in REDUCTIONS:
        check(*boxes(shape, *weights, grad=2), sigma=2.4, reduction=reduction, upstream=3.7)


@pytest.mark.smoke
@pytest.mark.parametrize("reduction", ["sum", "batchmean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bool], ids=["float", "mask"])
def test_rpn(dtype: torch.dtype, reduction: Reduction) -> None:
    """20 positives and 236 negatives of 21,546 anchors; outside weights 1/256 on both."""
    positive, negative = (
        coin(1, 9, 38, 63, p=n / 21546).repeat_interleave(4, dim=1) for n in (20, 236)
    )
    weights = positive.to(dtype), (positive | negative) / 256
    input, target = boxes((1, 36, 38, 63), grad=2, scale=0.3)
    target.data *= positive
    check(input, target, *weights, sigma=3.0, reduction=reduction)


@pytest.mark.smoke
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_head(reduction: Reduction) -> None:
    """A quarter of the rows are foreground, each with the 4 columns of its class active."""
    active = torch.zeros(128, 21, device=DEVICE)
    active[torch.arange(32), torch.randint(1, 21, (32,))] = 1.0
    weights = active.repeat_interleave(4, dim=1)
    operands = boxes((128, 84), weights, weights.clone(), grad=2, scale=2.0)
    check(*operands, sigma=1.0, reduction=reduction)


@on_eager
def test_size_of_several_eager_blocks() -> None:
    """Larger than any block that a CPU keeps in its cache, and not a multiple of one."""
    columns = 2**18 + 11
    operands = boxes((3, columns), coin(3, 1), (columns,), grad=2)
    check(*operands, sigma=3.0, reduction="mean", upstream=2.0)


# They broadcast to (4, 3, 5, 7), in which no two sizes alike could be swapped.
WEIGHTS: list[Shape | float | None] = [
    *(None, (), (1, 1, 1, 1), (4, 1, 1, 1), (4, 1, 5, 7), (3, 1, 1), (5, 1), (7,)),
    *((4, 1, 1, 7), (4, 3, 5, 7)),
]


@pytest.mark.parametrize("outside", [*WEIGHTS, 3, -0.4, 0], ids=str)
def test_weights(outside: Shape | float | None) -> None:
    """Each alone, and beside each other."""
    for inside in WEIGHTS:
        for reduction in ("none", "batchmean"):
            operands = boxes((4, 3, 5, 7), inside, outside, grad=2)
            check(*operands, sigma=1.3, reduction=reduction, upstream=1.9)


TRANSITIONS = [
    *({"beta": beta} for beta in (0.0, 1e-6, 1 / 9, 0.7, 1.0, 30.0, 1e6)),
    *({"sigma": sigma} for sigma in (0.5, 1.0, 3.0, math.inf, 1e12, 1e20, 1e25, 1e200)),
]


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("option", TRANSITIONS, ids=str)
def test_transition(option: dict[str, Any], reduction: Reduction) -> None:
    """From a parabola to L1, whose gradient is sign(x), 0 at 0.

    1 / sigma² may be subnormal in float32, or no number of its own.
    """
    operands = boxes((2, 65), (2, 1), grad=2)
    operands[0].data[0, ::5] = operands[1].data[0, ::5]
    check(*operands, **option, reduction=reduction)


@pytest.mark.parametrize("sigma", [1e-18, 1e-25, 1e-200])
def test_tiny_sigma_is_zero(sigma: float) -> None:
    """1 / sigma² may be too large for float32 or even for float64."""
    for value in results(smooth_l1_loss, boxes(10), sigma=sigma, reduction="sum"):
        assert value.abs().max() < 1e-33


NORMALIZERS = [
    *(7, 0.3, *(torch.tensor(7.5).to(dtype) for dtype in (*FLOATS, torch.int64, torch.int32))),
    # The host never reads a tensor, so what it holds follows IEEE 754.
    *(torch.tensor(number) for number in (0.0, math.nan, math.inf)),
]


@pytest.mark.parametrize("upstream", [1.0, -2.5])
@pytest.mark.parametrize("normalizer", NORMALIZERS, ids=str)
def test_normalizer(normalizer: Any, upstream: float) -> None:
    if isinstance(normalizer, Tensor):
        normalizer = normalizer.to(DEVICE)
    for rows in (coin(33, 1), coin(33, 1, p=0.0)):
        operands = boxes(33, rows, (4,), grad=2)
        check(*operands, sigma=3.0, reduction="sum", normalizer=normalizer, upstream=upstream)


@pytest.mark.parametrize("kind", [int, Fraction, np.float16, np.float32, np.int64])
def test_numbers_of_any_kind(kind: Any) -> None:
    """What is a real number to Python serves as one; nothing is computed in its few digits."""
    input, target = boxes(9, grad=0, dtype=torch.float64)

    def losses(number: Any) -> list[Tensor]:
        return [
            smooth_l1_loss(input, target, None, number(5), sigma=number(3)),
            smooth_l1_loss(input, target, beta=number(2), reduction="sum", normalizer=number(7)),
        ]

    assert_equal(losses(kind), losses(float))


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_torch_agrees_without_weights(beta: float) -> None:
    """Users come from F.smooth_l1_loss: without weights and with beta it is the same function."""
    pair = boxes((8, 33), grad=2)
    for reduction in ("none", "sum", "mean"):
        found = results(smooth_l1_loss, pair, beta=beta, reduction=reduction)
        assert_close(found, results(F.smooth_l1_loss, pair, beta=beta, reduction=reduction))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_module_is_the_function(reduction: Reduction) -> None:
    """Its call takes the normalizer; all other options it keeps."""
    operands, options = call("float32 row mask, int64 normalizer", reduction=reduction)
    expected = smooth_l1_loss(*operands, **options)
    module: Any = SmoothL1Loss(sigma=options["sigma"], reduction=reduction)
    assert_equal(module(*operands, normalizer=options["normalizer"]), expected)
