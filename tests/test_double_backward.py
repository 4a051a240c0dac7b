"""Second-order gradients: a saved gradient must not drop them silently.

gradcheck and gradgradcheck compare with finite differences in float64, at points no nearer to a
kink than the step: the seeds are such that |x| is neither near beta nor near 0.
"""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_smoothl1 import smooth_l1_loss
from fused_smoothl1.functional import Reduction
from tests.composed import composed
from tests.support import coin, gaussian

REDUCTIONS = ["none", "sum", "mean", "batchmean"]
BETA = 0.3
# Of both weights and beta.
SHAPES = {
    "full": ((2, 3), (2, 3), (2, 3)),
    "broadcast": ((2, 1), (3,), (2, 1)),
    "one for all": ((), (1, 1), ()),
}


def _operands(
    device: str, weights: str = "broadcast", dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    shapes = ((2, 3), (2, 3), *SHAPES[weights])
    operands = [
        gaussian(*shape, seed=i + 11, dtype=dtype, device=device, requires_grad=True)
        for i, shape in enumerate(shapes)
    ]
    with torch.no_grad():
        operands[4] = BETA + 0.1 * operands[4]
        x = (operands[2] * (operands[0] - operands[1])).abs()
        for beta in (BETA, operands[4]):
            assert ((x - beta).abs() > 1e-3).all()
        assert (x > 1e-3).all()
        # Both branches are taken.
        assert (x < operands[4]).any()
        assert (x > operands[4]).any()
    operands[4].requires_grad_()
    return operands


def _of_five(function: Any, reduction: str = "mean") -> Any:
    """Return the loss as a function of its five operands."""
    return lambda *t: function(*t[:4], beta=t[4], reduction=reduction)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("weights", SHAPES)
def test_gradcheck(weights: str, reduction: str, backend: str, device: str) -> None:
    loss = _of_five(smooth_l1_loss, reduction)
    assert torch.autograd.gradcheck(loss, _operands(device, weights))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("weights", SHAPES)
def test_gradgradcheck(weights: str, reduction: str, backend: str, device: str) -> None:
    assert torch.autograd.gradgradcheck(
        _of_five(smooth_l1_loss, reduction),
        _operands(device, weights),
        fast_mode=backend == "triton",  # A launch in the interpreter costs milliseconds.
    )


@pytest.mark.parametrize(
    ("case", "beta"),
    [("l1", 0.0), *((c, b) for c in ("no_weights", "masks", "normalizer") for b in (0.0, BETA))],
)
def test_gradgradcheck_of_other_calls(case: str, beta: float, backend: str, device: str) -> None:
    operands = _operands(device)[:4]
    mask = torch.tensor([[True], [False]], device=device)
    column = torch.tensor([1, 0, 7], dtype=torch.uint8, device=device)
    count = torch.tensor(3, device=device)

    def loss(input: Tensor, target: Tensor, inside: Tensor, outside: Tensor) -> Tensor:
        if case == "no_weights":
            return smooth_l1_loss(input, target, beta=beta) + 0 * (inside.sum() + outside.sum())
        if case == "masks":
            one = smooth_l1_loss(input, target, mask, outside, beta=beta, reduction="sum")
            other = smooth_l1_loss(input, target, inside, column, beta=beta, reduction="sum")
            return one + 2 * other
        if case == "normalizer":
            return smooth_l1_loss(
                input, target, inside, outside, beta=beta, reduction="sum", normalizer=count
            )
        return smooth_l1_loss(input, target, inside, outside, sigma=math.inf)

    fast = backend == "triton"
    assert torch.autograd.gradcheck(loss, operands, fast_mode=fast)
    assert torch.autograd.gradgradcheck(loss, operands, fast_mode=fast)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_gradient_penalty_is_eager(
    dtype: torch.dtype, reduction: str, backend: str, device: str
) -> None:
    """(loss + |gradient|²).backward(), against a composition of PyTorch's own operators."""
    results = []
    for function in (smooth_l1_loss, composed):
        operands = _operands(device, dtype=dtype)
        loss = _of_five(function, reduction)(*operands).sum()
        first = torch.autograd.grad(loss, operands, create_graph=True)
        (loss + sum(g.pow(2).sum() for g in first)).backward()
        results.append([*(g.detach() for g in first), *(t.grad for t in operands)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_create_graph_changes_no_value(backend: str, device: str) -> None:
    operands = _operands(device)
    for reduction in REDUCTIONS:
        loss = _of_five(smooth_l1_loss, reduction)(*operands)
        above = torch.full_like(loss, 1.3)
        with_graph = torch.autograd.grad(loss, operands, above, create_graph=True)
        without = torch.autograd.grad(loss, operands, above)
        for one, other in zip(with_graph, without, strict=True):
            assert one.requires_grad
            assert not other.requires_grad
            assert one.shape == other.shape
            torch.testing.assert_close(one.detach(), other)


def test_second_order_for_an_upstream_of_ones_without_grad(backend: str, device: str) -> None:
    """The case `once_differentiable` does not catch: the Hessian of the quadratic part is not 0."""
    input = torch.tensor([0.1, 0.2, 5.0], device=device, requires_grad=True)
    loss = smooth_l1_loss(input, torch.zeros_like(input), beta=0.5, reduction="sum")
    (first,) = torch.autograd.grad(loss, input, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), input)
    torch.testing.assert_close(second, torch.tensor([2.0, 2.0, 0.0], device=device))


def test_third_order(backend: str, device: str) -> None:
    results = []
    for function in (smooth_l1_loss, composed):
        operands = _operands(device, "full")
        loss = _of_five(function, "sum")(*operands)
        first = torch.autograd.grad(loss, operands, create_graph=True)
        total = torch.stack([(g**3).sum() for g in first]).sum()
        second = torch.autograd.grad(total, operands, create_graph=True)
        third = torch.autograd.grad(torch.stack([(g**2).sum() for g in second]).sum(), operands)
        results.append(third)
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("trained_beta", [False, True])
def test_gradient_penalty_with_masked_nan(
    trained_beta: bool, reduction: Reduction, backend: str, device: str
) -> None:
    """What a mask does not select adds 0 to second-order gradients as well."""
    mask = coin(6, 1, seed=1, device=device)
    clean = gaussian(6, 4, seed=2, dtype=torch.float64, device=device)
    gradients = []
    for filler in (0.0, math.nan):
        input = torch.where(mask, clean, filler).requires_grad_()
        weights = torch.where(mask, 1.5, torch.full_like(clean, filler)).requires_grad_()
        betas = torch.where(mask, BETA, torch.full_like(clean, filler)).requires_grad_()
        sources = [input, weights, betas] if trained_beta else [input, weights]
        loss = smooth_l1_loss(
            *(input, torch.zeros_like(clean), mask, weights),
            beta=betas if trained_beta else BETA,
            reduction=reduction,
        ).sum()
        first = torch.autograd.grad(loss, sources, create_graph=True)
        second = torch.autograd.grad(loss + sum(g.pow(2).sum() for g in first), sources)
        gradients.append((*(g.detach() for g in first), *second))
    for one, other in zip(*gradients, strict=True):
        assert other.isfinite().all()
        assert (other[~mask.squeeze(1)] == 0).all()
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradient_penalty_in_16_bits(dtype: torch.dtype, backend: str, device: str) -> None:
    """Second-order gradients keep their tensor's dtype and come near those of float32."""
    gradients = []
    for kind in (dtype, torch.float32):
        input, target = (t.detach().to(dtype).to(kind) for t in _operands(device)[:2])
        input.requires_grad_()
        loss = smooth_l1_loss(input, target, beta=BETA, reduction="sum")
        (first,) = torch.autograd.grad(loss, input, create_graph=True)
        first.pow(2).sum().backward()
        assert input.grad is not None
        assert input.grad.dtype == kind
        gradients.append(input.grad.float())
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(gradients[0], gradients[1], rtol=4 * eps, atol=4 * eps)


def test_of_l1_is_zero(backend: str, device: str) -> None:
    """Beside the kink the gradient is constant: its gradient is 0, not missing."""
    input = gaussian(6, seed=1, device=device, requires_grad=True)
    loss = smooth_l1_loss(input, torch.zeros_like(input), beta=0.0, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, input, create_graph=True)
    assert gradient.tolist() == input.sign().tolist()
    assert torch.autograd.grad(gradient.sum(), input)[0].tolist() == [0.0] * 6


@pytest.mark.parametrize("options", [{"beta": 0.0}, {"beta": 0.5}, {"sigma": 3.0}], ids=str)
@pytest.mark.parametrize("upstream", [math.inf, -math.inf, math.nan, 0.0])
@pytest.mark.parametrize("weight", [1.0, math.inf])
@pytest.mark.parametrize("trained", ["inside", "outside", None])
def test_first_gradient_is_the_same(
    trained: str | None,
    weight: float,
    upstream: float,
    options: dict[str, float],
    backend: str,
    device: str,
) -> None:
    """To ask for a graph changes no gradient, for any upstream gradient and under masks too."""
    input = torch.tensor([2.0, -1.0, 0.1, -1e-3, 0.5, math.nan], device=device, requires_grad=True)
    mask = torch.arange(6, device=device) < 5
    weights: Any = weight
    if trained:
        weights = torch.full((6,), weight, device=device, requires_grad=True)
    inside, outside = (weights, mask) if trained == "inside" else (mask, weights)
    sources = [t for t in (input, weights) if isinstance(t, Tensor)]
    gradients: list[tuple[Tensor, ...]] = []
    for create_graph in (False, True):
        loss = smooth_l1_loss(
            input, torch.zeros_like(input), inside, outside, reduction="sum", **options
        )
        given = torch.full_like(loss, upstream)
        gradients.append(torch.autograd.grad(loss, sources, given, create_graph=create_graph))
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=0.0, equal_nan=True)
    assert all(float(gradient[5]) == 0.0 for gradient in gradients[0])


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_keeps_the_memory_format(reduction: Reduction, backend: str, device: str) -> None:
    """Full-size weights of another format do not decide it."""
    shape = (2, 4, 3, 5)
    input = gaussian(*shape, seed=1, device=device).to(memory_format=torch.channels_last)
    input.requires_grad_()
    rest = [gaussian(*shape, seed=seed, device=device) for seed in (2, 3, 4)]
    loss = smooth_l1_loss(input, *rest, reduction=reduction)
    (gradient,) = torch.autograd.grad(loss, input, torch.ones_like(loss), create_graph=True)
    assert gradient.stride() == input.stride()
