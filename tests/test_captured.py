"""Graphs that were made first and are transformed, differentiated or batched later.

On the kernel a graph holds a registered operator, which has to answer to whatever the graph of the
composition answers to: who made the graph could not know.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jvp, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from fused_smoothl1 import smooth_l1_loss
from fused_smoothl1.problem import make_problem
from tests.composed import composed
from tests.support import coin, gaussian

Function = Callable[..., Any]


class _Model(nn.Module):
    """The loss of a call with its weights, as a function of input and target."""

    def __init__(self, function: Function, reduction: str, weights: str, device: str) -> None:
        super().__init__()
        self.function, self.reduction = function, reduction
        self.inside = coin(6, 1, seed=4, device=device) if weights else None
        self.outside = gaussian(6, 1, seed=3, device=device) if weights else None

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        loss: Tensor = self.function(
            x, target, self.inside, self.outside, beta=0.6, reduction=self.reduction
        )
        return loss


def _by_make_fx(model: nn.Module, *operands: Tensor, before_autograd: bool = False) -> Function:
    return make_fx(model, pre_dispatch=before_autograd)(*operands)


def _exported(model: nn.Module, *operands: Tensor) -> Function:
    return torch.export.export(model, operands).module()


def _of_a_gradient(
    model: nn.Module, x: Tensor, target: Tensor, *, before_autograd: bool = False
) -> Function:
    """The graph of a forward and a backward pass."""

    def gradient(x: Tensor, target: Tensor) -> Tensor:
        return torch.autograd.grad(model(x, target).sum(), x)[0]

    return make_fx(gradient, pre_dispatch=before_autograd)(x.clone().requires_grad_(), target)


CAPTURES: dict[str, Function] = {
    "make_fx": _by_make_fx,
    "make_fx before autograd": partial(_by_make_fx, before_autograd=True),
    "export": _exported,
    "gradient": _of_a_gradient,
    "gradient before autograd": partial(_of_a_gradient, before_autograd=True),
}


def _grad(f: Function, x: Tensor, t: Tensor) -> Any:
    return grad(lambda x: f(x, t).sin().sum())(x)


def _grad_of_grad(f: Function, x: Tensor, t: Tensor) -> Any:
    return grad(lambda x: grad(lambda x: f(x, t).sin().sum())(x).square().sum())(x)


def _vjp(f: Function, x: Tensor, t: Tensor) -> Any:
    value, pullback = vjp(f, x, t)[:2]
    return value, pullback(torch.full_like(value, 1.5))


def _jvp(f: Function, x: Tensor, t: Tensor) -> Any:
    return jvp(f, (x, t), (x + 1, t - 1))


def _dual(f: Function, x: Tensor, t: Tensor) -> Any:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, t), t))[:]


def _dual_and_graph(f: Function, x: Tensor, t: Tensor) -> Any:
    with forward_ad.dual_level():
        x = x.clone().requires_grad_()
        primal, tangent = forward_ad.unpack_dual(f(forward_ad.make_dual(x, t), t))
        return primal, tangent, torch.autograd.grad(tangent.sum(), x)[0]


def _vmap(f: Function, x: Tensor, t: Tensor) -> Any:
    return vmap(f, (0, None))(torch.stack([x, x + 1, x - 1]), t)


def _vmap_of_grad(f: Function, x: Tensor, t: Tensor) -> Any:
    return vmap(grad(lambda x: f(x, t).sum()))(torch.stack([x, x + 1]))


def _jvp_of_vmap(f: Function, x: Tensor, t: Tensor) -> Any:
    return jvp(vmap(f, (0, None)), (torch.stack([x, x + 1]), t), (torch.stack([x - 1, x]), t))


def _jacfwd(f: Function, x: Tensor, t: Tensor) -> Any:
    return jacfwd(f)(x, t)


def _hessian(f: Function, x: Tensor, t: Tensor) -> Any:
    return hessian(lambda x: f(x, t).sin().sum())(x)


def _once(f: Function, x: Tensor, t: Tensor) -> Any:
    x = x.clone().requires_grad_()
    value = f(x, t)
    return value, torch.autograd.grad(value.sum(), x)


def _twice(f: Function, x: Tensor, t: Tensor) -> Any:
    """Autograd's second order, through x and t."""
    x, t = x.clone().requires_grad_(), t.clone().requires_grad_()
    value = f(x, t).sin().sum()
    first = torch.autograd.grad(value, (x, t), create_graph=True)
    return value, first, torch.autograd.grad((first[0] * first[1]).sum(), (x, t))


USES = (
    *(_grad, _grad_of_grad, _vjp, _jvp, _dual, _dual_and_graph, _vmap, _vmap_of_grad),
    *(_jvp_of_vmap, _jacfwd, _hessian, _once, _twice),
)


@pytest.mark.parametrize("weights", ["", "mask and rows"])
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("capture", CAPTURES)
def test_graph(capture: str, reduction: str, weights: str, backend: str, device: str) -> None:
    dtype = torch.float64 if weights else torch.float32
    x, t = gaussian(6, 4, seed=1, device=device), gaussian(6, 4, seed=2, device=device).to(dtype)
    found, expected = (
        CAPTURES[capture](_Model(function, reduction, weights, device), x, t)
        for function in (smooth_l1_loss, composed)
    )
    for use in USES:
        torch.testing.assert_close(use(found, x + 0.1, t), use(expected, x + 0.1, t))


@pytest.mark.parametrize("before_autograd", [False, True])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_graph_of_a_second_gradient(
    reduction: str, before_autograd: bool, backend: str, device: str
) -> None:
    """With trained weights, and run with other values than those that it was traced with."""
    x, t, w = (gaussian(6, 4, seed=seed, device=device) for seed in range(3))

    def second(function: Function, x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        loss = function(x, t, w, beta=0.6, reduction=reduction).sum()
        first = torch.autograd.grad(loss, (x, w), create_graph=True)
        return torch.autograd.grad(first[0].sin().sum() + first[1].sum(), (x, w))

    operands = [v.requires_grad_() for v in (x, w)]
    traced = make_fx(partial(second, smooth_l1_loss), pre_dispatch=before_autograd)(*operands)
    operands = [(v + 0.1).detach().requires_grad_() for v in operands]
    torch.testing.assert_close(traced(*operands), second(composed, *operands))


@pytest.mark.parametrize("dynamic", [False, True])
def test_batches_of_an_exported_model(dynamic: bool, backend: str, device: str) -> None:
    """Of inputs beside one target, whose number of rows divides the loss."""
    x, t = gaussian(6, 4, seed=1, device=device), gaussian(6, 4, seed=2, device=device)
    rows = {0: torch.export.Dim.AUTO if dynamic else torch.export.Dim.STATIC}
    model = _Model(smooth_l1_loss, "mean", "", device)
    graph = torch.export.export(model, (x, t), dynamic_shapes=(rows, rows)).module()
    torch.testing.assert_close(_vmap(graph, x, t), _vmap(model, x, t))


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_compiled_then_transformed(compiler: str, backend: str, device: str) -> None:
    """Nothing tells a compiled function that forward mode is at work now; and then no more."""
    x, t = gaussian(6, 4, seed=1, device=device), gaussian(6, 4, seed=2, device=device)
    torch._dynamo.reset()
    functions = (
        torch.compile(_Model(function, "mean", "", device), backend=compiler)
        for function in (smooth_l1_loss, composed)
    )
    found, expected = (
        [use(f, x, t) for use in (_once, _dual, _jvp, _once, _dual)] for f in functions
    )
    torch.testing.assert_close(found, expected)
    torch._dynamo.reset()


def test_results_of_the_operator_are_differentiable(triton_backend: str, device: str) -> None:
    """Its gradient too, which a graph may hold by itself."""
    x, t = gaussian(6, 4, seed=1, device=device), gaussian(6, 4, seed=2, device=device)
    x.requires_grad_()
    problem = make_problem(x, t, divisor_number=24, beta_number=0.6)
    forward = torch.ops.fused_smoothl1.forward.default(*problem, *(True, True, False, False, False))
    loss = composed(x, t, beta=0.6)
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    torch.testing.assert_close(forward, (loss, gradient, -gradient))
    for one, other in ((forward[1], gradient), (forward[2] + forward[0], loss - gradient)):
        torch.testing.assert_close(
            *(torch.autograd.grad(v.square().sum(), x, retain_graph=True) for v in (one, other))
        )
