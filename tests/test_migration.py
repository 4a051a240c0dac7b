"""Coming from a detector's loss: the old function and the new one agree in loss and gradients.

mmdetection's and the Faster R-CNN ports' functions are written anew from what they publish, so that
no detector has to be installed. (Pairs with PyTorch's losses are in the README, whose blocks run as
tests.)
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.testing import assert_close

from fused_smoothl1 import smooth_l1_loss
from tests import support
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


def pairs() -> Pairs:
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


def test_pairs() -> None:
    """In float64, where what is left of a difference is no rounding."""
    for name, old, new in pairs():
        operands = boxes(SHAPE, grad=2, dtype=torch.float64)
        before, after = (results(loss, operands, upstream=3.0) for loss in (old, new))
        assert_close(after, before, rtol=1e-12, atol=1e-15, msg=partial("{}: {}".format, name))
        assert all(result.any() for result in after), name
