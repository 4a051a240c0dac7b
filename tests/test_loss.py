"""The loss and the gradients of input and target equal the oracle's.

The shapes, and what each is for:
- (): a number; `batchmean` has no batch to divide by, so it divides by 1;
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

from fused_smoothl1 import SmoothL1Loss, smooth_l1_loss
from tests import support
from tests.support import DEVICE, FLOATS, REDUCTIONS, Shape, boxes, call, check, coin

pytestmark = support.on_both

SHAPES = [(), (10, 5, 1, 1), *((size,) for size in (1, 3, 127, 1023, 1025, 4099, 8193))]


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
def test_rpn(dtype: torch.dtype, reduction: str) -> None:
    """20 positives and 236 negatives of 21,546 anchors; outside weights 1/256 on both."""
    anchors = torch.stack([coin(1, 9, 38, 63, p=n / 21546) for n in (20, 236)])
    positive, negative = anchors.repeat_interleave(4, dim=2)
    weights = positive.to(dtype), (positive | negative) / 256
    input, target = boxes((1, 36, 38, 63), grad=2, scale=0.3)
    target.data *= positive
    check(input, target, *weights, sigma=3.0, reduction=reduction)


@pytest.mark.smoke
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_head(reduction: str) -> None:
    """A quarter of the rows are foreground, each with the 4 columns of its class active."""
    active = torch.zeros(128, 21, device=DEVICE)
    active[torch.arange(32), torch.randint(1, 21, (32,))] = 1.0
    weights = active.repeat_interleave(4, dim=1)
    operands = boxes((128, 84), weights, weights.clone(), grad=2, scale=2.0)
    check(*operands, sigma=1.0, reduction=reduction)


TRANSITIONS: list[dict[str, Any]] = [
    *({"beta": beta} for beta in (0.0, 1e-6, 1 / 9, 0.7, 1.0, 30.0, 1e6)),
    *({"sigma": sigma} for sigma in (0.5, 1.0, 3.0, math.inf, 1e12, 1e20, 1e25, 1e200)),
    *({"sigma": sigma} for sigma in (1e-18, 1e-25, 1e-200)),
]


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("option", TRANSITIONS, ids=str)
def test_transition(option: dict[str, Any], reduction: str) -> None:
    """From 0 to L1, whose gradient is sign(x), 0 at 0; 1 / sigma² may leave float64's range."""
    operands = boxes((2, 65), (2, 1), grad=2, scale=0.3)
    operands[0].data[0, ::5] = operands[1].data[0, ::5]
    check(*operands, **option, reduction=reduction)


@pytest.mark.parametrize("upstream", [1.0, -2.5])
@pytest.mark.parametrize("dtype", [*FLOATS, torch.int64, torch.int32], ids=str)
def test_normalizer(dtype: torch.dtype, upstream: float) -> None:
    """The host never reads it: whatever it is, IEEE 754 holds, also where nothing is selected."""
    for value in (7.5, 0.0, *((math.nan, math.inf) if dtype.is_floating_point else ())):
        normalizer = torch.tensor(value, device=DEVICE).to(dtype)
        for p in (0.5, 0.0):
            operands = boxes(33, coin(33, 1, p=p), (4,), grad=2)
            check(*operands, reduction="sum", normalizer=normalizer, upstream=upstream)


@pytest.mark.parametrize("kind", [int, float, Fraction, np.float16, np.float32, np.int64])
def test_numbers_of_any_kind(kind: Any) -> None:
    """What is a real number to Python serves as one; nothing is computed in its few digits."""
    for name in ("sigma", "beta"):
        options = {name: kind(7), "normalizer": kind(3)}
        check(*boxes(9, None, kind(5), grad=2, scale=5.0), reduction="sum", **options)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_module_is_the_function(reduction: str) -> None:
    """Its call takes the normalizer; all other options it keeps."""
    operands, options = call("float32 row mask, int64 normalizer", reduction=reduction)
    expected = smooth_l1_loss(*operands, **options)
    normalizer = options.pop("normalizer")
    module: Any = SmoothL1Loss(**options)
    assert torch.equal(module(*operands, normalizer=normalizer), expected)
