"""Non-finite and special values: a table, the same on both backends and in the oracle.

Every pair of special values as input and target meets every special weight, as inside and as
outside weight, for L1, an ordinary beta and a beta whose ties the table holds. The expected
column of TABLE is written by hand; the products are compared with the oracle and between the
backends.
"""

import itertools
import math
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from fused_smoothl1 import smooth_l1_loss
from fused_smoothl1.functional import Reduction
from tests import oracle
from tests.support import assert_near, assert_same, backend_set, gaussian

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


@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize(("x", "beta", "loss", "slope"), TABLE)
def test_table(
    x: float,
    beta: float,
    loss: float,
    slope: float,
    reduction: Reduction,
    backend: str,
    device: str,
) -> None:
    input = torch.tensor([x], device=device, requires_grad=True)
    target = torch.zeros(1, device=device, requires_grad=True)
    options: list[dict[str, Any]] = [{"beta": beta}]
    if beta == 0:
        options.append({"sigma": math.inf})
    for option in options:
        actual = smooth_l1_loss(input, target, reduction=reduction, **option)
        grads = torch.autograd.grad(actual, [input, target], torch.ones_like(actual))
        got = [actual.reshape(1), *grads]
        for value, expected in zip(got, (loss, slope, -slope), strict=True):
            torch.testing.assert_close(
                value.detach().cpu(),
                torch.tensor([expected]),
                rtol=4 * torch.finfo(torch.float32).eps,
                atol=0,
                equal_nan=True,
            )


@pytest.mark.parametrize("option", [{"beta": 1e39}, {"sigma": 10**-19.5}])
@pytest.mark.parametrize("how", ["plain", "composed"])
def test_beta_beyond_float32(how: str, option: dict[str, Any], backend: str, device: str) -> None:
    """No float32 is that large, so the loss is quadratic, and linear at inf alone."""
    input = torch.tensor([1e38, -3e38, 1e30, 0.0, INF], device=device, requires_grad=True)
    target = torch.zeros_like(input)
    with forward_ad.dual_level() if how == "composed" else nullcontext():
        loss = smooth_l1_loss(input, target, reduction="none", **option)
        (gradient,) = torch.autograd.grad(loss.sum(), input)
    expected = oracle.smooth_l1(input, target, beta=1e39, reduction="none")
    # 1 / beta is no normal float32, and has 20 bits.
    torch.testing.assert_close(
        loss[:4].cpu().double(), torch.from_numpy(expected.loss)[:4], rtol=1e-6, atol=0
    )
    torch.testing.assert_close(
        gradient.cpu().double(), torch.from_numpy(expected.input), rtol=1e-6, atol=0
    )
    assert loss[4] == INF


@pytest.mark.parametrize("rows", [0, 3])
@pytest.mark.parametrize(
    "options",
    [
        {"outside_weights": 1e39},
        {"outside_weights": -1e300},
        {"outside_weights": 1e39, "reduction": "none"},
        {"normalizer": 1e300, "reduction": "sum"},
        {"outside_weights": NAN},
    ],
    ids=str,
)
def test_numbers_beyond_float32(
    options: dict[str, Any], rows: int, backend: str, device: str
) -> None:
    """They are infinite in every context, and divide to 0; NaN stays NaN."""
    input = gaussian(rows, 4, seed=1, device=device)
    target = gaussian(rows, 4, seed=2, device=device)
    plain = smooth_l1_loss(input, target, **options)
    torch._dynamo.reset()
    compiled = torch.compile(smooth_l1_loss, backend="aot_eager", fullgraph=True)
    assert_same("loss", compiled(input, target, **options), plain)
    torch._dynamo.reset()
    batched = torch.func.vmap(lambda x: smooth_l1_loss(x, target, **options))
    assert_same("loss", batched(input[None])[0], plain)


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_tangents(beta: float, backend: str, device: str) -> None:
    """In forward mode the slope is the same, also where the loss is infinite."""
    x = torch.tensor([INF, -INF, 3.0, -3.0, 0.0, NAN], device=device)
    target, tangent = torch.zeros_like(x), torch.ones_like(x)
    found: Any = torch.func.jvp(
        lambda x: smooth_l1_loss(x, target, beta=beta, reduction="none"), (x,), (tangent,)
    )
    assert_same("tangent", found[1], torch.tensor([1.0, -1.0, 1.0, -1.0, 0.0, NAN]).to(device))


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_anomaly_detection_finds_none(beta: float, backend: str, device: str) -> None:
    """Also in what a derivative computes and then leaves out."""
    x = torch.tensor([INF, 3.0, -3.0, 0.0], device=device, requires_grad=True)
    with torch.autograd.detect_anomaly(check_nan=True):
        loss = smooth_l1_loss(x, torch.zeros_like(x), beta=beta, reduction="none").sum()
        (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    assert gradient.isfinite().all()


VALUES = [NAN, INF, -INF, 0.0, -0.0, TINY, -TINY, 0.5, -0.5, 1.0, -1.0, 2.0, -3.0, HUGE, -HUGE]
WEIGHTS = [None, NAN, INF, -INF, 0.0, -0.0, TINY, 0.5, 1.0, -2.0, HUGE]
MASKS = [True, False]
BETAS: list[dict[str, float]] = [
    {"beta": 0.0},
    {"sigma": math.inf},
    {"beta": 0.5},
    {"beta": 1.0},
    {"sigma": 3.0},
]


def _products(device: str) -> tuple[Tensor, Tensor]:
    pairs = list(itertools.product(VALUES, VALUES))
    input = torch.tensor([p[0] for p in pairs], device=device, requires_grad=True)
    target = torch.tensor([p[1] for p in pairs], device=device, requires_grad=True)
    return input, target


def _evaluate(
    input: Tensor, target: Tensor, weights: tuple[Any, Any], options: dict[str, Any]
) -> dict[str, Tensor]:
    loss = smooth_l1_loss(input, target, *weights, reduction="none", **options)
    grad_input, grad_target = torch.autograd.grad(loss, [input, target], torch.ones_like(loss))
    total = smooth_l1_loss(input, target, *weights, reduction="sum", **options)
    sum_input, sum_target = torch.autograd.grad(total, [input, target])
    assert_same("gradient of sum and none", sum_input, grad_input)
    assert_same("gradient of sum and none", sum_target, grad_target)
    return {"loss": loss.detach(), "input": grad_input, "target": grad_target}


def _as_weights(value: float | bool | None, device: str) -> Any:
    return None if value is None else torch.tensor(value, device=device)


@pytest.mark.parametrize("options", BETAS, ids=str)
@pytest.mark.parametrize("inside", [*WEIGHTS, *MASKS], ids=str)
def test_products(
    inside: float | bool | None, options: dict[str, float], device: str, triton_backend: str
) -> None:
    """225 pairs times every weight on either side, on both backends and in the oracle."""
    input, target = _products(device)
    for outside in (*WEIGHTS, *MASKS):
        weights = (_as_weights(inside, device), _as_weights(outside, device))
        what = f"inside {inside}, outside {outside}, {options}"
        with backend_set("eager"):
            eager = _evaluate(input, target, weights, options)
        if inside in (None, 0.5, NAN, INF, 0.0, False) or outside is None:
            with backend_set("triton"):
                kernel = _evaluate(input, target, weights, options)
            for name, value in eager.items():
                assert_same(f"{name} with {what}", kernel[name], value)
        _compare(eager, input, target, weights, options, what)


def _compare(
    actual: dict[str, Tensor],
    input: Tensor,
    target: Tensor,
    weights: tuple[Any, Any],
    options: dict[str, float],
    what: str,
) -> None:
    """Compare with the oracle where float32 does not leave its range on the way.

    In float64 HUGE - (-HUGE) is a number; in float32 it is inf, and so is HUGE times 2.
    The two agree on everything else, so those places alone are left to the other backend.
    """
    beta = 0.0 if options.get("sigma") == math.inf else options.get("beta", 1 / 9)
    expected = oracle.smooth_l1(input, target, *weights, beta=beta, reduction="none")
    numbers = [input, target, *(w for w in weights if w is not None and w.dtype != torch.bool)]
    extreme = torch.zeros_like(input, dtype=torch.bool)
    for number in numbers:
        size = number.detach().abs()
        extreme |= (size == HUGE) | ((size > 0) & (size < 1e-37))
    plain = ~extreme.cpu().numpy()
    for name, value in actual.items():
        reference = getattr(expected, name)
        assert_near(
            f"{name} with {what}",
            value[~extreme],
            reference[plain],
            computed_in=torch.float32,
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_other_dtypes_agree(
    beta: float, dtype: torch.dtype, device: str, triton_backend: str
) -> None:
    """The same special values, stored in the other dtypes (HUGE is inf in float16)."""
    results = []
    for name in ("eager", "triton"):
        with backend_set(name):
            input, target = (t.detach().to(dtype).requires_grad_() for t in _products(device))
            weights = torch.tensor(-2.0, dtype=dtype, device=device)
            results.append(_evaluate(input, target, (weights, None), {"beta": beta}))
    for name, value in results[0].items():
        assert_same(name, results[1][name], value)


@pytest.mark.parametrize("reduction", ["sum", "mean", "batchmean"])
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_one_bad_element_reaches_the_sum(
    bad: float, reduction: Reduction, backend: str, device: str
) -> None:
    """A reduction neither swallows a NaN nor spreads it to other elements' gradients."""
    for position in (0, 4097):
        input = torch.full((4098,), 0.5, device=device)
        input[position] = bad
        input.requires_grad_()
        loss = smooth_l1_loss(input, torch.zeros_like(input), reduction=reduction)
        assert loss.isnan() if math.isnan(bad) else loss == INF
        (gradient,) = torch.autograd.grad(loss, input)
        others = torch.arange(4098, device=device) != position
        assert gradient[others].isfinite().all()
        assert gradient[position].isnan() == math.isnan(bad)


@pytest.mark.parametrize(("normalizer", "expected"), [(0.0, INF), (NAN, NAN), (INF, 0.0)])
def test_bad_normalizer_on_the_device(
    normalizer: float, expected: float, backend: str, device: str
) -> None:
    """The host never reads the tensor, so what it holds follows IEEE 754."""
    input = torch.tensor([2.0, 1.0], device=device, requires_grad=True)
    divisor = torch.tensor(normalizer, device=device)
    loss = smooth_l1_loss(input, torch.zeros_like(input), reduction="sum", normalizer=divisor)
    (gradient,) = torch.autograd.grad(loss, input)
    for value in (loss, *gradient):
        torch.testing.assert_close(value.item(), expected, equal_nan=True)
    of_nothing = smooth_l1_loss(input, input.detach(), reduction="sum", normalizer=divisor)
    assert of_nothing.isnan() == (normalizer != INF)
