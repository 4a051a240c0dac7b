"""Empty inputs give 0 that is connected to the graph; inputs without dimensions are ordinary.

PyTorch's `mean` of nothing is NaN, and one image without positives then kills the training step.
"""

import pytest
import torch

from fused_smoothl1 import SmoothL1Loss, smooth_l1_loss
from fused_smoothl1.functional import Reduction
from tests.support import check, gaussian

REDUCED: list[Reduction] = ["sum", "mean", "batchmean"]
EMPTY = [(0,), (0, 4), (4, 0), (0, 0), (0, 3, 5), (2, 0, 5), (2, 3, 0), (2, 3, 5, 0, 7)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("reduction", REDUCED)
@pytest.mark.parametrize("shape", EMPTY, ids=str)
def test_empty_is_a_connected_zero(
    shape: tuple[int, ...], reduction: Reduction, dtype: torch.dtype, backend: str, device: str
) -> None:
    input = torch.empty(shape, dtype=dtype, device=device, requires_grad=True)
    target = torch.empty(shape, dtype=dtype, device=device, requires_grad=True)
    for upstream in (1.0, 2.0):
        check(input, target, reduction=reduction, upstream=upstream)
    loss = smooth_l1_loss(input, target, reduction=reduction)
    assert loss.item() == 0.0
    assert loss.requires_grad
    loss.backward()
    for operand in (input, target):
        assert operand.grad is not None
        assert operand.grad.shape == shape


@pytest.mark.parametrize("shape", EMPTY, ids=str)
def test_none_of_empty_is_empty(shape: tuple[int, ...], backend: str, device: str) -> None:
    input = torch.empty(shape, device=device, requires_grad=True)
    check(input, torch.empty(shape, device=device), reduction="none")
    loss = smooth_l1_loss(input, torch.empty(shape, device=device), reduction="none")
    assert loss.shape == shape
    assert loss.requires_grad
    loss.sum().backward()
    assert input.grad is not None


@pytest.mark.parametrize("reduction", ["none", *REDUCED])
@pytest.mark.parametrize("weight", [(), (1,), (4,), (1, 4), (0, 1), (1, 1), (0, 4)], ids=str)
def test_weights_of_an_empty_input(
    weight: tuple[int, ...], reduction: str, backend: str, device: str
) -> None:
    """Learned weights get a gradient too: zeros in their own shape, for nothing was summed."""
    inside = gaussian(*weight, seed=3, device=device, requires_grad=True)
    outside = gaussian(*weight, seed=4, device=device, requires_grad=True)
    input = torch.empty(0, 4, device=device, requires_grad=True)
    target = torch.empty(0, 4, device=device)
    check(input, target, inside, outside, reduction=reduction, upstream=2.0)
    mask = torch.ones(weight, dtype=torch.bool, device=device)
    check(input, target, mask, mask.to(torch.uint8), reduction=reduction)


def test_only_the_weights_require_a_gradient(backend: str, device: str) -> None:
    outside = torch.ones(4, device=device, requires_grad=True)
    empty = torch.empty(0, 4, device=device)
    smooth_l1_loss(empty, empty, None, outside).backward()
    assert outside.grad is not None
    assert torch.equal(outside.grad, torch.zeros(4, device=device))


@pytest.mark.parametrize("count", [0, 0.0, 5])
def test_normalizer_of_an_empty_input(count: float, backend: str, device: str) -> None:
    """No boxes, and so no positives: 0 / 0 is what the user wants not to see."""
    input = torch.empty(0, 4, device=device, requires_grad=True)
    positives = torch.tensor(count, device=device)
    target = torch.empty(0, 4, device=device)
    loss = smooth_l1_loss(input, target, reduction="sum", normalizer=positives)
    assert loss.item() == 0.0
    loss.backward()
    assert input.grad is not None


def test_empty_step_does_not_disturb_a_batch(backend: str, device: str) -> None:
    """The sum over images, one of them without boxes, has the gradient of the others."""
    layer = torch.nn.Linear(3, 4).to(device)
    full, none = gaussian(5, 3, seed=1, device=device), torch.empty(0, 3, device=device)
    criterion = SmoothL1Loss(sigma=3.0)
    criterion(layer(full), torch.zeros(5, 4, device=device)).backward()
    assert layer.weight.grad is not None
    expected = layer.weight.grad.clone()
    layer.zero_grad()
    total = criterion(layer(full), torch.zeros(5, 4, device=device))
    total = total + criterion(layer(none), torch.zeros(0, 4, device=device))
    total.backward()
    assert torch.equal(layer.weight.grad, expected)


def test_double_backward_of_empty(backend: str, device: str) -> None:
    input = torch.empty(0, 4, device=device, requires_grad=True)
    outside = torch.ones(4, device=device, requires_grad=True)
    for reduction in ("none", *REDUCED):
        loss = smooth_l1_loss(input, torch.empty_like(input), None, outside, reduction=reduction)
        first = torch.autograd.grad(loss.sum(), [input, outside], create_graph=True)
        total = loss.sum() + sum(g.pow(2).sum() for g in first)
        for gradient in torch.autograd.grad(total, [input, outside]):
            assert (gradient == 0).all()


@pytest.mark.parametrize("reduction", ["none", *REDUCED])
@pytest.mark.parametrize("weights", ["none", "number", "0d", "mask", "bool"])
def test_input_without_dimensions(weights: str, reduction: str, backend: str, device: str) -> None:
    """A number as a tensor; `batchmean` has no batch to divide by, so it divides by 1."""
    weight = {
        "none": None,
        "number": None,
        "0d": gaussian(seed=3, device=device, requires_grad=True),
        "mask": torch.tensor(7, dtype=torch.uint8, device=device),
        "bool": torch.tensor(False, device=device),
    }[weights]
    check(
        gaussian(seed=1, device=device, requires_grad=True),
        gaussian(seed=2, device=device, requires_grad=True),
        weight,
        -1.5 if weights == "number" else None,
        sigma=0.7,
        reduction=reduction,
        upstream=1.5,
    )
