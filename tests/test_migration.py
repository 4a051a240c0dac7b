"""Coming from another loss: each old line and its new one agree in loss and gradients.

The old lines stand in the README's section on migration; here they are held against this library
on both backends. mmdetection's and the Faster R-CNN ports' functions are written anew from what
they publish, so that no detector has to be installed.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fused_smoothl1 import SmoothL1Loss, smooth_l1_loss
from fused_smoothl1.functional import Reduction
from tests.composed import composed
from tests.support import coin, gaussian

ROWS, COLUMNS = 33, 4
REDUCTIONS = ("none", "sum", "mean")
Loss = Callable[[Tensor, Tensor], Tensor]


@pytest.fixture
def pair(device: str) -> tuple[Tensor, Tensor]:
    """Predictions and targets (33, 4) in float64: what is left of a difference is no rounding."""
    one, other = (gaussian(ROWS, COLUMNS, seed=seed, device=device) for seed in (1, 2))
    return one.double(), other.double()


def _assert_equal(old: Loss, new: Loss, pair: tuple[Tensor, Tensor], rtol: float = 1e-12) -> None:
    """Compare losses, and the gradients of both operands under an upstream gradient of 3."""
    results = []
    for loss in (old, new):
        operands = [tensor.clone().requires_grad_() for tensor in pair]
        value = loss(*operands)
        gradients = torch.autograd.grad(value, operands, torch.full_like(value, 3.0))
        results.append((value, *gradients))
    for before, after in zip(*results, strict=True):
        assert before.shape == after.shape
        torch.testing.assert_close(after, before, rtol=rtol, atol=1e-15)
        assert after.count_nonzero() > 0


def _ported(
    bbox_pred: Tensor,
    bbox_targets: Tensor,
    bbox_inside_weights: Tensor,
    bbox_outside_weights: Tensor,
    sigma: float = 1.0,
    dim: tuple[int, ...] = (1,),
) -> Tensor:
    """Do what the PyTorch ports of Faster R-CNN do: sum over `dim`, then average what is left."""
    weighted = bbox_inside_weights * (bbox_pred - bbox_targets)
    distance = weighted.abs()
    near = (distance < sigma**-2).detach().to(distance.dtype)
    blended = near * (sigma * weighted) ** 2 / 2 + (1 - near) * (distance - 0.5 / sigma**2)
    per_element = bbox_outside_weights * blended
    for axis in sorted(dim, reverse=True):
        per_element = per_element.sum(axis)
    return per_element.mean()


def _mmdetection(
    pred: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    beta: float = 1.0,
    avg_factor: float | None = None,
) -> Tensor:
    """Do what mmdetection's loss does with the reduction "mean": weight, then one average.

    Its `avg_factor` has float32's epsilon added, against a division by 0.
    """
    distance = (pred - target).abs()
    loss = torch.where(distance < beta, distance * distance / (2 * beta), distance - beta / 2)
    if weight is not None:
        loss = loss * weight
    if avg_factor is None:
        return loss.mean()
    return loss.sum() / (avg_factor + torch.finfo(torch.float32).eps)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("beta", [0.0, 1 / 9, 1.0, 2.5])
def test_torch_function(beta: float, reduction: Reduction, pair: tuple[Tensor, Tensor]) -> None:
    _assert_equal(
        lambda a, b: functional.smooth_l1_loss(a, b, beta=beta, reduction=reduction),
        lambda a, b: smooth_l1_loss(a, b, beta=beta, reduction=reduction),
        pair,
    )


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_torch_module(reduction: Reduction, pair: tuple[Tensor, Tensor]) -> None:
    old = nn.SmoothL1Loss(reduction=reduction, beta=0.5)
    _assert_equal(old, SmoothL1Loss(reduction=reduction, beta=0.5), pair)


@pytest.mark.usefixtures("backend")
def test_torch_module_without_arguments(pair: tuple[Tensor, Tensor]) -> None:
    old, new = nn.SmoothL1Loss(), SmoothL1Loss()
    _assert_equal(old, new, pair)
    assert (new.beta, new.reduction) == (old.beta, old.reduction)
    assert SmoothL1Loss(sigma=3.0).beta is None


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("delta", [0.1, 1.0, 3.0])
def test_huber(delta: float, reduction: Reduction, pair: tuple[Tensor, Tensor]) -> None:
    """The Huber loss is delta times Smooth L1: as a factor outside, or as the outside weight."""

    def old(a: Tensor, b: Tensor) -> Tensor:
        return functional.huber_loss(a, b, delta=delta, reduction=reduction)

    _assert_equal(
        old, lambda a, b: delta * smooth_l1_loss(a, b, beta=delta, reduction=reduction), pair
    )
    _assert_equal(
        old,
        lambda a, b: smooth_l1_loss(a, b, beta=delta, outside_weights=delta, reduction=reduction),
        pair,
    )


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("sigma", [1.0, 3.0])
def test_faster_rcnn_head(sigma: float, pair: tuple[Tensor, Tensor], device: str) -> None:
    inside = coin(ROWS, COLUMNS, seed=3, device=device).double()
    outside = gaussian(ROWS, COLUMNS, seed=4, dtype=torch.float64, device=device).abs()
    _assert_equal(
        lambda a, b: _ported(a, b, inside, outside, sigma),
        lambda a, b: smooth_l1_loss(a, b, inside, outside, sigma=sigma, reduction="batchmean"),
        pair,
    )


@pytest.mark.usefixtures("backend")
def test_faster_rcnn_rpn(device: str) -> None:
    """The RPN's call sums over dim [1, 2, 3]: what is left to average is the batch."""
    shape = (2, 36, 3, 5)
    a, b, outside = (
        gaussian(*shape, seed=seed, dtype=torch.float64, device=device) for seed in (1, 2, 3)
    )
    inside = coin(*shape, seed=4, device=device).double()
    _assert_equal(
        lambda a, b: _ported(a, b, inside, outside.abs(), sigma=3.0, dim=(1, 2, 3)),
        lambda a, b: smooth_l1_loss(a, b, inside, outside.abs(), sigma=3.0, reduction="batchmean"),
        (a, b),
    )


@pytest.mark.usefixtures("backend")
def test_faster_rcnn_over_fewer_dimensions(device: str) -> None:
    """Where `dim` leaves more than the batch, the sum is divided by all that it leaves."""
    shape = (2, 8, 5)
    a, b = (gaussian(*shape, seed=seed, dtype=torch.float64, device=device) for seed in (1, 2))
    ones = torch.ones_like(a)
    _assert_equal(
        lambda a, b: _ported(a, b, ones, ones, sigma=2.0, dim=(1,)),
        lambda a, b: smooth_l1_loss(a, b, sigma=2.0, reduction="sum", normalizer=2 * 5),
        (a, b),
    )


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("beta", [1 / 9, 1.0])
def test_mmdetection_weight(beta: float, pair: tuple[Tensor, Tensor], device: str) -> None:
    """Its weight multiplies the loss: it is the outside weight, and a mean stays a mean."""
    weight = gaussian(ROWS, COLUMNS, seed=3, dtype=torch.float64, device=device).abs()
    _assert_equal(
        lambda a, b: _mmdetection(a, b, weight, beta=beta),
        lambda a, b: smooth_l1_loss(a, b, outside_weights=weight, beta=beta),
        pair,
    )


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("on_device", [False, True])
def test_mmdetection_avg_factor(on_device: bool, pair: tuple[Tensor, Tensor], device: str) -> None:
    weight = coin(ROWS, 1, seed=3, device=device).double().expand(ROWS, COLUMNS)
    eps = torch.finfo(torch.float32).eps
    avg_factor = 7.0
    exact = avg_factor + eps
    normalizer = torch.tensor(exact, dtype=torch.float64, device=device) if on_device else exact
    _assert_equal(
        lambda a, b: _mmdetection(a, b, weight, avg_factor=avg_factor),
        lambda a, b: smooth_l1_loss(
            a, b, outside_weights=weight, reduction="sum", normalizer=normalizer
        ),
        pair,
    )
    # In float32, mmdetection's precision, its epsilon is below the last digit: leave it out.
    assert torch.tensor(exact, dtype=torch.float32) == avg_factor


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("k", [1, 10, ROWS])
def test_dynamic_rcnn(k: int, reduction: Reduction, pair: tuple[Tensor, Tensor]) -> None:
    """The k-th smallest of the targets' errors, without a wait for it."""
    beta = torch.kthvalue(pair[1][:, :2].abs().mean(1), k)[0]
    _assert_equal(
        lambda a, b: functional.smooth_l1_loss(a, b, beta=beta.item(), reduction=reduction),
        lambda a, b: smooth_l1_loss(a, b, beta=beta, reduction=reduction),
        pair,
    )
    criterion = SmoothL1Loss(beta=torch.ones_like(beta), reduction=reduction)
    criterion.get_buffer("beta").copy_(beta)
    _assert_equal(
        lambda a, b: functional.smooth_l1_loss(a, b, beta=beta.item(), reduction=reduction),
        criterion,
        pair,
    )


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_transition_for_each_sample(reduction: Reduction, device: str) -> None:
    """Smooth L1's, and Huber's."""
    a, b, beta = (
        gaussian(*shape, seed=seed, dtype=torch.float64, device=device)
        for seed, shape in enumerate([(5, 4, 3, 2), (5, 4, 3, 2), (5, 1, 1, 1)])
    )
    beta = beta.abs()
    reduce: Any = {
        "none": lambda losses: losses,
        "sum": torch.sum,
        "mean": torch.mean,
    }[reduction]
    _assert_equal(
        lambda a, b: composed(a, b, beta=beta, reduction=reduction),
        lambda a, b: smooth_l1_loss(a, b, beta=beta, reduction=reduction),
        (a, b),
    )

    def huber(a: Tensor, b: Tensor) -> Tensor:
        samples = zip(a, b, beta.flatten().tolist(), strict=True)
        losses = [functional.huber_loss(x, y, delta=d, reduction="none") for x, y, d in samples]
        result: Tensor = reduce(torch.stack(losses))
        return result

    _assert_equal(
        huber,
        lambda a, b: smooth_l1_loss(a, b, outside_weights=beta, beta=beta, reduction=reduction),
        (a, b),
    )


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_eagle(share: float, device: str) -> None:
    """A mean over each hidden state, then over the tokens of a mask, if it has any."""
    a, b = (gaussian(2, 9, 16, seed=s, dtype=torch.float64, device=device) for s in (1, 2))
    mask = coin(2, 9, 1, seed=3, p=share, device=device)
    tokens = mask.sum() + 1e-5

    def eagle(a: Tensor, b: Tensor) -> Tensor:
        losses = functional.smooth_l1_loss(a, b, reduction="none")
        return torch.sum(torch.mean(mask * losses, 2)) / tokens

    def new(a: Tensor, b: Tensor) -> Tensor:
        return smooth_l1_loss(
            a, b, outside_weights=mask, reduction="sum", normalizer=a.shape[-1] * tokens
        )

    if share:
        # (The number of tokens with its epsilon is a float32.)
        _assert_equal(eagle, new, (a, b), rtol=1e-6)
    else:
        assert eagle(a, b) == new(a, b) == 0.0


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("kind", [torch.bool, torch.uint8])
@pytest.mark.parametrize(
    "select",
    [
        lambda labels: (labels > 0).nonzero().squeeze(1),
        lambda labels: torch.argwhere(labels > 0).squeeze(1),
        lambda labels: torch.where(labels > 0)[0],
        lambda labels: labels > 0,
    ],
    ids=["nonzero", "argwhere", "where", "boolean index"],
)
def test_selected_rows(
    select: Callable[[Tensor], Tensor],
    kind: torch.dtype,
    pair: tuple[Tensor, Tensor],
    device: str,
) -> None:
    """Sum over the selected rows, divided by how many elements or rows were selected."""
    labels = coin(ROWS, seed=3, device=device).long()
    positive = (labels > 0)[:, None].to(kind)
    rows = select(labels)
    count = positive.sum()

    _assert_equal(
        lambda a, b: functional.smooth_l1_loss(a[rows], b[rows], beta=1 / 9),
        lambda a, b: smooth_l1_loss(
            a, b, positive, beta=1 / 9, reduction="sum", normalizer=COLUMNS * count
        ),
        pair,
    )
    _assert_equal(
        lambda a, b: functional.smooth_l1_loss(a[rows], b[rows], reduction="sum") / count,
        lambda a, b: smooth_l1_loss(a, b, positive, reduction="sum", normalizer=count),
        pair,
    )


@pytest.mark.usefixtures("backend")
def test_several_conditions(pair: tuple[Tensor, Tensor], device: str) -> None:
    iou = gaussian(ROWS, seed=3, scale=0.5, device=device).abs()
    labels = coin(ROWS, seed=4, device=device).long()
    rows = torch.nonzero((iou > 0.2) & (labels > 0)).squeeze(1)
    mask = ((iou > 0.2) & (labels > 0))[:, None]
    _assert_equal(
        lambda a, b: functional.smooth_l1_loss(a[rows], b[rows], reduction="sum") / len(rows),
        lambda a, b: smooth_l1_loss(a, b, mask, reduction="sum", normalizer=mask.sum()),
        pair,
    )


@pytest.mark.usefixtures("backend")
def test_selected_elements(pair: tuple[Tensor, Tensor], device: str) -> None:
    """Depth: the pixels with a measurement, the others NaN in the target."""
    prediction, depth = pair
    depth = depth.masked_fill(coin(ROWS, COLUMNS, seed=3, device=device), float("nan"))
    valid = ~depth.isnan()
    old_input, new_input = (prediction.clone().requires_grad_() for _ in range(2))

    old = functional.smooth_l1_loss(old_input[valid], depth[valid])
    new = smooth_l1_loss(new_input, depth, valid, reduction="sum", normalizer=valid.sum())

    torch.testing.assert_close(new, old, rtol=1e-12, atol=0)
    old.backward()
    new.backward()
    torch.testing.assert_close(new_input.grad, old_input.grad, rtol=1e-12, atol=0)


@pytest.mark.usefixtures("backend")
def test_no_positives(pair: tuple[Tensor, Tensor], device: str) -> None:
    """Indexing leaves an empty mean, NaN; the mask leaves a loss of 0, and the step goes on."""
    none = torch.zeros(ROWS, 1, dtype=torch.bool, device=device)
    input, target = pair[0].requires_grad_(), pair[1]
    assert functional.smooth_l1_loss(input[none[:, 0]], target[none[:, 0]]).isnan()
    loss = smooth_l1_loss(input, target, none, reduction="sum", normalizer=none.sum().clamp(min=1))
    (gradient,) = torch.autograd.grad(loss, input)
    assert loss == 0
    assert not gradient.any()
