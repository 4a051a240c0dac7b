"""Empty inputs give 0 that is connected to the graph.

PyTorch's `mean` of nothing is NaN, and one image without positives then kills the training step.
"""

from typing import Any

import pytest
import torch

from fused_smoothl1 import smooth_l1_loss
from tests import support
from tests.support import DEVICE, FLOATS, REDUCTIONS, Shape, boxes, check, results

pytestmark = support.on_both

EMPTY = [(0,), (0, 4), (4, 0), (0, 0), (0, 3, 5), (2, 0, 5), (2, 3, 0), (2, 3, 5, 0, 7)]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", EMPTY, ids=str)
def test_empty_is_a_connected_zero(shape: Shape, reduction: str, dtype: torch.dtype) -> None:
    for upstream in (1.0, 2.0):
        operands = boxes(shape, grad=2, dtype=dtype)
        loss = check(*operands, reduction=reduction, upstream=upstream)["loss"]
        assert (loss == 0).all()


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [(), (1,), (4,), (1, 4), (0, 1), (1, 1), (0, 4)], ids=str)
def test_weights_of_an_empty_input(shape: Shape, reduction: Any) -> None:
    """Learned weights get a gradient too: zeros in their own shape, for nothing was summed."""
    for grad in ([True] * 4, [False] * 3 + [True]):
        operands = boxes(0, shape, shape, grad=grad)
        check(*operands, reduction=reduction, upstream=2.0)
        learned = [t for t in operands if t.requires_grad]
        loss = smooth_l1_loss(*operands, reduction=reduction).sum()
        first = torch.autograd.grad(loss, learned, create_graph=True)
        total: Any = sum(g.square().sum() for g in (loss, *first))
        second = torch.autograd.grad(total, learned)
        assert all((gradient == 0).all() for gradient in second)
    mask = torch.ones(shape, dtype=torch.bool, device=DEVICE)
    check(*boxes(0, mask, mask.to(torch.uint8)), reduction=reduction)


@pytest.mark.parametrize("count", [0, 0.0, 5])
def test_normalizer_of_an_empty_input(count: float) -> None:
    """No boxes, and so no positives: 0 / 0 is what the user wants not to see."""
    normalizer = torch.tensor(count, device=DEVICE)
    loss, _ = results(smooth_l1_loss, boxes(0), reduction="sum", normalizer=normalizer)
    assert loss == 0
