"""Non-finite and special values: a table, the same on both backends and in the oracle.

The expected columns of TABLE are written by hand. Then every pair of special values as input and
target meets every special weight, as inside and as outside weight, for L1, an ordinary beta and a
beta whose ties the values hold: these are compared with the oracle and between the backends.
"""

import itertools
import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import jvp, vmap
from torch.testing import assert_close

from fused_smoothl1 import smooth_l1_loss
from tests import oracle, support
from tests.support import DEVICE, assert_same, backend_set, check, results

pytestmark = support.on_both

NAN, INF = math.nan, math.inf
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
TINY, HUGE = 1e-45, 3.0e38  # the smallest float32 above 0, and almost the largest

# x = input - target, beta, loss, gradient of input (all for weights of 1); -x has the negative one.
TABLE = [
    (NAN, 1.0, NAN, NAN),
    (INF, 1.0, INF, 1.0),
    (0.0, 1.0, 0.0, 0.0),
    (1.0, 1.0, 0.5, 1.0),
    (0.25, 0.25, 0.125, 1.0),
    (0.5, 1.0, 0.125, 0.5),
    (3.0, 1.0, 2.5, 1.0),
    (TINY, 1.0, 0.0, TINY),
    (HUGE, 1.0, HUGE, 1.0),
    (1e30, 1e38, 5e21, 1e-8),
    (NAN, 0.0, NAN, NAN),
    (INF, 0.0, INF, 1.0),
    (0.0, 0.0, 0.0, 0.0),
    (TINY, 0.0, TINY, 1.0),
    (3.0, 0.0, 3.0, 1.0),
    (HUGE, 0.0, HUGE, 1.0),
]


def tensor(*values: float, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=DEVICE, requires_grad=True)


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize("row", TABLE, ids=str)
def test_table(row: tuple[float, ...], reduction: Any, sign: float) -> None:
    """In forward mode too, and in graphs, in which anomaly detection finds nothing."""
    x, beta, loss, slope = row
    option: Any = {"sigma": INF} if beta == 0 and sign < 0 else {"beta": beta}
    function: Any = partial(smooth_l1_loss, reduction=reduction, **option)
    pair, slope = (tensor(sign * x), tensor(0.0)), sign * slope
    found = results(function, pair)
    with torch.autograd.set_detect_anomaly(not math.isnan(x)):
        found += torch.autograd.grad(function(*pair).sum(), pair, create_graph=True)
    found += jvp(lambda x: function(x, pair[1]), pair[:1], (torch.ones_like(pair[0]),))
    numbers = loss, slope, -slope, slope, -slope, loss, slope
    expected = [torch.full_like(f, n) for f, n in zip(found, numbers, strict=True)]
    assert_close(found, expected, rtol=5e-7, atol=0, equal_nan=True)  # four roundings


BEYOND = [
    {"normalizer": 1e300, "reduction": "sum"},
    *({"outside_weights": number, "reduction": "none"} for number in (1e39, -1e300, NAN)),
    *({"reduction": "none"} | option for option in ({"beta": 1e39}, {"sigma": 10**-19.5})),
]


@pytest.mark.parametrize("values", [(), (1e37, -3e37, INF)], ids=["empty", "values"])
@pytest.mark.parametrize("options", BEYOND, ids=str)
def test_numbers_beyond_float32(options: dict[str, Any], values: tuple[float, ...]) -> None:
    """Weights are infinite in every context, normalizers divide to 0; NaN stays NaN.

    With such a beta the loss is quadratic, and linear at inf alone.
    """
    input = tensor(*values[: 2 if "normalizer" in options else 3])
    pair = input, torch.zeros_like(input)
    function: Any = partial(smooth_l1_loss, **options)
    torch._dynamo.reset()
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    batched = vmap(function)
    contexts = function, compiled, lambda *pair: batched(*(t[None] for t in pair))[0]
    found = [results(context, pair) for context in contexts]
    with forward_ad.dual_level():
        found.append(results(function, pair))
    expected = oracle.smooth_l1(*pair, **options)
    exact = [torch.from_numpy(value).to(input) for value in (expected.loss, expected.input)]
    for one in found:
        # 1 / beta is no normal float32, and has 20 bits.
        assert_close(one, exact, rtol=1e-6, atol=0, equal_nan=True)


VALUES = [NAN, INF, -INF, 0.0, -0.0, TINY, -TINY, 0.5, -0.5, 1.0, -1.0, 2.0, -3.0, HUGE, -HUGE]
FACTORS = [NAN, INF, -INF, 0.0, -0.0, TINY, 0.5, 1.0, -2.0, HUGE]
CASES: list[tuple[torch.dtype, dict[str, Any]]] = [
    *((torch.float32, option) for option in ({"beta": 0.0}, {"sigma": INF}, {"beta": 1.0})),
    *((dtype, {"beta": 0.5}) for dtype in FLOATS),
]


def is_ordinary(tensor: Tensor) -> Tensor:
    """Return where products stay in the range of float32, unlike HUGE and what is almost 0."""
    size = tensor.detach().float().abs()
    return ~((size > 1e37) & (size < INF) | (size > 0) & (size < 1e-37))


@support.on_kernel
@pytest.mark.parametrize(("dtype", "option"), CASES, ids=str)
@pytest.mark.parametrize("inside", [None, *FACTORS, True, False], ids=str)
def test_products(inside: float | None, dtype: torch.dtype, option: dict[str, Any]) -> None:
    """225 pairs times every weight on either side, on both backends, and most in the oracle.

    That has the range of float64, in which HUGE - (-HUGE) is a number, and so is 2 * HUGE.
    """
    triples = zip(*itertools.product(VALUES, VALUES, FACTORS), strict=True)
    input, target, factors = (tensor(*own, dtype=dtype) for own in triples)
    full, first = factors.detach(), None
    if inside is not None:
        kind = torch.bool if isinstance(inside, bool) else dtype
        first = torch.tensor(inside, dtype=kind, device=DEVICE).expand_as(input)
    for second, reduction in ((None, "none"), (full > 0, "sum"), (full, "none"), (full, "sum")):
        operands: list[Any] = [input, target, first, second]
        kernel = results(smooth_l1_loss, operands, reduction=reduction, **option)
        with backend_set("eager"):
            eager = results(smooth_l1_loss, operands, reduction=reduction, **option)
            ordinary = torch.stack([is_ordinary(t) for t in operands if t is not None]).all(0)
            chosen: list[Any] = [t if t is None else t.detach()[ordinary] for t in operands]
            check(chosen[0].requires_grad_(), *chosen[1:], reduction=reduction, **option)
        for one, other in zip(kernel, eager, strict=True):
            assert_same("kernel and eager", one, other)
