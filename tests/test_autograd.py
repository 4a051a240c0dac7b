"""First-order autograd: who gets a gradient, how often, and for which upstream gradient.

The gradient is computed in the forward pass and handed out in the backward pass, so the dangers
are all of one kind: a buffer used twice, handed out and still needed, or computed for nobody.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from fused_smoothl1 import smooth_l1_loss
from fused_smoothl1.functional import Reduction
from tests import support
from tests.support import (
    CALLS,
    DEVICE,
    KINDS,
    OPERANDS,
    REDUCTIONS,
    boxes,
    call,
    check,
    coin,
    gradient_unless_modified,
    requiring_grad,
    results,
)

pytestmark = support.on_both

NARROW = [name for name in CALLS if "16 " in name]
# Of inside and outside weights of input (4, 3, 5).
SHAPES = (((4, 3, 5), ()), ((4, 1, 5), (1,)), ((4, 1, 1), (5,)), ((3, 1), (1, 3, 1)))
UPSTREAM = (0.0, -0.0, 1.0, -1.0, 3.7, 1e-30, 1e30, math.inf, -math.inf, math.nan)
# Upstream gradients of one value: as they are in memory, as they are behind a conjugation, and
# without memory, as PyTorch hands them down where nothing depends on a result.
ABOVE: dict[float, Callable[[Tensor], Tensor]] = {
    1.0: torch.ones_like,
    2.0: lambda like: torch.full_like(like, 2.0),
    -3.0: lambda like: torch._neg_view(torch.full_like(like, 3.0)),
    0.0: lambda like: torch._efficientzerotensor(like.shape, dtype=like.dtype, device=DEVICE),
}


@pytest.mark.parametrize("needed", [*itertools.product([False, True], repeat=4)], ids=str)
def test_only_for_those_that_require_one(needed: Sequence[bool]) -> None:
    for weights, reduction in zip(SHAPES, REDUCTIONS, strict=True):
        operands = boxes((4, 3, 5), *weights, grad=needed)
        check(*operands, beta=0.4, reduction=reduction, upstream=-1.3)
        loss = smooth_l1_loss(*operands, reduction=reduction)
        assert loss.requires_grad == any(needed)
        if any(needed):
            loss.backward(torch.ones_like(loss))
        assert [operand.grad is not None for operand in operands] == [*needed]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_gradient_of_a_weight_is_rounded_after_the_sum(dtype: torch.dtype) -> None:
    """Its 3,000 terms near 1000 of both signs cancel: rounded one by one, they would not."""
    signs = torch.tensor([1.0, -1.0], device=DEVICE).repeat(1500)[:, None]
    input, target, inside, outside = boxes((3000, 3), (1, 3), ())
    inside, outside = (weight.to(dtype).requires_grad_() for weight in (inside, outside))
    check(input + 1000, target, inside, signs, reduction="sum")
    check(input, target, inside, outside)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("upstream", UPSTREAM)
def test_upstream_gradient_of_any_value(upstream: float, reduction: str) -> None:
    for weights in ([], [coin(7, 1)]):
        check(*boxes((7, 5), *weights, grad=2), reduction=reduction, upstream=upstream)


@pytest.mark.parametrize("first", ABOVE)
@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize("name", [*KINDS, *NARROW])
def test_backward_again_and_again(name: str, reduction: str, first: float) -> None:
    """Nothing handed out is needed or handed out again: the caller may write to it."""
    operands, options = call(name, reduction=reduction)
    wanted = requiring_grad(operands, options)
    base = dict(zip(wanted, results(smooth_l1_loss, operands, **options)[1:], strict=True))
    assert all(gradient.count_nonzero() > 0 for gradient in base.values())
    loss = smooth_l1_loss(*operands, **options)
    kept = [*operands, loss, *base.values()]
    asked = [wanted[-1:], wanted, wanted[:1], wanted, wanted]
    for value, sources in zip((first, *ABOVE), asked, strict=True):
        above = ABOVE[value](loss)
        gradients = torch.autograd.grad(loss, sources, above, retain_graph=True)
        for source, gradient in zip(sources, gradients, strict=True):
            rtol = 2 * torch.finfo(gradient.dtype).eps
            assert_close(gradient, base[source] * value, rtol=rtol, atol=0)
            gradient.fill_(math.nan)
        kept += gradients if above._is_zerotensor() else (above, *gradients)
    assert len({tensor.data_ptr() for tensor in kept}) == len(kept)


@pytest.mark.parametrize("batched", [False, True])
def test_freed_graph_raises(batched: bool) -> None:
    operands = boxes((7, 5), (7, 1))
    loss = smooth_l1_loss(*operands)
    above = torch.ones(2, device=DEVICE) if batched else None
    torch.autograd.grad(loss, operands[0], above, is_grads_batched=batched)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(loss, operands[0])


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_loss_modified_in_place(reduction: Reduction) -> None:
    """A training loop's `loss /= steps` on what the function returned."""
    for weights in ([], [(7, 1)]):
        operands = boxes((7, 5), *weights, grad=2)
        expected = results(smooth_l1_loss, operands, reduction=reduction)
        found = results(lambda *o: smooth_l1_loss(*o, reduction=reduction).div_(4), operands)
        assert_close(found, [tensor / 4 for tensor in expected])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", [*OPERANDS[:4], "mask", "normalizer"])
def test_operand_modified_before_backward(name: str, dtype: torch.dtype) -> None:
    """It raises, or the result is that of the old values; a wrong number is never given."""
    for reduction, used in itertools.product(("none", "sum"), (False, True)):
        operands = boxes((7, 5), (7, 1), coin(7, 5) if name == "mask" else (7, 5), dtype=dtype)
        count = torch.tensor(4.0, device=DEVICE)
        options: dict[str, Any] = {"reduction": reduction}
        options["normalizer"] = count if reduction == "sum" else None
        _, expected = results(smooth_l1_loss, operands, **options)
        loss = smooth_l1_loss(*operands, **options)
        if used:
            torch.autograd.grad(loss, operands[0], torch.ones_like(loss), retain_graph=True)
        tensors = dict(zip(OPERANDS, operands, strict=False), mask=operands[3], normalizer=count)
        with torch.no_grad():
            tensors[name].copy_(tensors[name] == 0)
        gradient = gradient_unless_modified(loss, operands[0])
        if gradient is not None:
            assert_close(gradient, expected)
