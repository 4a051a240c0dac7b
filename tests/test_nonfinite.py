"""Non-finite and special values: a table, the same on both backends and in the oracle.

Every pair of special values as input and target meets every special weight, as inside and as
outside weight, for L1, an ordinary beta and a beta whose ties the table holds. The expected
column of TABLE is written by hand; the products are compared with the oracle and between the
backends.
"""

import itertools
import math
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import jvp, vmap
from torch.testing import assert_close

from fused_smoothl1 import smooth_l1_loss
from fused_smoothl1.functional import Reduction
from tests import oracle
from tests.support import (
    DEVICE,
    assert_near,
    assert_same,
    backend_set,
    boxes,
    check,
    float64,
    on_both,
    on_kernel,
    results,
)

pytestmark = on_both

NAN, INF = math.nan, math.inf
TINY = 1e-45  # the smallest float32 above 0
HUGE = 3.0e38

# x = input - target, beta, loss, gradient of input (all for weights of 1)
TABLE = [
    (NAN, 1.0, NAN, NAN),
    (INF, 1.0, INF, 1.0),
    (-INF, 1.0, INF, -1.0),
    (0.0, 1.0, 0.0, 0.0),
    (-0.0, 1.0, 0.0, 0.0),
    (1.0, 1.0, 0.5, 1.0),
    (-1.0, 1.0, 0.5, -1.0),
    (0.25, 0.25, 0.125, 1.0),
    (-0.25, 0.25, 0.125, -1.0),
    (0.5, 1.0, 0.125, 0.5),
    (3.0, 1.0, 2.5, 1.0),
    (TINY, 1.0, 0.0, TINY),
    (HUGE, 1.0, HUGE, 1.0),
    (1e30, 1e38, 5e21, 1e-8),
    (NAN, 0.0, NAN, NAN),
    (INF, 0.0, INF, 1.0),
    (-INF, 0.0, INF, -1.0),
    (0.0, 0.0, 0.0, 0.0),
    (-0.0, 0.0, 0.0, 0.0),
    (TINY, 0.0, TINY, 1.0),
    (-TINY, 0.0, TINY, -1.0),
    (-3.0, 0.0, 3.0, -1.0),
    (HUGE, 0.0, HUGE, 1.0),
]


def tensor(*values: float, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=DEVICE, requires_grad=True)


@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize(("x", "beta", "loss", "slope"), TABLE)
def test_table(x: float, beta: float, loss: float, slope: float, reduction: Reduction) -> None:
    """In forward mode too, and in graphs, in which anomaly detection finds nothing."""
    option: Any = {"sigma": INF} if beta == 0 and reduction == "sum" else {"beta": beta}
    function: Any = partial(smooth_l1_loss, reduction=reduction, **option)
    pair = tensor(x), tensor(0.0)
    found = results(function, pair)
    with torch.autograd.set_detect_anomaly(not math.isnan(x)):
        found += torch.autograd.grad(function(*pair).sum(), pair, create_graph=True)
    found += jvp(lambda x: function(x, pair[1]), pair[:1], (torch.ones_like(pair[0]),))
    numbers = loss, slope, -slope, slope, -slope, loss, slope
    expected = [torch.full_like(f, n) for f, n in zip(found, numbers, strict=True)]
    rounding = 4 * torch.finfo(torch.float32).eps
    assert_close(found, expected, rtol=rounding, atol=0, equal_nan=True)


@pytest.mark.parametrize("option", [{"beta": 1e39}, {"sigma": 10**-19.5}], ids=str)
@pytest.mark.parametrize("context", [nullcontext, forward_ad.dual_level])
def test_beta_beyond_float32(context: Any, option: dict[str, Any]) -> None:
    """No float32 is that large, so the loss is quadratic, and linear at inf alone."""
    pair = tensor(1e38, -3e38, 1e30, 0.0, INF), torch.zeros(5, device=DEVICE)
    with context():
        found = results(smooth_l1_loss, pair, reduction="none", **option)
    expected = oracle.smooth_l1(*pair, beta=1e39, reduction="none")
    for value, exact in zip(found, (expected.loss, expected.input), strict=True):
        # 1 / beta is no normal float32, and has 20 bits.
        assert_close(float64(value), exact, rtol=1e-6, atol=0)


BEYOND: list[dict[str, Any]] = [
    *({"outside_weights": number} for number in (1e39, -1e300, NAN)),
    {"outside_weights": 1e39, "reduction": "none"},
    {"normalizer": 1e300, "reduction": "sum"},
]


@pytest.mark.parametrize("rows", [0, 3])
@pytest.mark.parametrize("options", BEYOND, ids=str)
def test_numbers_beyond_float32(options: dict[str, Any], rows: int) -> None:
    """They are infinite in every context, and divide to 0; NaN stays NaN."""
    input, target = boxes(rows, grad=0)
    plain = smooth_l1_loss(input, target, **options)
    torch._dynamo.reset()
    compiled = torch.compile(smooth_l1_loss, backend="aot_eager", fullgraph=True)
    batched = vmap(lambda x: smooth_l1_loss(x, target, **options))
    assert_same("compiled", compiled(input, target, **options), plain)
    assert_same("batched", batched(input[None])[0], plain)


VALUES = [NAN, INF, -INF, 0.0, -0.0, TINY, -TINY, 0.5, -0.5, 1.0, -1.0, 2.0, -3.0, HUGE, -HUGE]
WEIGHTS = [None, NAN, INF, -INF, 0.0, -0.0, TINY, 0.5, 1.0, -2.0, HUGE, True, False]
OPTIONS = [{"beta": 0.0}, {"sigma": INF}, {"beta": 0.5}, {"beta": 1.0}, {"sigma": 3.0}]


def products(
    inside: Any, outside: Any = None, dtype: torch.dtype = torch.float32, **option: Any
) -> tuple[list[Any], list[Tensor]]:
    """Return operands, every pair of VALUES, and the loss of each with its gradients."""
    pairs = zip(*itertools.product(VALUES, VALUES), strict=True)
    operands: list[Any] = [tensor(*own, dtype=dtype) for own in pairs]
    for weight in (inside, outside):
        kind = torch.bool if isinstance(weight, bool) else dtype
        operands += [None if weight is None else torch.tensor(weight, dtype=kind, device=DEVICE)]
    found = results(smooth_l1_loss, operands, reduction="none", **option)
    of_sum = results(smooth_l1_loss, operands, reduction="sum", **option)
    for one, other in zip(of_sum[1:], found[1:], strict=True):
        assert_same("gradient of sum and none", one, other)
    return operands, found


@on_kernel
@pytest.mark.parametrize("option", OPTIONS, ids=str)
@pytest.mark.parametrize("inside", WEIGHTS, ids=str)
def test_products(inside: float | None, option: dict[str, Any]) -> None:
    """225 pairs times every weight on either side, on both backends and in the oracle.

    The oracle has the range of float64: HUGE - (-HUGE) is a number there, and so is 2 * HUGE. So
    those places alone are left to the other backend.
    """
    for outside in WEIGHTS:
        what = f"inside {inside}, outside {outside}, {option}"
        with backend_set("eager"):
            operands, eager = products(inside, outside, **option)
        _, kernel = products(inside, outside, **option)
        for one, other in zip(kernel, eager, strict=True):
            assert_same(what, one, other)
        expected = oracle.smooth_l1(*operands, **option, reduction="none")
        ordinary = torch.ones_like(operands[0], dtype=torch.bool)
        for operand in operands:
            if operand is not None:
                size = operand.detach().float().abs()
                ordinary &= (size != HUGE) & ~((size > 0) & (size < 1e-37))
        for value, exact in zip(
            eager, (expected.loss, expected.input, expected.target), strict=True
        ):
            assert_near(what, value[ordinary], exact[ordinary.cpu()], computed_in=torch.float32)


@on_kernel
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_other_dtypes_agree(beta: float, dtype: torch.dtype) -> None:
    """The same special values, stored in the other dtypes (HUGE is inf in float16)."""
    _, kernel = products(-2.0, dtype=dtype, beta=beta)
    with backend_set("eager"):
        _, eager = products(-2.0, dtype=dtype, beta=beta)
    for one, other in zip(kernel, eager, strict=True):
        assert_same("kernel and eager", one, other)


@pytest.mark.parametrize("reduction", ["sum", "mean", "batchmean"])
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_one_bad_element_reaches_the_sum(bad: float, reduction: Reduction) -> None:
    """A reduction neither swallows a NaN nor spreads it to other elements' gradients."""
    for position in (0, 4097):
        input, target = boxes((4098,))
        input.data[position] = bad
        check(input, target, reduction=reduction)
