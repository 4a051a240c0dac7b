"""What the README's table of comparison says of PyTorch's own losses, and of this one.

A test for each row. What it says of mmdetection stands in that library's source.
"""

import inspect
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 (the name PyTorch users know it by)

from bench.traffic import Traffic
from fused_smoothl1 import smooth_l1_loss
from fused_smoothl1.functional import Reduction
from tests.support import gaussian

Loss = Callable[..., Tensor]
HUBER: Any = F.huber_loss  # PyTorch's type annotations lack its weight
THEIRS: list[Any] = [F.smooth_l1_loss, HUBER]
ALL: list[Any] = [smooth_l1_loss, *THEIRS]


def _is_ours(loss: Loss) -> bool:
    return loss is smooth_l1_loss


def test_parameters() -> None:
    plain, huber = (set(inspect.signature(loss).parameters) for loss in THEIRS)
    assert "beta" in plain
    assert not {"sigma", "weight", "normalizer"} & plain
    assert {"delta", "weight"} <= huber
    assert not {"beta", "sigma", "normalizer"} & huber
    ours = set(inspect.signature(smooth_l1_loss).parameters)
    assert {"sigma", "beta", "inside_weights", "outside_weights", "normalizer"} <= ours


@pytest.mark.parametrize("loss", ALL)
def test_reductions(loss: Loss, device: str) -> None:
    input, target = gaussian(5, 4, seed=1, device=device), gaussian(5, 4, seed=2, device=device)
    losses = loss(input, target, reduction="none")
    assert losses.shape == input.shape
    torch.testing.assert_close(loss(input, target, reduction="sum"), losses.sum())
    torch.testing.assert_close(loss(input, target, reduction="mean"), losses.mean())
    if _is_ours(loss):
        batchmean = loss(input, target, reduction="batchmean")
        torch.testing.assert_close(batchmean, losses.sum(1).mean())
    else:
        with pytest.raises(ValueError, match="batchmean"):
            loss(input, target, reduction="batchmean")


def test_weights_broadcast(device: str) -> None:
    input, column = gaussian(6, 4, seed=1, device=device), gaussian(6, 1, seed=2, device=device)
    weights: dict[str, Any] = {"inside_weights": column, "outside_weights": column.t()[:, :4]}
    full = {name: tensor.expand(6, 4).clone() for name, tensor in weights.items()}
    target = torch.zeros_like(input)
    found = smooth_l1_loss(input, target, **weights)
    torch.testing.assert_close(found, smooth_l1_loss(input, target, **full))


@pytest.mark.parametrize("loss", ALL)
def test_double_backward(loss: Loss, device: str) -> None:
    """The second derivative is 1 where the loss is quadratic, and 0 elsewhere."""
    input = torch.tensor([0.25, -0.5, 3.0, -2.0], device=device, requires_grad=True)
    value = loss(input, torch.zeros_like(input), reduction="sum")
    (gradient,) = torch.autograd.grad(value, input, create_graph=True)
    (second,) = torch.autograd.grad(gradient.sum(), input)
    assert second.tolist() == [1.0, 1.0, 0.0, 0.0]


@pytest.mark.parametrize("where", ["cpu", "device"])
@pytest.mark.parametrize("loss", ALL)
def test_devices(loss: Loss, where: str, device: str) -> None:
    place = device if where == "device" else where
    input = torch.tensor([0.5, -2.0], device=place, requires_grad=True)
    value = loss(input, torch.zeros_like(input), reduction="sum")
    value.backward()
    assert value.item() == 0.125 + 1.5
    assert input.grad is not None
    assert input.grad.tolist() == [0.5, -1.0]


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_launches(reduction: Reduction, device: str, launches: list[str]) -> None:
    input = gaussian(6, 4, seed=1, device=device, requires_grad=True)
    target = torch.zeros_like(input)
    losses = smooth_l1_loss(input, target, reduction=reduction)
    losses.backward(torch.full_like(losses, 1.5))
    # (What is small is multiplied by PyTorch.)
    assert len(launches) == (2 if reduction == "none" else 1)
    for loss in THEIRS:
        with Traffic() as seen:
            losses = loss(input, target, reduction=reduction)
            losses.backward(torch.full_like(losses, 1.5))
        assert len(seen.kernels) > 2


def test_huber_is_scaled_by_delta(device: str) -> None:
    input, target = gaussian(50, seed=1, device=device), gaussian(50, seed=2, device=device)
    ours = smooth_l1_loss(input, target, beta=0.5)
    torch.testing.assert_close(0.5 * ours, F.huber_loss(input, target, delta=0.5))


def test_beta_0(device: str) -> None:
    input, target = gaussian(50, seed=1, device=device), gaussian(50, seed=2, device=device)
    expected = F.l1_loss(input, target)
    torch.testing.assert_close(smooth_l1_loss(input, target, beta=0.0), expected)
    torch.testing.assert_close(F.smooth_l1_loss(input, target, beta=0.0), expected)
    with pytest.raises((RuntimeError, ValueError)):
        F.huber_loss(input, target, delta=0.0)


@pytest.mark.parametrize("loss", ALL)
def test_transition_of_each_element(loss: Loss, device: str) -> None:
    input = gaussian(6, seed=1, device=device)
    values = torch.ones(6, device=device, requires_grad=True)
    options = {"delta" if loss is HUBER else "beta": values}
    if _is_ours(loss):
        loss(input, torch.zeros_like(input), **options).backward()
        assert values.grad is not None
    else:
        with pytest.raises((TypeError, RuntimeError)):
            loss(input, torch.zeros_like(input), **options)


def test_weights_of_huber_have_full_size(device: str) -> None:
    input, weights = gaussian(6, 4, seed=1, device=device), torch.ones(6, 1, device=device)
    smooth_l1_loss(input, torch.zeros_like(input), outside_weights=weights)
    with pytest.raises(ValueError, match="same size"):
        HUBER(input, torch.zeros_like(input), weight=weights)


def test_weights_of_huber_have_a_gradient(device: str) -> None:
    input, weights = gaussian(6, seed=1, device=device), torch.ones(6, device=device)
    HUBER(input, torch.zeros_like(input), weight=weights.requires_grad_()).backward()
    ours = weights.detach().clone().requires_grad_()
    smooth_l1_loss(input, torch.zeros_like(input), outside_weights=ours).backward()
    torch.testing.assert_close(ours.grad, weights.grad)


@pytest.mark.parametrize("loss", ALL)
def test_empty_mean(loss: Loss, device: str) -> None:
    value = loss(torch.zeros(0, device=device), torch.zeros(0, device=device)).item()
    assert value == 0.0 if _is_ours(loss) else math.isnan(value)


@pytest.mark.parametrize("loss", ALL)
def test_sum_of_16_bit_values(loss: Loss, device: str) -> None:
    input = torch.full((100_000,), 2.0, dtype=torch.float16, device=device)
    value = loss(input, torch.zeros_like(input), reduction="sum")
    if _is_ours(loss):
        assert (value.dtype, value.item()) == (torch.float32, 150_000.0)
    else:
        assert (value.dtype, value.item()) == (torch.float16, math.inf)


@pytest.mark.parametrize("loss", ALL)
def test_shapes_that_differ(loss: Loss, device: str) -> None:
    input, target = torch.zeros(6, 4, device=device), torch.zeros(1, 4, device=device)
    if _is_ours(loss):
        with pytest.raises(ValueError, match="shape"):
            loss(input, target)
    else:
        with pytest.warns(UserWarning, match="size"):
            loss(input, target)


@pytest.mark.parametrize("loss", ALL)
def test_nan_behind_a_mask(loss: Loss, device: str) -> None:
    """Ours takes the mask; with theirs one multiplies, or fills the loss and waits for a NaN."""
    input = torch.tensor([math.nan, 1.0], device=device, requires_grad=True)
    target, mask = torch.zeros(2, device=device), torch.tensor([False, True], device=device)
    if _is_ours(loss):
        value = loss(input, target, mask, reduction="sum")
    else:
        value = (loss(input, target, reduction="none") * mask).sum()
    (gradient,) = torch.autograd.grad(value, input)
    assert value.isfinite().item() == gradient.isfinite().all().item() == _is_ours(loss)
