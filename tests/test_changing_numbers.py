"""Numbers that change between the calls of a compiled function: right, and hardly ever compiled.

A compiler puts a symbol in the place of a number at its second value. What it makes of symbols is
where it goes wrong, or compiles anew for every value until it gives up.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from fused_smoothl1 import SmoothL1Loss, smooth_l1_loss
from tests.composed import composed
from tests.support import coin, gaussian
from tests.variants import REDUCTIONS

VALUES = (0.2, 0.5, 1.0, 3.0, 0.7, 0.9, 1.3, 1.7, 2.2, 2.7)
COUNTS = (3, 5, 7, 2, 11, 13, 17, 19, 23, 29)
MOST_COMPILATIONS = 3

Function = Callable[..., Tensor]
# A call with the number in it: of the library's function, and of the composition.
Call = Callable[[Function, Tensor, Tensor, Tensor | None, str, Any], Tensor]


@pytest.fixture(autouse=True)
def _own_cache() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _beta(f: Function, x: Tensor, t: Tensor, w: Tensor | None, reduction: str, n: Any) -> Tensor:
    return f(x, t, w, beta=n, reduction=reduction)


def _sigma(f: Function, x: Tensor, t: Tensor, w: Tensor | None, reduction: str, n: Any) -> Tensor:
    return f(x, t, w, sigma=n, reduction=reduction)


def _outside(f: Function, x: Tensor, t: Tensor, w: Tensor | None, reduction: str, n: Any) -> Tensor:
    return f(x, t, w, n, beta=0.6, reduction=reduction)


def _divisor(f: Function, x: Tensor, t: Tensor, w: Tensor | None, reduction: str, n: Any) -> Tensor:
    """The normalizer of a sum; for other reductions, a divisor of the result."""
    if reduction == "sum":
        return f(x, t, w, beta=0.6, reduction=reduction, normalizer=n)
    loss: Tensor = f(x, t, w, beta=0.6, reduction=reduction) / n
    return loss


def _two(f: Function, x: Tensor, t: Tensor, w: Tensor | None, reduction: str, n: Any) -> Tensor:
    """Two transition points in one graph, which change by different amounts."""
    first = f(x, t, w, beta=n, reduction=reduction)
    return first + f(x, t, w, sigma=n + 1, reduction=reduction)


def _all(f: Function, x: Tensor, t: Tensor, w: Tensor | None, reduction: str, n: Any) -> Tensor:
    """Every number that a call can have."""
    options = {"normalizer": n + 2} if reduction == "sum" else {}
    return f(x, t, w, n, sigma=n + 3, reduction=reduction, **options)


def _every_reduction(
    f: Function, x: Tensor, t: Tensor, w: Tensor | None, reduction: str, n: Any
) -> Tensor:
    """Four losses in one graph, with every number."""
    return torch.stack([_all(f, x, t, w, name, n + i).sum() for i, name in enumerate(REDUCTIONS)])


CALLS: tuple[Call, ...] = (_beta, _sigma, _outside, _divisor, _two)


def _results(loss: Tensor, x: Tensor) -> list[Tensor]:
    return [loss, *torch.autograd.grad(loss, x, torch.full_like(loss, 1.5))]


def _assert_right(
    call: Call,
    values: tuple[Any, ...],
    reduction: str,
    weights: str | None,
    compiler: str,
    device: str,
    dtype: torch.dtype = torch.float32,
) -> None:
    x = gaussian(6, 4, seed=1, dtype=dtype, device=device, requires_grad=True)
    target = gaussian(6, 4, seed=2, dtype=dtype, device=device)
    rows = gaussian(6, 1, seed=3, dtype=dtype, device=device)
    given = {None: None, "rows": rows, "mask": coin(6, 1, seed=4, device=device)}[weights]

    def step(x: Tensor, number: Any) -> Tensor:
        return call(smooth_l1_loss, x, target, given, reduction, number)

    counter = CompileCounterWithBackend(compiler)
    compiled = torch.compile(step, backend=counter, fullgraph=True)
    for value in values:
        found = _results(compiled(x, value), x)
        expected = _results(call(composed, x, target, given, reduction, value), x)
        assert [t.dtype for t in found] == [t.dtype for t in expected]
        torch.testing.assert_close(found, expected)
    assert counter.frame_count <= MOST_COMPILATIONS


@pytest.mark.parametrize("weights", [None, "rows", "mask"])
def test_captured(weights: str | None, backend: str, device: str) -> None:
    _assert_right(_every_reduction, VALUES, "all", weights, "aot_eager", device)


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__[1:])
def test_each_alone(call: Call, backend: str, device: str) -> None:
    _assert_right(call, VALUES, "sum", None, "aot_eager", device)


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__[1:])
def test_integers(call: Call, backend: str, device: str) -> None:
    _assert_right(call, COUNTS, "sum", "rows", "aot_eager", device)


@pytest.mark.parametrize(
    ("call", "reduction", "weights"),
    [
        (_all, "none", None),
        (_all, "sum", "mask"),
        (_two, "mean", "rows"),
    ],
    ids=lambda value: value.__name__[1:] if callable(value) else None,
)
def test_inductor(
    call: Call, reduction: str, weights: str | None, backend: str, device: str
) -> None:
    """Its generated code, which has been wrong with symbols where what was captured is right."""
    _assert_right(call, VALUES[:5], reduction, weights, "inductor", device)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("call", [_outside, _sigma])
def test_a_number_decides_no_dtype(
    call: Call, dtype: torch.dtype, backend: str, device: str
) -> None:
    """A tensor in its place must neither promote 16 bits nor have fewer than the arithmetic."""
    _assert_right(call, VALUES, "none", None, "aot_eager", device, dtype)


def test_under_vmap(backend: str, device: str) -> None:
    x, target = gaussian(6, 4, seed=1, device=device), gaussian(6, 4, seed=2, device=device)

    def step(number: float) -> Tensor:
        def sample(x: Tensor, t: Tensor) -> Tensor:
            options: dict[str, Any] = {"reduction": "sum", "normalizer": number + 1}
            return smooth_l1_loss(x, t, None, number, sigma=number + 2, **options)

        result: Tensor = torch.vmap(sample)(x, target)
        return result

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, backend=counter, fullgraph=True)
    for value in VALUES:
        torch.testing.assert_close(compiled(value), step(value))
    assert counter.frame_count <= MOST_COMPILATIONS


@pytest.mark.parametrize("kind", [np.int64, np.float32, np.float64])
def test_numbers_of_numpy(kind: Any, backend: str, device: str) -> None:
    x, target = gaussian(6, 4, seed=1, device=device), gaussian(6, 4, seed=2, device=device)
    compiled = torch.compile(
        lambda n: smooth_l1_loss(x, target, reduction="sum", normalizer=n), backend="aot_eager"
    )
    weighted = torch.compile(
        lambda n: smooth_l1_loss(x, target, outside_weights=n), backend="aot_eager"
    )
    for value in (3, 5, 7):
        torch.testing.assert_close(
            compiled(kind(value)), composed(x, target, reduction="sum", normalizer=value)
        )
        torch.testing.assert_close(
            weighted(kind(value)), value * composed(x, target, reduction="mean")
        )


def test_attribute_of_a_module(backend: str, device: str) -> None:
    """Warm-up of beta on one module, then other modules through the same compiled function."""
    x = gaussian(64, 4, seed=1, device=device)
    target = torch.zeros_like(x)
    counter = CompileCounterWithBackend("inductor")

    def step(loss: SmoothL1Loss, x: Tensor) -> Tensor:
        result: Tensor = loss(x, target)
        return result

    compiled = torch.compile(step, backend=counter, fullgraph=True)
    loss = SmoothL1Loss(beta=0.2)
    for beta in (0.2, 0.5, 1.0, 3.0):
        loss.beta = beta
        torch.testing.assert_close(compiled(loss, x), composed(x, target, beta=beta))
    for beta in (0.3, 2.0, 4.0):
        torch.testing.assert_close(
            compiled(SmoothL1Loss(beta=beta), x), composed(x, target, beta=beta)
        )
    assert counter.frame_count <= MOST_COMPILATIONS + 1


def test_special_values_among_others(backend: str, device: str) -> None:
    """L1, and the number for which weights and divisors are left out."""

    def call(f: Function, x: Tensor, t: Tensor, w: Tensor | None, reduction: str, n: Any) -> Tensor:
        first = f(x, t, w, beta=n, reduction=reduction, normalizer=n + 1)
        return first + f(x, t, w, n, reduction=reduction)

    _assert_right(call, (0.5, 0.7, 0.0, 0.9, 1.0, 2.0, 0.0), "sum", "rows", "aot_eager", device)


@pytest.mark.parametrize("option", ["sigma", "beta"])
def test_values_beyond_the_largest_number(option: str, backend: str, device: str) -> None:
    """Where the difference of two numbers is inf, the loss is, whoever put a symbol for beta."""
    x = torch.tensor([3e38, 1.0, float("-inf")], device=device)
    values = (1e-20, 1e-21, 1e-22) if option == "sigma" else (1e39, 2e39, 3e39)

    def step(number: float) -> Tensor:
        options: dict[str, Any] = {option: number}
        return smooth_l1_loss(x, -x, reduction="none", **options)

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    for value in values:
        torch.testing.assert_close(compiled(value), step(value))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": -1.0}, r"beta must be in \[0, inf\), got -1\.0"),
        ({"sigma": -2.0}, r"sigma must be in \(0, inf\], got -2\.0"),
        ({"reduction": "sum", "normalizer": -3.0}, "normalizer must be a finite number above 0"),
    ],
)
def test_a_wrong_value_among_others_raises(
    options: dict[str, Any], message: str, backend: str, device: str
) -> None:
    x = gaussian(6, 4, seed=1, device=device)
    name = list(options)[-1]
    compiled = torch.compile(
        lambda number: smooth_l1_loss(x, x + 1, **{**options, name: number}), backend="aot_eager"
    )
    for value in (0.5, 0.7, 0.9):
        compiled(value)
    with pytest.raises(Exception, match=message):
        compiled(options[name])
