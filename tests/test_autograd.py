"""First-order autograd: who gets a gradient, how often, and for which upstream gradient.

The gradient is computed in the forward pass and handed out in the backward pass, so the dangers
are all of one kind: a buffer used twice, handed out and still needed, or computed for nobody.
"""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_smoothl1 import SmoothL1Loss, smooth_l1_loss
from fused_smoothl1.functional import Reduction
from tests.support import NAMES, check, coin, gaussian, gradient_unless_modified

REDUCTIONS: list[Reduction] = ["none", "sum", "mean", "batchmean"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def _operands(
    device: str, requires_grad: tuple[bool, ...] = (True,) * 4, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    shapes = [(7, 5), (7, 5), (7, 1), (5,)]
    return [
        gaussian(*shape, seed=i + 1, dtype=dtype, device=device, requires_grad=needed)
        for i, (shape, needed) in enumerate(zip(shapes, requires_grad, strict=True))
    ]


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("needed", list(itertools.product([False, True], repeat=4)), ids=str)
def test_only_for_those_that_require_one(
    needed: tuple[bool, ...], reduction: Reduction, backend: str, device: str
) -> None:
    operands = _operands(device, needed)
    check(*operands, reduction=reduction, upstream=1.5)
    loss = smooth_l1_loss(*operands, reduction=reduction)
    assert loss.requires_grad == any(needed)
    if any(needed):
        loss.backward(torch.ones_like(loss))
    for name, operand, expects in zip(NAMES[:4], operands, needed, strict=True):
        assert (operand.grad is not None) == expects, name


WEIGHT_SHAPES = [(4, 3, 5), (4, 1, 1), (1, 3, 1), (3, 1), (5,), (1,), (), (1, 1, 1), (4, 1, 5)]


@pytest.mark.parametrize("shape", WEIGHT_SHAPES, ids=str)
@pytest.mark.parametrize("role", ["inside", "outside", "both"])
def test_gradients_of_weights_have_their_shape(
    role: str, shape: tuple[int, ...], backend: str, device: str
) -> None:
    inside, outside = (
        gaussian(*shape, seed=seed, device=device, requires_grad=role in (name, "both"))
        for seed, name in ((3, "inside"), (4, "outside"))
    )
    for reduction in REDUCTIONS:
        check(
            gaussian(4, 3, 5, seed=1, device=device, requires_grad=role == "both"),
            gaussian(4, 3, 5, seed=2, device=device),
            inside,
            outside,
            beta=0.4,
            reduction=reduction,
            upstream=-1.3,
        )


def test_gradient_of_a_weight_over_many_rows(backend: str, device: str) -> None:
    """9,000 terms a weight: the sum is made in float32, also for weights of 16 bits."""
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        check(
            gaussian(3000, 3, seed=1, device=device),
            gaussian(3000, 3, seed=2, device=device),
            gaussian(1, 3, seed=3, dtype=dtype, device=device, requires_grad=True),
            gaussian(seed=4, dtype=dtype, device=device, requires_grad=True),
            reduction="mean",
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_gradient_of_a_weight_is_rounded_after_the_sum(
    dtype: torch.dtype, backend: str, device: str
) -> None:
    """Terms near 1000 of both signs: rounded one by one, their sum would be off by a tenth."""
    difference = 1000 + gaussian(2000, seed=1, device=device)
    difference[::2] += 1.0
    sign = torch.ones(2000, device=device)
    sign[1::2] = -1.0
    inside = torch.ones(1, dtype=dtype, device=device, requires_grad=True)
    check(difference, torch.zeros_like(difference), inside, sign, reduction="sum")


UPSTREAM = [0.0, -0.0, 1.0, -1.0, 3.7, 1e-30, 1e30, math.inf, -math.inf, math.nan]


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("upstream", UPSTREAM)
def test_upstream_gradient_of_any_value(
    upstream: float, reduction: str, backend: str, device: str
) -> None:
    for weights in ([], [coin(7, 1, seed=5, device=device)]):
        operands = _operands(device, (True, True, False, False))[:2]
        check(*operands, *weights, reduction=reduction, upstream=upstream)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize("masked", [False, True])
def test_backward_again_and_again(
    masked: bool, reduction: Reduction, dtype: torch.dtype, backend: str, device: str
) -> None:
    """The results stay what they are when the graph is used again, or when the caller writes."""
    input, target = _operands(device, (True, True, False, False), dtype)[:2]
    weights = coin(7, 1, seed=5, device=device) if masked else None
    loss = smooth_l1_loss(input, target, weights, reduction=reduction)
    kept: list[tuple[float, Tensor]] = []
    for upstream in (1.0, 2.0, 1.0, -3.0):
        above = torch.full_like(loss, upstream)
        first, second = torch.autograd.grad(loss, [input, target], above, retain_graph=True)
        kept.append((upstream, first.clone()))
        first.fill_(math.nan)
        second.zero_()
    base = kept[0][1]
    assert base.count_nonzero() > 0
    for upstream, gradient in kept:
        torch.testing.assert_close(
            gradient, base * upstream, rtol=2 * torch.finfo(dtype).eps, atol=0
        )


@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_results_of_two_backwards_do_not_share_memory(
    reduction: Reduction, backend: str, device: str
) -> None:
    operands = _operands(device)
    loss = smooth_l1_loss(*operands, reduction=reduction)
    above = torch.ones_like(loss)
    results = [torch.autograd.grad(loss, operands, above, retain_graph=True) for _ in range(3)]
    pointers = [g.data_ptr() for gradients in results for g in gradients]
    pointers += [t.data_ptr() for t in (*operands, loss, above)]
    assert len(set(pointers)) == len(pointers)


def test_gradients_one_at_a_time(backend: str, device: str) -> None:
    """First the target's alone, then the input's: what was not asked for is not lost."""
    input, target = _operands(device)[:2]
    loss = smooth_l1_loss(input, target)
    (of_target,) = torch.autograd.grad(loss, target, retain_graph=True)
    (of_input,) = torch.autograd.grad(loss, input, retain_graph=True)
    assert torch.equal(of_input, -of_target)
    both = torch.autograd.grad(loss, [input, target])
    assert torch.equal(both[0], of_input)
    assert torch.equal(both[1], of_target)


def test_accumulation(backend: str, device: str) -> None:
    """Two losses of one input, and one loss twice, add up in .grad."""
    input, target = _operands(device, (True, False, False, False))[:2]
    (once,) = torch.autograd.grad(smooth_l1_loss(input, target), input)
    first = smooth_l1_loss(input, target)
    first.backward(retain_graph=True)
    first.backward()
    smooth_l1_loss(input, target).backward()
    torch.testing.assert_close(input.grad, 3 * once)


def test_freed_graph_raises(backend: str, device: str) -> None:
    loss = smooth_l1_loss(*_operands(device))
    loss.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()
    input, target = _operands(device)[:2]
    loss = smooth_l1_loss(input, target)
    torch.autograd.grad(loss, input, torch.ones(2, device=device), is_grads_batched=True)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(loss, input)


@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_one_tensor_in_several_roles(reduction: Reduction, backend: str, device: str) -> None:
    """Each role's gradient counts: here input = 2t, target = t², both weights t."""
    t = gaussian(6, 5, seed=1, dtype=torch.float64, device=device, requires_grad=True)
    loss = smooth_l1_loss(2 * t, t * t, t, t, beta=0.6, reduction=reduction)
    (gradient,) = torch.autograd.grad(loss.sum(), t)
    x = t * (2 * t - t * t)
    f = torch.nn.functional.smooth_l1_loss(x, torch.zeros_like(x), beta=0.6, reduction="none")
    (expected,) = torch.autograd.grad((t * f).sum(), t)
    torch.testing.assert_close(gradient, expected)

    loss = smooth_l1_loss(t, t, reduction=reduction)
    (gradient,) = torch.autograd.grad(loss.sum(), t)
    assert torch.equal(gradient, torch.zeros_like(t))


def test_stride_0_upstream(backend: str, device: str) -> None:
    """loss.sum() and loss.mean() send an expanded number down to `none`."""
    for last in ("sum", "mean"):
        input, target = _operands(device, (True, False, False, False))[:2]
        getattr(smooth_l1_loss(input, target, reduction="none"), last)().backward()
        (expected,) = torch.autograd.grad(smooth_l1_loss(input, target, reduction=last), input)
        torch.testing.assert_close(input.grad, expected)


def test_slice_of_the_loss(backend: str, device: str) -> None:
    """Zeros come from above for the elements that are not used."""
    input, target = _operands(device, (True, False, False, False))[:2]
    smooth_l1_loss(input, target, reduction="none")[2].sum().backward()
    assert input.grad is not None
    assert input.grad[2].count_nonzero() == 5
    assert input.grad.count_nonzero() == 5


def test_loss_modified_in_place(backend: str, device: str) -> None:
    """A training loop's `loss /= steps` on what the function returned."""
    for reduction in REDUCTIONS:
        input, target = _operands(device, (True, False, False, False))[:2]
        loss = smooth_l1_loss(input, target, reduction=reduction)
        (expected,) = torch.autograd.grad(loss, input, torch.full_like(loss, 0.25))
        loss = smooth_l1_loss(input, target, reduction=reduction)
        loss /= 4
        (gradient,) = torch.autograd.grad(loss, input, torch.ones_like(loss))
        torch.testing.assert_close(gradient, expected)


MODIFIED = [(r, p) for r in ("none", "sum") for p in range(6) if (r, p) != ("none", 5)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("reduction", "position"), MODIFIED)
def test_operand_modified_before_backward(
    reduction: Reduction, position: int, dtype: torch.dtype, backend: str, device: str
) -> None:
    """It raises, or the result is that of the old values; a wrong number is never given.

    Positions 0 to 3 are the operands, 4 is a mask in place of the fourth, 5 the normalizer.
    """
    operands: list[Any] = _operands(device, (True, False, False, False), dtype)
    if position == 4:
        operands[3] = coin(7, 5, seed=6, device=device)
    normalizer = torch.tensor(4.0, device=device) if position == 5 else None

    def evaluate() -> Tensor:
        return smooth_l1_loss(*operands, reduction=reduction, normalizer=normalizer)

    modified = [*operands, operands[3], normalizer][position]
    for backwards in (0, 1):
        loss = evaluate()
        (expected,) = torch.autograd.grad(evaluate(), operands[0], torch.ones_like(loss))
        if backwards:
            torch.autograd.grad(loss, operands[0], torch.ones_like(loss), retain_graph=True)
        with torch.no_grad():
            modified.logical_not_() if position == 4 else modified.add_(1.0)
        gradient = gradient_unless_modified(loss, operands[0])
        if gradient is not None:
            torch.testing.assert_close(gradient, expected)


def test_no_grad(backend: str, device: str) -> None:
    operands = _operands(device)
    expected = smooth_l1_loss(*operands).detach()
    with torch.no_grad():
        loss = smooth_l1_loss(*operands)
    assert not loss.requires_grad
    assert torch.equal(loss, expected)
    with torch.inference_mode():
        assert torch.equal(smooth_l1_loss(*operands), expected)
    loss = smooth_l1_loss(*(t.detach() for t in operands))
    assert not loss.requires_grad
    assert torch.equal(loss, expected)


def test_target_computed_from_the_input(backend: str, device: str) -> None:
    """A bootstrapped target, detached: only the prediction learns."""
    input = gaussian(8, seed=1, device=device, requires_grad=True)
    target = input.detach() * 0.5
    check(input, target, reduction="sum")
    loss = smooth_l1_loss(input, (input * 0.5).detach(), reduction="sum")
    (gradient,) = torch.autograd.grad(loss, input)
    torch.testing.assert_close(gradient, (0.5 * input).clamp(-1, 1).detach())


def test_learned_outside_weights_train(backend: str, device: str) -> None:
    """Uncertainty weighting: exp(-s) f + s has its minimum at s = log(mean of f)."""
    input = gaussian(40, 3, seed=1, device=device) * torch.tensor([0.5, 2.0, 8.0], device=device)
    target = torch.zeros_like(input)
    uncertainty = torch.zeros(3, device=device, requires_grad=True)
    optimizer = torch.optim.SGD([uncertainty], lr=0.5)
    for _ in range(40):
        optimizer.zero_grad()
        loss = smooth_l1_loss(input, target, None, (-uncertainty).exp(), reduction="batchmean")
        (loss + uncertainty.sum()).backward()
        optimizer.step()
    f = torch.nn.functional.smooth_l1_loss(input, target, reduction="none")
    torch.testing.assert_close(uncertainty.detach(), f.mean(0).log(), rtol=1e-3, atol=1e-3)


def test_module_trains_a_layer(backend: str, device: str) -> None:
    """The loss reaches the parameters behind a non-leaf input, and falls."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(6, 4).to(device)
    criterion = SmoothL1Loss(sigma=3.0, reduction="batchmean")
    features, target = (
        gaussian(32, 6, seed=1, device=device),
        gaussian(32, 4, seed=2, device=device),
    )
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.3)
    history = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = criterion(layer(features), target, coin(32, 1, seed=3, device=device))
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    assert history[-1] < 0.9 * history[0]


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_batch_of_upstream_gradients(reduction: Reduction, backend: str, device: str) -> None:
    operands = _operands(device)
    loss = smooth_l1_loss(*operands, reduction=reduction)
    upstream = torch.stack([torch.full_like(loss, value) for value in (1.0, -2.0)])
    found = torch.autograd.grad(loss, operands, upstream, is_grads_batched=True)
    for i, one in enumerate(upstream):
        loss = smooth_l1_loss(*operands, reduction=reduction)
        expected = torch.autograd.grad(loss, operands, one)
        for batched, gradient in zip(found, expected, strict=True):
            torch.testing.assert_close(batched[i], gradient)


def test_vectorized_jacobian(backend: str, device: str) -> None:
    input, target, *_ = _operands(device)
    jacobian: Any = torch.autograd.functional.jacobian
    found = jacobian(lambda x: smooth_l1_loss(x, target, reduction="none"), input, vectorize=True)
    expected = jacobian(lambda x: smooth_l1_loss(x, target, reduction="none"), input)
    torch.testing.assert_close(found, expected)


def _zero(like: Tensor) -> Tensor:
    """Return zeros without memory, as PyTorch hands down where nothing depends on a result."""
    return torch._efficientzerotensor(like.shape, dtype=like.dtype, device=like.device)


def _negated(like: Tensor) -> Tensor:
    """Return a view of what has the negatives in memory, as behind a conjugation."""
    return torch._neg_view(gaussian(*like.shape, seed=9, dtype=like.dtype, device=str(like.device)))


@pytest.mark.parametrize("unstored", [_zero, _negated])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_upstream_gradient_that_is_not_in_memory(
    reduction: Reduction, dtype: torch.dtype, masked: bool, unstored: Any, backend: str, device: str
) -> None:
    """Whichever way the gradients are computed: by a product, anew, or only now."""
    input, target, inside, _ = _operands(device, (True, True, False, False), dtype)
    weights = inside > 0 if masked else inside
    for needed in ([input], [target], [input, target]):
        loss = smooth_l1_loss(input, target, weights, reduction=reduction)
        upstream = unstored(loss)
        assert upstream._is_zerotensor() or upstream.is_neg()
        found = torch.autograd.grad(loss, needed, upstream, retain_graph=True)
        stored = torch.zeros_like(loss) + upstream
        torch.testing.assert_close(found, torch.autograd.grad(loss, needed, stored))
