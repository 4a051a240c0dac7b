"""The loss and the gradients of input and target equal the oracle's.

The shapes, and what each is for:
- (10, 5, 1, 1): the Caffe layer's own test, with its weights, sigma and upstream gradient;
- (1, 36, 38, 63): the regression targets of an RPN on a 600x1000 image, many thread blocks;
- (128, 84): the regression targets of a detection head, 21 classes of 4 coordinates;
- 1, 3, 127, 1023, 1025, 4099, 8193: one element, less than a vector access, and one off every
  power of two that a block size may be, so that the masked tail is taken;
- (4, 3, 5, 7), (6, 5): every way of broadcasting, with no two sizes alike that could be swapped.
"""

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fused_smoothl1 import SmoothL1Loss, smooth_l1_loss
from fused_smoothl1.functional import Reduction
from tests.support import assert_same, check, coin, gaussian

REDUCTIONS = ["none", "sum", "mean", "batchmean"]


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_case_of_the_caffe_layer(reduction: str, weighted: bool, backend: str, device: str) -> None:
    """TestGradient of test_smooth_L1_loss_layer.cpp: weights of both signs, sigma 2.4."""
    inside, outside = (
        gaussian(10, 5, 1, 1, seed=seed, scale=1.5, device=device) if weighted else None
        for seed in (3, 4)
    )
    check(
        gaussian(10, 5, 1, 1, seed=1, device=device, requires_grad=True),
        gaussian(10, 5, 1, 1, seed=2, device=device, requires_grad=True),
        inside,
        outside,
        sigma=2.4,
        reduction=reduction,
        upstream=3.7,
    )


@pytest.mark.smoke
@pytest.mark.parametrize("reduction", ["sum", "batchmean"])
@pytest.mark.parametrize("kind", ["float", "mask"])
def test_rpn(kind: str, reduction: str, backend: str, device: str) -> None:
    """20 positives and 236 negatives of 21,546 anchors; outside weights 1/256 on both."""
    shape = (1, 36, 38, 63)
    positive = coin(1, 9, 38, 63, seed=3, p=20 / 21546).repeat_interleave(4, dim=1)
    sampled = positive | coin(1, 9, 38, 63, seed=4, p=236 / 21546).repeat_interleave(4, dim=1)
    inside, outside = positive.to(device), (sampled / 256).to(device)
    check(
        gaussian(*shape, seed=1, scale=0.3, device=device, requires_grad=True),
        (gaussian(*shape, seed=2) * positive).to(device).requires_grad_(),
        inside.float() if kind == "float" else inside,
        outside,
        sigma=3.0,
        reduction=reduction,
    )


@pytest.mark.smoke
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_head(reduction: str, backend: str, device: str) -> None:
    """A quarter of the rows are foreground, each with the 4 columns of its class active."""
    rows, classes = 128, 21
    label = torch.randint(1, classes, (rows,), generator=torch.Generator().manual_seed(5))
    foreground = torch.arange(rows) < rows // 4
    active = torch.nn.functional.one_hot(label, classes) * foreground[:, None]
    weights = active.float().repeat_interleave(4, dim=1).to(device)
    check(
        gaussian(rows, 4 * classes, seed=1, scale=2, device=device, requires_grad=True),
        gaussian(rows, 4 * classes, seed=2, device=device, requires_grad=True),
        weights,
        weights.clone(),
        sigma=1.0,
        reduction=reduction,
    )


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("size", [1, 3, 127, 1023, 1025, 4099, 8193])
def test_odd_sizes(size: int, weighted: bool, backend: str, device: str) -> None:
    inside, outside = (
        gaussian(size, seed=seed, device=device) if weighted else None for seed in (3, 4)
    )
    check(
        gaussian(size, seed=1, device=device, requires_grad=True),
        gaussian(size, seed=2, device=device, requires_grad=True),
        inside,
        outside,
        beta=0.7,
        reduction="sum",
        upstream=-0.6,
    )


def test_size_of_several_eager_blocks(eager_backend: str, device: str) -> None:
    """Larger than any block that a CPU keeps in its cache, and not a multiple of one."""
    shape = (3, 2**18 + 11)
    check(
        gaussian(*shape, seed=1, device=device, requires_grad=True),
        gaussian(*shape, seed=2, device=device, requires_grad=True),
        coin(3, 1, seed=1, device=device),
        gaussian(shape[1], seed=4, device=device),
        sigma=3.0,
        reduction="mean",
        upstream=2.0,
    )


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("which", ["input", "target", "neither"])
def test_one_gradient_alone(which: str, reduction: str, backend: str, device: str) -> None:
    check(
        gaussian(5, 7, seed=1, device=device, requires_grad=which == "input"),
        gaussian(5, 7, seed=2, device=device, requires_grad=which == "target"),
        gaussian(5, 1, seed=3, device=device),
        reduction=reduction,
        upstream=1.7,
    )


NORMALIZERS = {
    "int": 7,
    "float": 0.3,
    "float32": torch.tensor(7.5),
    "float64": torch.tensor(7.5, dtype=torch.float64),
    "float16": torch.tensor(7.5, dtype=torch.float16),
    "int64": torch.tensor(7),
    "int32": torch.tensor(7, dtype=torch.int32),
}


@pytest.mark.parametrize("upstream", [1.0, -2.5])
@pytest.mark.parametrize("normalizer", NORMALIZERS.values(), ids=NORMALIZERS.keys())
def test_normalizer(normalizer: Any, upstream: float, backend: str, device: str) -> None:
    if isinstance(normalizer, Tensor):
        normalizer = normalizer.to(device)
    check(
        gaussian(33, 4, seed=1, device=device, requires_grad=True),
        gaussian(33, 4, seed=2, device=device, requires_grad=True),
        coin(33, 1, seed=3, device=device),
        gaussian(4, seed=4, device=device),
        sigma=3.0,
        reduction="sum",
        normalizer=normalizer,
        upstream=upstream,
    )


@pytest.mark.parametrize("kind", [int, Fraction, np.float32, np.int64])
def test_numbers_of_any_kind(kind: Any, backend: str, device: str) -> None:
    """Whatever is a real number to Python serves wherever a number does."""
    pair = gaussian(9, 4, seed=1, device=device), gaussian(9, 4, seed=2, device=device)

    def losses(number: Any) -> list[Tensor]:
        return [
            smooth_l1_loss(*pair, None, number(3), sigma=number(2)),
            smooth_l1_loss(*pair, beta=number(2), reduction="sum", normalizer=number(5)),
        ]

    torch.testing.assert_close(losses(kind), losses(float), rtol=0, atol=0)


# Weights that broadcast to (4, 3, 5, 7), by what they are.
WEIGHTS: dict[str, tuple[int, ...] | float | int] = {
    "int": 3,
    "float": -0.4,
    "zero": 0,
    "0d": (),
    "scalar_of_4_dims": (1, 1, 1, 1),
    "batch": (4, 1, 1, 1),
    "batch_map": (4, 1, 5, 7),
    "channel": (3, 1, 1),
    "row": (5, 1),
    "last": (7,),
    "batch_and_last": (4, 1, 1, 7),
    "full": (4, 3, 5, 7),
}


def _is_tensor(name: str) -> bool:
    return isinstance(WEIGHTS[name], tuple)


def _weight(name: str, seed: int, device: str) -> Any:
    shape = WEIGHTS[name]
    return gaussian(*shape, seed=seed, device=device) if isinstance(shape, tuple) else shape


@pytest.mark.parametrize(
    ("role", "name"),
    [(r, n) for r in ("inside", "outside") for n in WEIGHTS if r == "outside" or _is_tensor(n)],
)
def test_each_weight_alone(role: str, name: str, backend: str, device: str) -> None:
    weight = _weight(name, 3, device)
    for reduction in REDUCTIONS:
        check(
            gaussian(4, 3, 5, 7, seed=1, device=device, requires_grad=True),
            gaussian(4, 3, 5, 7, seed=2, device=device, requires_grad=True),
            weight if role == "inside" else None,
            weight if role == "outside" else None,
            sigma=1.3,
            reduction=reduction,
            upstream=1.9,
        )


@pytest.mark.parametrize("outside", WEIGHTS)
@pytest.mark.parametrize("inside", ["0d", "batch", "last", "full", "batch_map"])
def test_both_weights(inside: str, outside: str, backend: str, device: str) -> None:
    check(
        gaussian(4, 3, 5, 7, seed=1, device=device, requires_grad=True),
        gaussian(4, 3, 5, 7, seed=2, device=device, requires_grad=True),
        _weight(inside, 3, device),
        _weight(outside, 4, device),
        sigma=1.3,
        reduction="sum",
        upstream=1.9,
    )


@pytest.mark.parametrize("inside", [(6, 1), (1, 5), (5,), (6, 5), (1, 1), ()], ids=str)
@pytest.mark.parametrize("outside", [(6, 1), (1, 5), None], ids=str)
def test_weights_of_boxes(
    inside: tuple[int, ...], outside: tuple[int, ...] | None, backend: str, device: str
) -> None:
    check(
        gaussian(6, 5, seed=1, device=device, requires_grad=True),
        gaussian(6, 5, seed=2, device=device, requires_grad=True),
        gaussian(*inside, seed=3, device=device),
        None if outside is None else gaussian(*outside, seed=4, device=device),
        reduction="batchmean",
    )


@pytest.mark.parametrize("beta", [0.0, 1e-6, 1 / 9, 0.7, 1.0, 30.0, 1e6])
def test_beta(beta: float, backend: str, device: str) -> None:
    """From L1 to a parabola; at 0 the gradient is sign(x), 0 at 0."""
    input = gaussian(2, 65, seed=1, device=device)
    input[0, ::5] = 0.25
    target = gaussian(2, 65, seed=2, device=device)
    target[0, ::5] = 0.25
    for reduction in ("none", "mean"):
        check(
            input.clone().requires_grad_(),
            target.clone().requires_grad_(),
            gaussian(2, 1, seed=3, device=device),
            beta=beta,
            reduction=reduction,
        )


@pytest.mark.parametrize(
    ("sigma", "beta"), [(1.0, 1.0), (3.0, 1 / 9), (0.5, 4.0), (math.inf, 0.0), (None, 1.0)]
)
def test_sigma_is_beta(sigma: float | None, beta: float, backend: str, device: str) -> None:
    input = gaussian(3, 50, seed=1, device=device)
    target = gaussian(3, 50, seed=2, device=device)
    by_sigma = smooth_l1_loss(input, target, sigma=sigma, reduction="none")
    by_beta = smooth_l1_loss(input, target, beta=beta, reduction="none")
    assert_same("sigma and beta", by_sigma, by_beta)


@pytest.mark.parametrize("sigma", [1e12, 1e20, 1e25, 1e200])
def test_huge_sigma_is_l1(sigma: float, backend: str, device: str) -> None:
    """1 / sigma² may be subnormal in float32, or no number of its own."""
    input = gaussian(40, seed=1, device=device, requires_grad=True)
    target = gaussian(40, seed=2, device=device)
    target[::4] = input.detach()[::4]
    for reduction in ("none", "sum"):
        check(input, target, sigma=sigma, reduction=reduction)


@pytest.mark.parametrize("sigma", [1e-18, 1e-25, 1e-200])
def test_tiny_sigma_is_zero(sigma: float, backend: str, device: str) -> None:
    """1 / sigma² may be too large for float32 or even for float64."""
    input = gaussian(40, seed=1, device=device, requires_grad=True)
    target = gaussian(40, seed=2, device=device)
    loss = smooth_l1_loss(input, target, sigma=sigma, reduction="sum")
    loss.backward()
    assert input.grad is not None
    for value in (loss, *input.grad):
        assert abs(value.item()) < 1e-33


def test_torch_agrees_without_weights(backend: str, device: str) -> None:
    """Users come from F.smooth_l1_loss: without weights and with beta it is the same function."""
    input = gaussian(8, 33, seed=1, device=device)
    target = gaussian(8, 33, seed=2, device=device)
    for reduction in ("none", "sum", "mean"):
        for beta in (0.0, 0.3, 1.0):
            torch.testing.assert_close(
                smooth_l1_loss(input, target, beta=beta, reduction=reduction),
                torch.nn.functional.smooth_l1_loss(input, target, beta=beta, reduction=reduction),
            )


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_module_is_the_function(reduction: Reduction, backend: str, device: str) -> None:
    operands = (
        gaussian(6, 4, seed=1, device=device),
        gaussian(6, 4, seed=2, device=device),
        coin(6, 1, seed=1, device=device),
        gaussian(6, 4, seed=4, device=device),
    )
    module = SmoothL1Loss(sigma=3.0, reduction=reduction)
    expected = smooth_l1_loss(*operands, sigma=3.0, reduction=reduction)
    assert torch.equal(module(*operands), expected)
    assert not list(module.parameters())
    assert not module.state_dict()


def test_module_takes_the_normalizer_in_its_call(backend: str, device: str) -> None:
    input = gaussian(6, 4, seed=1, device=device)
    target = gaussian(6, 4, seed=2, device=device)
    count = torch.tensor(5, device=device)
    module = SmoothL1Loss(beta=0.5, reduction="sum")
    expected = smooth_l1_loss(input, target, beta=0.5, reduction="sum", normalizer=count)
    assert torch.equal(module(input, target, normalizer=count), expected)


def test_sigma_of_another_precision(backend: str, device: str) -> None:
    """A number of NumPy is a number: what follows from it is not computed in its few digits."""
    operands = [gaussian(9, seed=seed, dtype=torch.float64, device=device) for seed in (1, 2)]
    sigma: Any = np.float16(3)
    assert_same(
        "loss", smooth_l1_loss(*operands, sigma=sigma), smooth_l1_loss(*operands, sigma=3.0)
    )
