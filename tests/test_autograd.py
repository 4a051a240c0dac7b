"""Autograd: who gets a gradient, how often, for which upstream gradient, and of which order.

The gradient is computed in the forward pass and handed out in the backward pass, so the dangers
are all of one kind: a buffer used twice, handed out and still needed, or one without a graph where
a second derivative is to come.
"""

import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from fused_smoothl1 import smooth_l1_loss
from tests import support
from tests.support import CALLS, DEVICE, KINDS, OPERANDS, Loss, boxes, coin, results, values

pytestmark = support.on_both

NARROW = [name for name in CALLS if "16 " in name]
# Upstream gradients of one value: as they are in memory, as they are behind a conjugation, and
# without memory, as PyTorch hands them down where nothing depends on a result.
ABOVE: dict[float, Callable[[Tensor], Tensor]] = {
    1.0: torch.ones_like,
    2.0: lambda like: torch.full_like(like, 2.0),
    -3.0: lambda like: torch._neg_view(torch.full_like(like, 3.0)),
    0.0: lambda like: torch._efficientzerotensor(like.shape, dtype=like.dtype, device=DEVICE),
}


@pytest.mark.parametrize("first", ABOVE)
@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize("name", [*KINDS, *NARROW])
def test_backward_again_and_again(name: str, reduction: str, first: float) -> None:
    """The caller may write to the loss and to all gradients, until the graph is freed."""
    operands, options = support.call(name, reduction=reduction)
    wanted = support.requiring_grad(operands, options)
    base = dict(zip(wanted, results(smooth_l1_loss, operands, **options)[1:], strict=True))
    assert all(gradient.count_nonzero() > 0 for gradient in base.values())
    loss = smooth_l1_loss(*operands, **options)
    loss.detach().fill_(math.nan)
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
    torch.autograd.grad(loss, wanted, torch.ones_like(loss))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(loss, wanted, torch.ones_like(loss))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", [*OPERANDS[:4], "mask", "beta", "normalizer"])
def test_operand_modified_before_backward(name: str, dtype: torch.dtype) -> None:
    """It raises, or the result is that of the old values; a wrong number is never given."""
    for reduction, used in itertools.product(("none", "sum"), (False, True)):
        operands = boxes((7, 5), (7, 1), coin(7, 5) if name == "mask" else (7, 5), dtype=dtype)
        count, beta = torch.tensor(4.0, device=DEVICE), values(7, 1).abs()
        options: dict[str, Any] = {"reduction": reduction, "beta": beta if name == "beta" else 1.0}
        options["normalizer"] = count if reduction == "sum" else None
        _, expected = results(smooth_l1_loss, operands, **options)
        loss = smooth_l1_loss(*operands, **options)
        if used:
            torch.autograd.grad(loss, operands[0], torch.ones_like(loss), retain_graph=True)
        tensors = {**dict(zip(OPERANDS, operands, strict=False)), "beta": beta}
        tensors |= {"mask": operands[3], "normalizer": count}
        with torch.no_grad():
            tensors[name].copy_(tensors[name] == 0)
        try:
            (gradient,) = torch.autograd.grad(loss, operands[0], torch.ones_like(loss))
        except RuntimeError as error:
            if "modified by an inplace operation" not in str(error):
                raise
        else:
            assert_close(gradient, expected)


@pytest.mark.parametrize("dtype", support.FLOATS[2:], ids=str)
def test_gradient_is_rounded_after_the_sum(dtype: torch.dtype) -> None:
    """Terms near ±4000 cancel unless each is rounded; small ones of beta would become 0."""
    signs = torch.tensor([1.0, -1.0], device=DEVICE).repeat(1500)[:, None]
    input, target, inside = boxes((3000, 3), (1, 3))
    inside = inside.abs().to(dtype).requires_grad_()
    support.check(input + 4000, target, inside, signs, reduction="sum")
    beta = torch.ones((), dtype=dtype, device=DEVICE, requires_grad=True)
    support.check(*boxes(1250, grad=0, scale=7e-3), beta=beta, upstream=8.0)


ROWS, COLUMNS = torch.tensor([[True], [False]]), torch.tensor([1, 0, 7], dtype=torch.uint8)
# Inside weights, outside weights and beta of input (2, 3); tensors are given by their shapes.
SECOND: dict[str, tuple[Any, Any, Any]] = {
    "full size": ((2, 3), (2, 3), (2, 3)),
    "broadcast": ((2, 1), (3,), (2, 1)),
    "one for all": ((), (1, 1), ()),
    "no weights": (None, None, 0.8),
    "row mask": (ROWS, (3,), 0.8),
    "column mask, L1": ((2, 1), COLUMNS, 0.0),
}


@pytest.mark.parametrize("reduction", ["none", "batchmean", "sum"])
@pytest.mark.parametrize("name", SECOND)
def test_gradgradcheck(name: str, reduction: str, backend: str) -> None:
    """Finite differences in float64, at points no nearer to a kink than the step."""
    inside, outside, beta = (w.to(DEVICE) if isinstance(w, Tensor) else w for w in SECOND[name])
    operands = boxes((2, 3), inside, outside, grad=4, dtype=torch.float64)
    if isinstance(beta, tuple):
        beta = (0.8 + 0.1 * values(*beta, dtype=torch.float64)).requires_grad_()
    x = ((operands[0] - operands[1]) * (1 if operands[2] is None else operands[2])).detach().abs()
    assert x.min() < 0.8 < x.max()
    assert ((x - beta).abs()[x != 0] > 1e-3).all()
    normalizer = torch.tensor(3, device=DEVICE) if reduction == "sum" else None

    def loss(*operands: Any) -> Tensor:
        options: Any = {"reduction": reduction, "normalizer": normalizer}
        return smooth_l1_loss(*operands[:4], beta=operands[4], **options)

    # (A launch in the interpreter costs milliseconds.)
    fast = backend == "triton"
    assert torch.autograd.gradcheck(loss, (*operands, beta), fast_mode=fast)
    assert torch.autograd.gradgradcheck(loss, (*operands, beta), fast_mode=fast)


# What is trained beside the input, and the options that are numbers.
TRAINED: dict[str, tuple[list[str], dict[str, float]]] = {
    "input": ([], {"sigma": 3.0}),
    "input, L1": ([], {"beta": 0.0}),
    "weights": (["weights"], {"beta": 0.5}),
    "beta": (["beta"], {}),
    "weights and sigma": (["weights", "sigma"], {}),
}
ROLES = ("inside_weights", "outside_weights")


def masked(name: str, role: str, filler: float) -> tuple[Loss, list[Tensor], Tensor]:
    """Return a loss, its sources, and where its mask excludes, which holds the filler."""
    trained, numbers = TRAINED[name]
    mask = values(2, 1, 3, 5, seed=0) > 0
    excluded = ~mask.expand(2, 4, 3, 5)
    tensors = [values(2, 4, 3, 5, seed=seed).abs() + 0.1 for seed in range(1, 3 + len(trained))]
    tensors[1] = tensors[1].to(memory_format=torch.channels_last)
    for tensor in tensors:
        tensor[excluded] = filler
    target, *sources = tensors
    (other,) = {*ROLES} - {role}

    def loss(input: Tensor, *others: Tensor) -> Tensor:
        options: dict[str, Any] = {"reduction": "sum", role: mask, **numbers}
        options |= zip(trained, others, strict=True)
        options[other] = options.pop("weights", None)
        return smooth_l1_loss(input, target, **options)

    return loss, [source.requires_grad_() for source in sources], excluded


@pytest.mark.parametrize("upstream", [1.5, 0.0, math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("name", TRAINED)
def test_graphs_and_masks(name: str, role: str, upstream: float) -> None:
    """A graph of gradients changes none of them, nor the input's memory format.

    What a mask excludes may be NaN, and then too, whatever arrives, adds nothing to any derivative.
    """
    same: Any = partial(assert_close, rtol=1e-5, atol=1e-6, equal_nan=True)
    above, found = torch.tensor(upstream, device=DEVICE), []
    for filler in (0.5, math.nan):
        loss, sources, excluded = masked(name, role, filler)
        value = loss(*sources)
        plain = torch.autograd.grad(value, sources, above, retain_graph=True)
        graphed = torch.autograd.grad(value, sources, above, create_graph=True)
        same(graphed, plain)
        same(torch.func.vjp(loss, *sources)[1](above), plain)
        assert graphed[0].stride() == plain[0].stride() == sources[0].stride()
        assert not any(gradient[excluded].any() for gradient in plain)
        second = torch.autograd.grad([g.square().sum() for g in graphed], sources)
        found.append([value, *plain, *second])
    same(*found)
