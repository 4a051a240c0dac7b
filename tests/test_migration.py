"""Coming from another loss: each old function and its new one agree in loss and gradients.

The README's pairs are held against each other at more settings and on both backends. mmdetection's
and the Faster R-CNN ports' functions are written anew from what they publish, so that no detector
has to be installed.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (the name PyTorch users know it by)
from torch.testing import assert_close

from fused_smoothl1 import SmoothL1Loss, smooth_l1_loss
from tests import support
from tests.composed import composed
from tests.support import DEVICE, Loss, boxes, coin, results, values

pytestmark = support.on_both

SHAPE = (9, 4, 3, 2)
EPS = torch.finfo(torch.float32).eps
Pairs = Iterator[tuple[str, Loss, Loss]]
draw = partial(values, dtype=torch.float64)


def ported(a: Tensor, b: Tensor, inside: Tensor, outside: Tensor, sigma: float, dim: Any) -> Tensor:
    """Do what the PyTorch ports of Faster R-CNN do: sum over `dim`, then average what is left."""
    weighted = inside * (a - b)
    near = (weighted.abs() < sigma**-2).detach().double()
    far = weighted.abs() - 0.5 / sigma**2
    return (outside * (near * (sigma * weighted) ** 2 / 2 + (1 - near) * far)).sum(dim).mean()


def mmdetection(a: Tensor, b: Tensor, weight: Tensor, beta: float, factor: Any = None) -> Tensor:
    """Weight, then average; an average factor has an epsilon added, against a division by 0."""
    size = (a - b).abs()
    loss = weight * torch.where(size < beta, size * size / (2 * beta), size - beta / 2)
    return loss.mean() if factor is None else loss.sum().div(factor + EPS)


def pairs_of_detectors() -> Pairs:
    inside, outside = coin(*SHAPE).double(), draw(*SHAPE).abs()
    ours = partial(smooth_l1_loss, outside_weights=outside, reduction="sum")
    for sigma in (1.0, 3.0):
        old = partial(ported, inside=inside, outside=outside, sigma=sigma)
        new = partial(ours, inside_weights=inside, sigma=sigma)
        # What is left to average is the batch, as in both calls of Faster R-CNN, or more.
        yield f"sigma {sigma}", partial(old, dim=(1, 2, 3)), partial(new, reduction="batchmean")
        yield f"sigma {sigma}, dim 1", partial(old, dim=(1,)), partial(new, normalizer=9 * 3 * 2)
    for beta in (1 / 9, 1.0):
        old, new = partial(mmdetection, weight=outside, beta=beta), partial(ours, beta=beta)
        yield f"weight, beta {beta}", old, partial(new, reduction="mean")
        for factor in (7 + EPS, torch.tensor(7 + EPS, dtype=torch.float64, device=DEVICE)):
            yield f"avg_factor {factor}", partial(old, factor=7), partial(new, normalizer=factor)


def pairs(reduction: Any) -> Pairs:
    theirs, ours = (partial(f, reduction=reduction) for f in (F.smooth_l1_loss, smooth_l1_loss))
    for beta in (0.0, 1 / 9, 1.0, 2.5):
        yield f"beta {beta}", partial(theirs, beta=beta), partial(ours, beta=beta)
        options: dict[str, Any] = {"beta": beta, "reduction": reduction}
        yield f"module, beta {beta}", nn.SmoothL1Loss(**options), SmoothL1Loss(**options)
    for delta in (0.1, 1.0, 3.0):
        huber = partial(F.huber_loss, delta=delta, reduction=reduction)
        yield f"Huber, delta {delta}", huber, partial(ours, outside_weights=delta, beta=delta)
    for k in (1, 10, 50):  # Dynamic R-CNN: the k-th smallest of some errors
        error = torch.kthvalue(draw(50).abs(), k)[0]
        criterion = SmoothL1Loss(beta=torch.ones_like(error), reduction=reduction)
        criterion.get_buffer("beta").copy_(error)
        for new in (partial(ours, beta=error), criterion):
            yield f"{k}-th error", partial(theirs, beta=error.item()), new
    each = draw(9, 1, 1, 1).abs()
    by_hand, new = partial(composed, beta=each, reduction=reduction), partial(ours, beta=each)
    yield "beta of samples", by_hand, new
    yield (
        "Huber of samples",
        partial(by_hand, outside_weights=each),
        partial(new, outside_weights=each),
    )


@pytest.mark.parametrize("group", ["detectors", "none", "sum", "mean"])
def test_pairs(group: str) -> None:
    """In float64, where what is left of a difference is no rounding."""
    for name, old, new in pairs_of_detectors() if group == "detectors" else pairs(group):
        operands = boxes(SHAPE, grad=2, dtype=torch.float64)
        before, after = (results(loss, operands, upstream=3.0) for loss in (old, new))
        assert_close(after, before, rtol=1e-12, atol=1e-15, msg=partial("{}: {}".format, name))
        assert all(result.any() for result in after), name


def test_modules_without_arguments() -> None:
    old, new = nn.SmoothL1Loss(), SmoothL1Loss()
    assert (new.beta, new.reduction) == (old.beta, old.reduction)
    assert SmoothL1Loss(sigma=3.0).beta is None
