"""Whoever runs the backward pass, and how often: the gradients are the composition's.

Each runner takes a loss, what it is differentiated for, and a gradient that arrives at it, and
returns what a caller would have in hand at the end. What was handed out is never written to again.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo import compiled_autograd
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

from fused_smoothl1 import smooth_l1_loss
from tests.composed import composed
from tests.support import coin, gaussian
from tests.variants import REDUCTIONS

Loss = Callable[[Tensor], Tensor]
Results = list[Tensor]


def _once(loss: Loss, x: Tensor, upstream: Tensor) -> Results:
    return list(torch.autograd.grad(loss(x), x, upstream))


def _thrice(loss: Loss, x: Tensor, upstream: Tensor) -> Results:
    value = loss(x)
    return [torch.autograd.grad(value, x, upstream, retain_graph=True)[0] for _ in range(3)]


def _create_graph(loss: Loss, x: Tensor, upstream: Tensor) -> Results:
    """Twice the gradient with a graph, then once without, then the gradient of the gradient."""
    value = loss(x)
    first, second = (
        torch.autograd.grad(value, x, upstream, create_graph=True)[0] for _ in range(2)
    )
    (third,) = torch.autograd.grad(value, x, upstream, retain_graph=True)
    (penalty,) = torch.autograd.grad((first * second).sum(), x)
    return [first, second, third, penalty]


def _grads_batched(loss: Loss, x: Tensor, upstream: Tensor) -> Results:
    above = torch.stack([upstream, -2 * upstream, torch.zeros_like(upstream)])
    return list(torch.autograd.grad(loss(x), x, above, is_grads_batched=True))


def _vmap_of_grad(loss: Loss, x: Tensor, upstream: Tensor) -> Results:
    """torch.vmap over autograd.grad, and the graph once more after it."""
    value = loss(x)

    def pullback(above: Tensor) -> Tensor:
        return torch.autograd.grad(value, x, above, retain_graph=True)[0]

    above = torch.stack([upstream, -2 * upstream])
    return [torch.vmap(pullback)(above), pullback(upstream)]


def _dual_upstream(loss: Loss, x: Tensor, upstream: Tensor) -> Results:
    """A tangent of the upstream gradient alone: the graph was made without forward mode."""
    value = loss(x)
    with forward_ad.dual_level():
        above = forward_ad.make_dual(upstream, 3 * upstream + 1)
        (gradient,) = torch.autograd.grad(value, x, above, retain_graph=True)
        primal, tangent = forward_ad.unpack_dual(gradient)
        assert tangent is not None
        results = [primal.clone(), tangent.clone()]
    return [*results, *torch.autograd.grad(value, x, upstream)]


def _jvp_of_grad(loss: Loss, x: Tensor, upstream: Tensor) -> Results:
    value = loss(x)

    def pullback(above: Tensor) -> Tensor:
        return torch.autograd.grad(value, x, above, retain_graph=True)[0]

    return list(torch.func.jvp(pullback, (upstream,), (3 * upstream + 1,)))


def _make_fx(loss: Loss, x: Tensor, upstream: Tensor) -> Results:
    """Traced with one gradient from above, and run with another."""
    value = loss(x)

    def pullback(above: Tensor) -> Tensor:
        return torch.autograd.grad(value, x, above, retain_graph=True)[0]

    traced = make_fx(pullback)(torch.ones_like(upstream))
    return [traced(upstream), traced(2 * upstream), pullback(upstream)]


def _compiled_autograd(
    loss: Loss, x: Tensor, upstream: Tensor, compiler: Callable[..., Any] = lambda graph: graph
) -> Results:
    """Two backward passes of one graph under it, and one without; what it captures runs as is."""
    value = loss(x)

    def gradient() -> Tensor:
        return torch.autograd.grad(value, x, upstream, retain_graph=True)[0]

    with compiled_autograd._enable(compiler):
        results = [gradient(), gradient()]
    return [*results, gradient()]


def _checkpoint(loss: Loss, x: Tensor, upstream: Tensor) -> Results:
    value: Any = checkpoint(loss, x, use_reentrant=False)
    return list(torch.autograd.grad(value, x, upstream))


def _saved_tensors_hooks(loss: Loss, x: Tensor, upstream: Tensor) -> Results:
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
        value = loss(x)
        first = torch.autograd.grad(value, x, upstream, retain_graph=True)
    return [*first, *torch.autograd.grad(value, x, upstream)]


RUNNERS = (
    _once,
    _thrice,
    _create_graph,
    _grads_batched,
    _vmap_of_grad,
    _dual_upstream,
    _jvp_of_grad,
    _make_fx,
    _compiled_autograd,
    _checkpoint,
    _saved_tensors_hooks,
)


@pytest.mark.parametrize("weights", [None, "rows", "mask"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("runner", RUNNERS, ids=lambda runner: runner.__name__[1:])
def test_gradients_are_the_compositions(
    runner: Callable[[Loss, Tensor, Tensor], Results],
    reduction: str,
    weights: str | None,
    backend: str,
    device: str,
) -> None:
    _check(runner, reduction, weights, device)


@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_compiled_autograd_with_a_compiler(reduction: str, backend: str, device: str) -> None:
    torch._dynamo.reset()
    runner = partial(_compiled_autograd, compiler=torch.compile(backend="aot_eager"))
    _check(runner, reduction, "rows", device)


def _check(
    runner: Callable[[Loss, Tensor, Tensor], Results],
    reduction: str,
    weights: str | None,
    device: str,
) -> None:
    x = gaussian(6, 4, seed=1, device=device, requires_grad=True)
    target, rows = gaussian(6, 4, seed=2, device=device), gaussian(6, 1, seed=3, device=device)
    inside = {None: None, "rows": rows, "mask": coin(6, 1, seed=4, device=device)}[weights]
    shape = (6, 4) if reduction == "none" else ()
    upstream = gaussian(*shape, seed=5, device=device)

    def results(function: Callable[..., Tensor]) -> Results:
        # Twice the loss, so that what arrives at it is a temporary that may be reused.
        return runner(
            lambda x: 2 * function(x, target, inside, beta=0.6, reduction=reduction), x, upstream
        )

    found, expected = results(smooth_l1_loss), results(composed)
    assert [t.dtype for t in found] == [t.dtype for t in expected]
    torch.testing.assert_close(found, expected)
