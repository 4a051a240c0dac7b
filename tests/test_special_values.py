"""Special values and extreme numbers: the same in the kernel, in eager PyTorch, and in graphs.

TABLE is written by hand; all other expectations come from the oracle. (Random calls with special
values are in test_properties.py, among them transition points that are not allowed.)
"""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing import assert_close

from fused_smoothl1 import smooth_l1_loss
from tests import oracle, support
from tests.support import DEVICE, Loss, boxes, check, results

pytestmark = support.on_both

NAN, INF = math.nan, math.inf
TINY, HUGE = 2.0**-149, 1.5e38  # the smallest float32 above 0, and half of the largest

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


def full(value: float, *shape: int) -> Tensor:
    return torch.tensor(value, device=DEVICE).expand(shape).clone().requires_grad_()


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("kind", ["number", "one for all", "one each"])
@pytest.mark.parametrize("row", TABLE, ids=str)
def test_table(row: tuple[float, ...], kind: str, sign: float) -> None:
    """In forward mode too, and in graphs, in which anomaly detection finds nothing.

    Beta's own gradient is -1/2 where the loss is linear, as it is at 0 if beta is 0.
    """
    x, number, value, slope = row
    of_beta = -0.5 if x == number == 0 else -0.5 * slope**2
    slope *= sign
    # (Two elements: a beta of one would count as one for all.)
    input, target = full(sign * x, 2), full(0.0, 2)
    options: dict[str, Any] = {"reduction": "none", "beta": number}
    if kind != "number":
        options["beta"] = full(number, *([2] if kind == "one each" else []))
        of_beta *= 2 / options["beta"].numel()

    def loss(input: Tensor) -> Tensor:
        return smooth_l1_loss(input, target, **options)

    found = results(smooth_l1_loss, [input, target], **options)
    wanted = support.requiring_grad([input, target], options)
    with torch.autograd.set_detect_anomaly(not math.isnan(x)):
        first = torch.autograd.grad(loss(input).sum(), wanted, create_graph=True)
        torch.autograd.grad([gradient.square().sum() for gradient in first], wanted)
    found += [*torch.func.jvp(loss, (input,), (torch.ones_like(input),)), *first]
    gradients = [slope, -slope, of_beta][: len(first)]
    numbers = [value, *gradients, value, slope, *gradients]
    expected = [torch.full_like(f, n) for f, n in zip(found, numbers, strict=True)]
    # (Four roundings.)
    assert_close(found, expected, rtol=5e-7, atol=2 * TINY, equal_nan=True)


NUMBERS = [("beta", beta) for beta in (0.0, 1e-44, 1 / 9, 0.7, 3.0, 30.0, 2.0**100)]
NUMBERS += [("sigma", sigma) for sigma in (0.5, 3.0, INF, 1e12, 1e30, 1e200, 1e-5, 1e-40, 1e-200)]


@pytest.mark.parametrize(("name", "number"), NUMBERS)
def test_numbers_and_tensors(name: str, number: float, backend: str) -> None:
    """1 / sigma² may leave the range of any float; a sigma that is 0 in float32 is not allowed.

    In the kernel one beta for all gives the bits of a number.
    """
    operands = boxes(6, (6, 1), (6, 4), grad=4, scale=0.3)
    operands[0].data[1:3] = operands[1].data[1:3]
    for value in (number, full(number), full(number, 1, 4), full(number, 6, 4)):
        option: dict[str, Any] = {name: value}
        for reduction in ("none", "mean"):
            check(*operands, **option, reduction=reduction, upstream=1.5)
    if (name, backend) == ("beta", "triton"):
        one, other = (results(smooth_l1_loss, operands, beta=n) for n in (number, full(number)))
        support.assert_equal(one, other[:-1])


@pytest.mark.parametrize("dtype", support.FLOATS[2:], ids=str)
def test_float64_is_rounded_to_16_bits_by_float32(dtype: torch.dtype) -> None:
    """As PyTorch rounds it: what is hardly above the middle of two numbers goes to the even one."""
    above = 1 + torch.finfo(dtype).eps / 2 + 2.0**-40
    weight = torch.tensor([above], dtype=torch.float64, device=DEVICE)
    input = torch.full((1,), 9.0, dtype=dtype, device=DEVICE, requires_grad=True)
    _, gradient = results(smooth_l1_loss, [input, torch.zeros_like(input), None, weight])
    assert gradient == weight.to(dtype)


def with_graph(loss: Loss, value: Tensor) -> list[Tensor]:
    found = loss(value)
    return [found, *torch.autograd.grad(found.sum(), value, create_graph=True)]


def captured(loss: Loss, value: Tensor) -> Any:
    """Return the results of a graph that was made with another value."""
    example = torch.full_like(value, 0.7).requires_grad_()
    return make_fx(lambda value: results(loss, [value]), pre_dispatch=True)(example)(value)


def by_torch_func(loss: Loss, value: Tensor) -> tuple[Tensor, Tensor]:
    found, pullback, *_ = torch.func.vjp(loss, value)
    return found, pullback(torch.ones_like(found))[0]


# One for each of the ways that the code takes.
CONTEXTS: dict[str, Callable[[Loss, Tensor], Any]] = {
    "plain": lambda loss, value: results(loss, [value]),
    "create_graph": with_graph,
    "compiled": lambda loss, value: results(torch.compile(loss, backend="aot_eager"), [value]),
    "captured with another value": captured,
    "torch.func": by_torch_func,
    "forward mode": lambda loss, value: torch.func.jvp(loss, (value,), (torch.ones_like(value),)),
}


def check_in(context: str, name: str, **arguments: Any) -> None:
    """Hold the loss and its derivative, as a function of one argument, against the oracle."""
    torch._dynamo.reset()
    value = arguments.pop(name)
    expected = oracle.smooth_l1(**{name: value}, **arguments)
    found = CONTEXTS[context](lambda value: smooth_l1_loss(**{name: value}, **arguments), value)
    wanted = (expected.loss, 1e-37), (getattr(expected, name), 0)
    # Losses may be hardly above 0, the derivatives of these calls are not.
    for one, (exact, atol) in zip(found, wanted, strict=True):
        same = torch.from_numpy(exact).to(one)
        assert_close(one, same, rtol=1e-5, atol=atol, equal_nan=True)


@pytest.mark.parametrize("beta", [0.0, 2e-38, 1e-25, 1e-15, 0.7, 1e15, 1e25, 1e38])
@pytest.mark.parametrize("context", CONTEXTS)
def test_extreme_tensors(context: str, beta: float) -> None:
    """No context squares what overflows: those that see operations compute as plain calls do."""
    factors = torch.tensor([0.0, 0.5, -0.75, 2.0, NAN], device=DEVICE)
    input = torch.where(factors == 2.0, 2 * max(beta, 1e-30), factors * beta)
    call: dict[str, Any] = {"input": input, "target": torch.zeros_like(input), "reduction": "none"}
    check_in(context, "beta", beta=full(beta, 5), **call)
    if 1e-25 <= beta <= 1e25:
        check_in(context, "sigma", sigma=full(beta**-0.5, 5), **call)


BEYOND: list[dict[str, Any]] = [
    *({"normalizer": number, "reduction": "sum"} for number in (1e300, 1e-40)),
    *({"outside_weights": number, "reduction": "none"} for number in (1e39, -1e300, NAN)),
    *({"reduction": "none"} | option for option in ({"beta": 1e39}, {"sigma": 10**-19.5})),
]


@pytest.mark.parametrize("options", BEYOND, ids=str)
@pytest.mark.parametrize("context", CONTEXTS)
def test_numbers_beyond_float32(context: str, options: dict[str, Any]) -> None:
    """Weights become infinite, normalizers make 0 or inf of a loss; NaN stays NaN.

    With such a beta the loss is quadratic, and linear at inf alone.
    """
    for value in (1e37, -3e37, *([] if "normalizer" in options else [INF])):
        check_in(context, "input", input=full(value), target=full(0.0).detach(), **options)
