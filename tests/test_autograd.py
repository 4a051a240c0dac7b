"""First-order autograd: who gets a gradient, how often, and for which upstream gradient.

The gradient is computed in the forward pass and handed out in the backward pass, so the dangers
are all of one kind: a buffer used twice, handed out and still needed, or computed for nobody.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from fused_smoothl1 import smooth_l1_loss
from fused_smoothl1.functional import Reduction
from tests.composed import composed
from tests.support import (
    DEVICE,
    KINDS,
    NAMES,
    REDUCTIONS,
    Loss,
    assert_equal,
    boxes,
    call,
    check,
    coin,
    gradient_unless_modified,
    on_both,
    results,
    trained,
    values,
)

pytestmark = on_both

NARROW = ["float16 dense", "bfloat16 dense", "float32, bfloat16 dense, both gradients"]


# Of inside and outside weights of input (4, 3, 5).
SHAPES = (((4, 3, 5), ()), ((4, 1, 5), (1,)), ((4, 1, 1), (5,)), ((3, 1), (1, 3, 1)))


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


UPSTREAM = (0.0, -0.0, 1.0, -1.0, 3.7, 1e-30, 1e30, math.inf, -math.inf, math.nan)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("upstream", UPSTREAM)
def test_upstream_gradient_of_any_value(upstream: float, reduction: str) -> None:
    for weights in ([], [coin(7, 1)]):
        check(*boxes((7, 5), *weights, grad=2), reduction=reduction, upstream=upstream)


@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize("name", [*KINDS, *NARROW])
def test_backward_again_and_again(name: str, reduction: str) -> None:
    """Nothing handed out is needed or handed out again: the caller may write to it."""
    operands, options = call(name, reduction=reduction)
    wanted = trained(operands, options)
    base = dict(zip(wanted, results(smooth_l1_loss, operands, **options)[1:], strict=True))
    loss = smooth_l1_loss(*operands, **options)
    kept: list[Tensor] = [*operands, loss, *base.values()]
    for upstream, asked in ((1.0, wanted[-1:]), (2.0, wanted), (1.0, wanted[:1]), (-3.0, wanted)):
        above = torch.full_like(loss, upstream)
        gradients = torch.autograd.grad(loss, asked, above, retain_graph=True)
        for tensor, gradient in zip(asked, gradients, strict=True):
            rtol = 2 * torch.finfo(gradient.dtype).eps
            assert_close(gradient, base[tensor] * upstream, rtol=rtol, atol=0)
            assert gradient.count_nonzero() > 0
        for gradient in gradients:
            gradient.fill_(math.nan)
        kept += [above, *gradients]
    assert len({tensor.data_ptr() for tensor in kept}) == len(kept)


def test_accumulation() -> None:
    """Two losses of one input, and one loss twice, add up in .grad."""
    operands = boxes((7, 5), (7, 1))
    _, once = results(smooth_l1_loss, operands)
    first = smooth_l1_loss(*operands)
    first.backward(retain_graph=True)
    first.backward()
    smooth_l1_loss(*operands).backward()
    assert_close(operands[0].grad, 3 * once)


@pytest.mark.parametrize("batched", [False, True])
def test_freed_graph_raises(batched: bool) -> None:
    operands = boxes((7, 5), (7, 1))
    loss = smooth_l1_loss(*operands)
    above = torch.ones(2, device=DEVICE) if batched else None
    torch.autograd.grad(loss, operands[0], above, is_grads_batched=batched)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(loss, operands[0])


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_one_tensor_in_several_roles(reduction: Reduction) -> None:
    """The gradient of each role counts."""

    def loss(function: Loss, t: Tensor) -> Tensor:
        return function(2 * t, t * t, t, t, beta=t * t, reduction=reduction)

    t = values(6, 5, dtype=torch.float64, grad=True)
    assert_close(results(partial(loss, smooth_l1_loss), [t]), results(partial(loss, composed), [t]))
    _, gradient = results(lambda t: smooth_l1_loss(t, t, reduction=reduction), [t])
    assert_equal(gradient, torch.zeros_like(t))


# (The sum and the mean send an expanded number down, the slice zeros for the others.)
AFTERWARDS: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": Tensor.sum,
    "mean": Tensor.mean,
    "slice": lambda loss: loss.flatten()[:3].sum(),
    "division in place": lambda loss: loss.div_(4),
}


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("afterwards", AFTERWARDS)
def test_what_is_done_with_the_loss(afterwards: str, reduction: str) -> None:
    def loss(function: Loss, *operands: Tensor) -> Tensor:
        return AFTERWARDS[afterwards](function(*operands, reduction=reduction))

    for weights in ([], [(7, 1)]):
        operands = boxes((7, 5), *weights, grad=2)
        found = results(partial(loss, smooth_l1_loss), operands)
        assert_close(found, results(partial(loss, composed), operands))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", [*NAMES[:4], "mask", "normalizer"])
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
        tensors = dict(zip(NAMES, operands, strict=False), mask=operands[3], normalizer=count)
        with torch.no_grad():
            tensors[name].copy_(tensors[name] == 0)
        gradient = gradient_unless_modified(loss, operands[0])
        if gradient is not None:
            assert_close(gradient, expected)


# As PyTorch hands down where nothing depends on a result, and as behind a conjugation.
UNSTORED: dict[str, Callable[[Tensor], Tensor]] = {
    "zeros": lambda like: torch._efficientzerotensor(like.shape, dtype=like.dtype, device=DEVICE),
    "negated": lambda like: torch._neg_view(values(*like.shape, dtype=like.dtype)),
}


@pytest.mark.parametrize("name", UNSTORED)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_upstream_gradient_that_is_not_in_memory(
    reduction: Reduction, dtype: torch.dtype, masked: bool, name: str
) -> None:
    """Whichever way the gradients are computed: by a product, anew, or only now."""
    for needed in ((True, False, False), (False, True, False), (True, True, False)):
        operands = boxes((7, 5), coin(7, 1) if masked else (7, 1), grad=needed, dtype=dtype)
        loss = smooth_l1_loss(*operands, reduction=reduction)
        upstream = UNSTORED[name](loss)
        assert upstream._is_zerotensor() or upstream.is_neg()
        wanted = trained(operands, {})
        found = torch.autograd.grad(loss, wanted, upstream, retain_graph=True)
        stored = torch.zeros_like(loss) + upstream
        assert_close(found, torch.autograd.grad(loss, wanted, stored))
