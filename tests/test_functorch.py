"""The transforms of torch.func, forward-mode AD and make_fx, against PyTorch and the oracle.

The last tests call the registered operators, whose own rules for vmap a transform of a graph that
contains them goes through.
"""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, grad, grad_and_value, hessian, jacrev, jvp, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from fused_smoothl1 import SmoothL1Loss, smooth_l1_loss
from fused_smoothl1.functional import Reduction
from fused_smoothl1.problem import make_problem
from tests import oracle
from tests.composed import composed
from tests.support import assert_near, coin, gaussian
from tests.variants import REDUCTIONS, VARIANTS, detached, make

FORWARD = torch.ops.fused_smoothl1.forward.default
BACKWARD = torch.ops.fused_smoothl1.backward.default


def _four(device: str, *batch: int) -> tuple[Tensor, ...]:
    """Return operands in float64: an input, a target, row and column weights."""
    shapes = ((6, 4), (6, 4), (6, 1), (4,))
    return tuple(
        gaussian(*batch, *shape, seed=seed, dtype=torch.float64, device=device)
        for seed, shape in enumerate(shapes)
    )


@pytest.mark.parametrize("reduction", ["sum", "mean", "batchmean"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_grad(variant: str, reduction: Reduction, backend: str, device: str) -> None:
    operands, options = make(variant, device=device)
    input, *rest = detached(operands)
    gradient, loss = grad_and_value(
        lambda input: smooth_l1_loss(input, *rest, **options, reduction=reduction)
    )(input)
    expected = oracle.smooth_l1(input, *rest, **options, reduction=reduction)
    assert gradient.dtype == input.dtype
    assert_near("gradient", gradient, expected.input, computed_in=torch.float32)
    torch.testing.assert_close(
        loss, torch.tensor(float(expected.loss), dtype=loss.dtype).to(device)
    )


def test_grad_of_every_operand(backend: str, device: str) -> None:
    four = _four(device)
    arguments = tuple(range(4))
    found = grad(lambda *o: smooth_l1_loss(*o, beta=0.5), argnums=arguments)(*four)
    expected = grad(lambda *o: composed(*o, beta=0.5), argnums=arguments)(*four)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_vmap(reduction: Reduction, backend: str, device: str) -> None:
    input, target, inside, outside = _four(device, 3)
    found = vmap(
        lambda x, t, a: smooth_l1_loss(x, t, a, outside[0], sigma=2.0, reduction=reduction),
        (0, 1, 0),
    )(input, target.movedim(0, 1), inside)
    for i in range(3):
        expected = smooth_l1_loss(
            input[i], target[i], inside[i], outside[0], sigma=2.0, reduction=reduction
        )
        torch.testing.assert_close(found[i], expected)


def test_vmap_with_masks(backend: str, device: str) -> None:
    input, target, _, _ = _four(device, 3)
    mask = coin(3, 6, 1, seed=9, device=device)
    input[~mask.expand(3, 6, 4)] = float("nan")
    found = vmap(lambda x, t, m: smooth_l1_loss(x, t, m, sigma=2.0))(input, target, mask)
    assert found.isfinite().all()
    for i in range(3):
        torch.testing.assert_close(
            found[i], smooth_l1_loss(input[i], target[i], mask[i], sigma=2.0)
        )


@pytest.mark.parametrize("unknown", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["inside", "outside"])
def test_masks_exclude_the_other_weights_too(
    name: str, unknown: float, backend: str, device: str
) -> None:
    """Nothing of theirs is in the loss, nor in gradients of any order."""
    input, target, _, _ = _four(device)
    mask = coin(6, 1, seed=9, device=device)
    weights = gaussian(6, 1, seed=8, dtype=torch.float64, device=device)

    def loss(x: Tensor, weights: Tensor) -> Tensor:
        pair = (weights, mask) if name == "inside" else (mask, weights)
        return smooth_l1_loss(x, target, pair[0], pair[1], beta=0.5)

    def penalty(x: Tensor, weights: Tensor) -> Tensor:
        gradient: Tensor = grad(loss)(x, weights)
        return gradient.square().sum()

    poisoned = torch.where(mask, weights, unknown)
    for function in (loss, penalty):
        both = grad_and_value(function, argnums=(0, 1))
        torch.testing.assert_close(both(input, poisoned), both(input, weights * mask))


def test_vmap_of_grad(backend: str, device: str) -> None:
    """Gradients per sample, of which differential privacy and influence functions are made."""
    model = torch.nn.Linear(4, 4).double().to(device)
    criterion = SmoothL1Loss(sigma=2.0)
    parameters: dict[str, Tensor] = dict(model.named_parameters())
    features, target, _, _ = _four(device)

    def loss(parameters: dict[str, Tensor], x: Tensor, t: Tensor) -> Tensor:
        result: Tensor = criterion(functional_call(model, parameters, (x,)), t)
        return result

    found = vmap(grad(loss), (None, 0, 0))(parameters, features, target)
    for i in range(6):
        one = criterion(model(features[i]), target[i])
        expected = torch.autograd.grad(one, list(parameters.values()))
        for name, gradient in zip(parameters, expected, strict=True):
            torch.testing.assert_close(found[name][i], gradient)


def test_grad_of_grad(backend: str, device: str) -> None:
    four = _four(device)

    def penalty(loss: Any, input: Tensor) -> Tensor:
        gradient = grad(lambda x: loss(x, *four[1:], beta=0.5))(input)
        result: Tensor = gradient.square().sum() + gradient.sin().sum()
        return result

    found = grad(lambda x: penalty(smooth_l1_loss, x))(four[0])
    expected = grad(lambda x: penalty(composed, x))(four[0])
    torch.testing.assert_close(found, expected)
    assert found.abs().sum() > 0


def test_hessian(backend: str, device: str) -> None:
    """1 / beta on the diagonal where the loss is quadratic, and 0 elsewhere."""
    input = torch.tensor([-2.0, -0.3, 0.0, 0.2, 3.0], dtype=torch.float64, device=device)
    target = torch.zeros_like(input)
    found = hessian(lambda x: smooth_l1_loss(x, target, beta=0.5, reduction="sum"))(input)
    diagonal = torch.tensor([0.0, 2.0, 2.0, 2.0, 0.0], dtype=torch.float64, device=device)
    torch.testing.assert_close(found, torch.diag(diagonal))


def test_jacobian_of_the_elementwise_loss(backend: str, device: str) -> None:
    input, target, inside, outside = (t.reshape(-1)[:4] for t in _four(device))
    found = jacrev(
        lambda x: smooth_l1_loss(x, target, inside, outside, beta=0.5, reduction="none")
    )(input)
    expected = jacrev(lambda x: composed(x, target, inside, outside, beta=0.5, reduction="none"))(
        input
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("reduction", "normalizer"), [*((r, None) for r in REDUCTIONS), ("sum", 3), ("sum", 2.5)]
)
@pytest.mark.parametrize("weights", [None, "rows", "mask"])
@pytest.mark.parametrize("shape", [(6, 4), ()], ids=str)
def test_tangents_have_the_dtype_of_the_loss(
    shape: tuple[int, ...],
    weights: Any,
    reduction: str,
    normalizer: Any,
    backend: str,
    device: str,
) -> None:
    """PyTorch makes float64 of a tangent without dimensions that meets a number."""
    x, target = gaussian(*shape, seed=1, device=device), gaussian(*shape, seed=2, device=device)
    if isinstance(weights, str):
        make_weights: Any = {"rows": gaussian, "mask": coin}[weights]
        weights = make_weights(*(6, 1)[: len(shape)], seed=1, device=device)

    def loss(x: Tensor) -> Tensor:
        options: dict[str, Any] = {"reduction": reduction, "normalizer": normalizer}
        return smooth_l1_loss(x, target, weights, 0.5, beta=0.6, **options)

    found: Any = jvp(loss, (x,), (torch.ones_like(x),))
    assert [part.dtype for part in found] == [torch.float32] * 2
    torch.testing.assert_close(found[1].sum(), grad(lambda x: loss(x).sum())(x).sum())


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_jvp(reduction: Reduction, backend: str, device: str) -> None:
    four = _four(device)
    tangents = tuple(torch.roll(t, 1, 0) for t in four)
    found = jvp(lambda *o: smooth_l1_loss(*o, beta=0.5, reduction=reduction), four, tangents)
    expected = jvp(lambda *o: composed(*o, beta=0.5, reduction=reduction), four, tangents)
    torch.testing.assert_close(found, expected)


def test_vjp(backend: str, device: str) -> None:
    four = _four(device)
    found: Any = vjp(lambda *o: smooth_l1_loss(*o, beta=0.5, reduction="none"), *four)
    expected: Any = vjp(lambda *o: composed(*o, beta=0.5, reduction="none"), *four)
    torch.testing.assert_close(found[0], expected[0])
    torch.testing.assert_close(found[1](four[0]), expected[1](four[0]))


@pytest.mark.parametrize("requires_grad", [False, True])
def test_dual_numbers(requires_grad: bool, backend: str, device: str) -> None:
    """Forward-mode AD outside of torch.func, also with a graph for the other mode beside it."""
    input, *rest = _four(device)
    tangent = torch.roll(input, 1, 0)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(input.requires_grad_(requires_grad), tangent)
        loss = forward_ad.unpack_dual(smooth_l1_loss(dual, *rest, beta=0.5))
    gradient = grad(lambda x: composed(x, *rest, beta=0.5))(input.detach())
    assert loss.tangent is not None
    torch.testing.assert_close(loss.tangent, (gradient * tangent).sum())
    torch.testing.assert_close(loss.primal, composed(input, *rest, beta=0.5))


def test_forward_over_reverse(backend: str, device: str) -> None:
    """A product of the Hessian with a vector."""
    input, *rest = _four(device)
    vector = torch.roll(input, 1, 0)

    def product(loss: Callable[..., Tensor]) -> Any:
        return jvp(grad(functools.partial(loss, beta=0.5)), (input, *rest), tangents)

    tangents = (vector, *(torch.zeros_like(t) for t in rest))
    torch.testing.assert_close(product(smooth_l1_loss), product(composed))


@pytest.mark.parametrize("tracing_mode", ["real", "fake", "symbolic"])
def test_make_fx(tracing_mode: Any, backend: str, device: str) -> None:
    """The traced gradient, run on other values than those that it was traced with."""
    operands = make("row_weights", device=device)[0]

    def gradient(*operands: Tensor) -> Tensor:
        loss = smooth_l1_loss(*operands, sigma=2.0)
        return torch.autograd.grad(loss, operands[0])[0]

    traced = make_fx(gradient, tracing_mode=tracing_mode)(*operands)
    names = [str(node.target) for node in traced.graph.nodes]
    assert any("fused_smoothl1.forward" in name for name in names) == (backend == "triton")
    other = gaussian(6, 4, seed=20, device=device, requires_grad=True)
    torch.testing.assert_close(traced(other, *operands[1:]), gradient(other, *operands[1:]))


@pytest.mark.parametrize("before_autograd", [False, True])
def test_make_fx_of_a_transform(before_autograd: bool, backend: str, device: str) -> None:
    """A transform comes before the trace: only PyTorch's own operations are in the graph.

    (Before autograd, PyTorch takes what the transform sees for a constant, in the composition too.)
    """
    input, *rest = _four(device)

    def traced(loss: Callable[..., Tensor], times: int) -> Any:
        function: Callable[..., Any] = functools.partial(loss, beta=0.5)
        for _ in range(times):
            function = grad(lambda *operands, f=function: f(*operands).square().sum())
        return make_fx(function, pre_dispatch=before_autograd)(input, *rest)

    for times in (1, 2):
        found, expected = (traced(loss, times) for loss in (smooth_l1_loss, composed))
        torch.testing.assert_close(found(2 * input, *rest), expected(2 * input, *rest))


def test_compile_of_a_transform(backend: str, device: str) -> None:
    torch._dynamo.reset()
    input, *rest = _four(device)
    function = grad(lambda x: smooth_l1_loss(x, *rest, beta=0.5))
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(input), function(input))
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_vmap_of_the_forward_operator(dtype: torch.dtype, backend: str, device: str) -> None:
    """Batches at any dimension, of some operands only: what a loop over the samples gives."""
    inputs, targets, inside, outside = (
        gaussian(*shape, seed=seed, dtype=dtype, device=device)
        for seed, shape in enumerate([(3, 6, 4), (6, 4, 3), (3, 4), (6, 1)])
    )
    divisors = torch.tensor([2.0, 3.0, 4.0], device=device)

    for reduce in (True, False):

        def one(*tensors: Tensor, reduce: bool = reduce) -> tuple[Tensor, ...]:
            x, t, a, d = tensors
            divisor = d if reduce else None
            problem = make_problem(x, t, a, outside, divisor, beta_number=0.5, reduce=reduce)
            found: tuple[Tensor, ...] = FORWARD(*problem, *(reduce, reduce, False, False, False))
            return found

        found = torch.func.vmap(one, (0, 2, 0, 0))(inputs, targets, inside, divisors)
        loop = [one(inputs[i], targets[..., i], inside[i], divisors[i]) for i in range(3)]
        for position, batch in enumerate(found):
            stacked = torch.stack([sample[position] for sample in loop])
            torch.testing.assert_close(batch, stacked, rtol=0, atol=0)


@pytest.mark.parametrize("reduce", [False, True])
def test_vmap_of_the_backward_operator(reduce: bool, backend: str, device: str) -> None:
    inputs, target = gaussian(3, 6, 4, seed=1, device=device), gaussian(6, 4, seed=2, device=device)
    inside, outside = gaussian(3, 4, seed=3, device=device), gaussian(6, 1, seed=4, device=device)
    upstreams = gaussian(*((3,) if reduce else (6, 4, 3)), seed=5, device=device)

    def one(upstream: Tensor, x: Tensor, a: Tensor) -> tuple[Tensor, ...]:
        problem = make_problem(
            *(x, target, a, outside),
            divisor_number=3.0 if reduce else 1.0,
            beta_number=0.5,
            reduce=reduce,
        )
        found: tuple[Tensor, ...] = BACKWARD(upstream, *problem, *(True, False, True, True, False))
        return found

    found = torch.func.vmap(one, (0 if reduce else 2, 0, 0))(upstreams, inputs, inside)
    loop = [one(upstreams[..., i], inputs[i], inside[i]) for i in range(3)]
    for position, batch in enumerate(found):
        torch.testing.assert_close(batch, torch.stack([sample[position] for sample in loop]))


def test_vmap_of_the_operator_with_a_mask(backend: str, device: str) -> None:
    """One mask for all samples, and NaN where it does not select."""
    inputs, mask = gaussian(3, 6, 4, seed=1, device=device), coin(6, 1, seed=2, device=device)
    inputs[:, ~mask[:, 0]] = float("nan")
    target = torch.zeros(6, 4, device=device)

    def one(x: Tensor) -> tuple[Tensor, ...]:
        problem = make_problem(x, target, mask, divisor_number=24, beta_number=0.5)
        found: tuple[Tensor, ...] = FORWARD(*problem, *(True, False, False, False, False))
        return found[:2]

    losses, gradients = torch.func.vmap(one)(inputs)
    for i in range(3):
        loss, gradient = one(inputs[i])
        assert loss.isfinite()
        torch.testing.assert_close(losses[i], loss)
        torch.testing.assert_close(gradients[i], gradient, rtol=0, atol=0)
