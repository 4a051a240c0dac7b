"""Second-order gradients: a saved gradient must not drop them silently.

gradcheck and gradgradcheck compare with finite differences in float64, at points no nearer to a
kink than the step.
"""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from fused_smoothl1 import smooth_l1_loss
from fused_smoothl1.functional import Reduction
from tests import support
from tests.composed import composed
from tests.support import DEVICE, REDUCTIONS, Loss, boxes, call, coin, requiring_grad, values

pytestmark = support.on_both

BETA = 0.8
ROWS, COLUMNS = torch.tensor([[True], [False]]), torch.tensor([1, 0, 7], dtype=torch.uint8)
# Inside weights, outside weights and beta of input (2, 3); tensors are given by their shapes.
CALLS: dict[str, tuple[Any, Any, Any]] = {
    "full size": ((2, 3), (2, 3), (2, 3)),
    "broadcast": ((2, 1), (3,), (2, 1)),
    "one for all": ((), (1, 1), ()),
    "no weights": (None, None, BETA),
    "no weights, L1": (None, None, 0.0),
    "row mask": (ROWS, (3,), BETA),
    "row mask, L1": (ROWS, (3,), 0.0),
    "column mask": ((2, 1), COLUMNS, BETA),
    "column mask, L1": ((2, 1), COLUMNS, 0.0),
}


@pytest.mark.parametrize("reduction", ["none", "batchmean", "normalized sum"])
@pytest.mark.parametrize("name", CALLS)
def test_gradgradcheck(name: str, reduction: str, backend: str) -> None:
    inside, outside, beta = (w.to(DEVICE) if isinstance(w, Tensor) else w for w in CALLS[name])
    operands = boxes((2, 3), inside, outside, grad=4, dtype=torch.float64)
    if isinstance(beta, tuple):
        beta = (BETA + 0.1 * values(*beta, dtype=torch.float64)).requires_grad_()
    x = ((operands[0] - operands[1]) * (1 if operands[2] is None else operands[2])).detach().abs()
    assert x.min() < BETA < x.max()
    assert ((x - beta).abs()[x != 0] > 1e-3).all()
    options: dict[str, Any] = {"reduction": reduction}
    if reduction == "normalized sum":
        options = {"reduction": "sum", "normalizer": torch.tensor(3, device=DEVICE)}

    def loss(*operands: Any) -> Tensor:
        return smooth_l1_loss(*operands[:4], beta=operands[4], **options)

    # (A launch in the interpreter costs milliseconds.)
    fast = backend == "triton"
    assert torch.autograd.gradcheck(loss, (*operands, beta), fast_mode=fast)
    assert torch.autograd.gradgradcheck(loss, (*operands, beta), fast_mode=fast)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_three_orders_are_the_compositions(dtype: str, reduction: str) -> None:
    operands, options = call(f"{dtype} dense, a beta each, all gradients", reduction=reduction)
    wanted = requiring_grad(operands, options)

    def orders(function: Loss) -> Iterator[Tensor]:
        total = function(*operands, **options).sum()
        for _ in range(3):
            gradients = torch.autograd.grad(total, wanted, create_graph=True)
            yield from gradients
            total = torch.stack([(gradient**3).sum() for gradient in gradients]).sum()

    assert_close(list(orders(smooth_l1_loss)), list(orders(composed)))


def _penalized(loss: Tensor, wanted: list[Tensor]) -> list[Tensor]:
    """Return the gradients of the loss, and of the loss with a penalty on these gradients."""
    first = torch.autograd.grad(loss, wanted, create_graph=True)
    second = torch.autograd.grad(loss + sum(g.square().sum() for g in first), wanted)
    return [gradient.detach() for gradient in (*first, *second)]


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("trained_beta", [False, True])
def test_masked_nan(trained_beta: bool, reduction: Reduction) -> None:
    """What a mask does not select adds 0 to second-order gradients as well."""
    mask, clean = coin(6, 1), values(6, 4, dtype=torch.float64)
    gradients = []
    for filler in (0.0, math.nan):
        unselected = torch.full_like(clean, filler)
        operands = [torch.where(mask, value, unselected) for value in (clean, 1.5, BETA)]
        input, weights, betas = (operand.requires_grad_() for operand in operands)
        beta = betas if trained_beta else BETA
        loss = smooth_l1_loss(input, 0 * clean, mask, weights, beta=beta, reduction=reduction)
        gradients.append(_penalized(loss.sum(), operands[: 2 + trained_beta]))
    assert_close(*gradients)
    assert all((gradient[~mask.flatten()] == 0).all() for gradient in gradients[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bits(dtype: torch.dtype) -> None:
    """Second-order gradients keep their tensor's dtype and come near those of float32."""
    input, target = boxes((6, 4), grad=0, dtype=dtype)
    gradients = []
    for kind in (dtype, torch.float32):
        source = input.to(kind).requires_grad_()
        loss = smooth_l1_loss(source, target.to(kind), beta=BETA, reduction="sum")
        gradients.append(_penalized(loss, [source]))
        assert {gradient.dtype for gradient in gradients[-1]} == {kind}
    eps = torch.finfo(dtype).eps
    assert_close(*gradients, rtol=4 * eps, atol=4 * eps, check_dtype=False)


@pytest.mark.parametrize("options", [{"beta": 0.0}, {"beta": 0.5}, {"sigma": 3.0}], ids=str)
@pytest.mark.parametrize("upstream", [math.inf, -math.inf, math.nan, 0.0])
@pytest.mark.parametrize("trained", ["inside", "outside", None])
def test_first_gradient_is_the_same(trained: str | None, upstream: float, options: Any) -> None:
    """To ask for a graph changes no gradient, for any upstream gradient and under masks too."""
    input = torch.tensor([2.0, -1.0, 0.1, -1e-3, 0.5, math.nan], device=DEVICE, requires_grad=True)
    mask = torch.arange(6, device=DEVICE) < 5
    for weight in (1.0, math.inf):
        weights = torch.full((6,), weight, device=DEVICE, requires_grad=trained is not None)
        pair = (weights, mask) if trained == "inside" else (mask, weights)
        loss = smooth_l1_loss(input, torch.zeros_like(input), *pair, reduction="sum", **options)
        above = torch.full_like(loss, upstream)
        wanted = [input, weights] if trained else [input]
        plain = torch.autograd.grad(loss, wanted, above, retain_graph=True)
        graphed = torch.autograd.grad(loss, wanted, above, create_graph=True)
        assert_close(graphed, plain, rtol=1e-6, atol=0, equal_nan=True)
        assert all(
            one.requires_grad and not other.requires_grad
            for one, other in zip(graphed, plain, strict=True)
        )
        assert all(gradient[5] == 0 for gradient in plain)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_memory_format(reduction: Reduction) -> None:
    """Full-size weights of another format do not decide it."""
    input, *others = boxes((2, 4, 3, 5), (2, 4, 3, 5), (2, 4, 3, 5), grad=0)
    input = input.to(memory_format=torch.channels_last).requires_grad_()
    loss = smooth_l1_loss(input, *others, reduction=reduction).sum()
    (gradient,) = torch.autograd.grad(loss, input, create_graph=True)
    assert gradient.stride() == input.stride()
