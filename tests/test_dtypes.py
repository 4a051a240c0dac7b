"""Every dtype and every mix: dtypes of results, accumulation, and gradients that do not underflow.

The arithmetic is float32, or float64 where an operand is float64, whatever is stored. The bounds
of `support.assert_near` ask for just that: a result in 16 bits may be off by its one rounding.
"""

import itertools

import pytest
import torch
from torch import Tensor

from fused_smoothl1 import smooth_l1_loss
from fused_smoothl1.functional import Reduction
from tests import oracle
from tests.support import assert_same, backend_set, check, coin, float64, gaussian

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
HALVES = [torch.float16, torch.bfloat16]
REAL = [*FLOATS, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.bool]


def _weights(*shape: int, seed: int, dtype: torch.dtype, device: str) -> Tensor:
    return (gaussian(*shape, seed=seed) * 2).round().abs().to(dtype).to(device)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize(("input", "target"), list(itertools.product(FLOATS, FLOATS)), ids=str)
def test_input_and_target(
    input: torch.dtype, target: torch.dtype, reduction: str, backend: str, device: str
) -> None:
    check(
        gaussian(13, 9, seed=1, dtype=input, device=device, requires_grad=True),
        gaussian(13, 9, seed=2, dtype=target, device=device, requires_grad=True),
        sigma=3.0,
        reduction=reduction,
        upstream=1.5,
    )


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("inside", "outside"), list(itertools.product(REAL, REAL)), ids=str)
def test_weights(
    inside: torch.dtype, outside: torch.dtype, dtype: torch.dtype, eager_backend: str, device: str
) -> None:
    """All combinations on the eager path; the kernel takes the diagonal and the mixes below."""
    _check_weights(inside, outside, dtype, device)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("weight", REAL, ids=str)
def test_weights_in_the_kernel(
    weight: torch.dtype, dtype: torch.dtype, triton_backend: str, device: str
) -> None:
    _check_weights(weight, weight, dtype, device)
    _check_weights(weight, torch.float32, dtype, device)
    _check_weights(torch.bfloat16, weight, dtype, device)


def _check_weights(
    inside: torch.dtype, outside: torch.dtype, dtype: torch.dtype, device: str
) -> None:
    inside_weights = _weights(13, 1, seed=3, dtype=inside, device=device)
    outside_weights = _weights(13, 9, seed=4, dtype=outside, device=device)
    for weights in (inside_weights, outside_weights):
        if weights.is_floating_point():
            weights.requires_grad_()
    for reduction in ("none", "sum"):
        check(
            gaussian(13, 9, seed=1, dtype=dtype, device=device, requires_grad=True),
            gaussian(13, 9, seed=2, dtype=dtype, device=device, requires_grad=True),
            inside_weights,
            outside_weights,
            reduction=reduction,
        )


@pytest.mark.parametrize("reduction", ["sum", "mean", "batchmean"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_reduced_loss_of_16_bits_is_float32(
    dtype: torch.dtype, reduction: Reduction, backend: str, device: str
) -> None:
    operands = [gaussian(6, 4, seed=seed, dtype=dtype, device=device) for seed in (1, 2, 3, 4)]
    assert smooth_l1_loss(*operands, reduction=reduction).dtype == torch.float32
    count = torch.tensor(3.0, dtype=dtype, device=device)
    if reduction == "sum":
        loss = smooth_l1_loss(*operands, reduction=reduction, normalizer=count)
        assert loss.dtype == torch.float32


@pytest.mark.parametrize(
    ("operands", "none", "reduced"),
    [
        (["float16", "float16"], "float16", "float32"),
        (["bfloat16", "bfloat16"], "bfloat16", "float32"),
        (["float16", "bfloat16"], "float32", "float32"),
        (["float16", "float16", "float32"], "float32", "float32"),
        (["float16", "float16", "bool", "bfloat16"], "float32", "float32"),
        (["float16", "float16", "int64", "uint8"], "float16", "float32"),
        (["bfloat16", "bfloat16", "int32", "int8"], "bfloat16", "float32"),
        (["float32", "float16"], "float32", "float32"),
        (["float16", "float64"], "float64", "float64"),
        (["float32", "float32", "float64"], "float64", "float64"),
        (["float16", "float16", "bool", "float64"], "float64", "float64"),
    ],
    ids=str,
)
@pytest.mark.parametrize("weight_shape", [(4,), ()], ids=["tensor", "0d"])
def test_promotion(
    operands: list[str],
    none: str,
    reduced: str,
    weight_shape: tuple[int, ...],
    backend: str,
    device: str,
) -> None:
    """By dtype alone: a 0-d tensor counts like any other, integers and masks never do."""
    tensors = [
        _weights(
            *((3, 4) if i < 2 else weight_shape), seed=i, dtype=getattr(torch, d), device=device
        )
        for i, d in enumerate(operands)
    ]
    assert smooth_l1_loss(*tensors, reduction="none").dtype == getattr(torch, none)
    assert smooth_l1_loss(*tensors, reduction="sum").dtype == getattr(torch, reduced)


def test_numbers_and_normalizers_do_not_promote(backend: str, device: str) -> None:
    input, target = (gaussian(6, dtype=torch.float16, seed=s, device=device) for s in (1, 2))
    assert smooth_l1_loss(input, target, None, 2, reduction="none").dtype == torch.float16
    wide = torch.tensor(2.0, dtype=torch.float64, device=device)
    assert smooth_l1_loss(input, target, reduction="sum", normalizer=wide).dtype == torch.float32


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_16_bit_sum_is_finite(dtype: torch.dtype, backend: str, device: str) -> None:
    """1e5 losses near 5: a float16 sum is inf, a bfloat16 sum stops growing at 2048."""
    n = 100_000 if backend == "eager" else 30_000
    input = gaussian(n, seed=1, scale=0.1, dtype=dtype, device=device) + 5.5
    target = torch.zeros(n, dtype=dtype, device=device)
    loss = smooth_l1_loss(input, target, reduction="sum")
    assert 4.5 * n < loss.item() < 6.0 * n
    check(input, target, reduction="sum")


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_difference_is_not_rounded(dtype: torch.dtype, backend: str, device: str) -> None:
    """100 - 0.03125 is no number of 16 bits; the loss of many such differences shows it."""
    input = torch.full((64,), 100.0, dtype=dtype, device=device, requires_grad=True)
    target = torch.full((64,), 0.03125, dtype=dtype, device=device)
    loss = smooth_l1_loss(input, target, reduction="mean")
    assert loss.item() == 100.0 - 0.03125 - 0.5


def test_float16_difference_beyond_its_range(backend: str, device: str) -> None:
    """60000 - (-60000) overflows in float16 and not in the sum."""
    input = torch.full((8,), 60000.0, dtype=torch.float16, device=device, requires_grad=True)
    check(input, -input.detach(), reduction="sum")
    small = torch.tensor(2.0**-4, dtype=torch.float16, device=device)
    loss = smooth_l1_loss(input, -input.detach(), small, reduction="none")
    assert loss.isfinite().all()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("shape", [(8, 125_000), (10, 211)], ids=["1e6", "small"])
def test_float16_gradient_does_not_underflow(
    shape: tuple[int, int], reduction: Reduction, backend: str, device: str
) -> None:
    """Outside weights 1/256, sigma 3, a gradient scaler's 65536: only their product is a float16.

    Slope times 1/256 / 1e6 is below float16's smallest number (6e-8); times 65536 it is not. The
    interpreter takes a small input with its divisor made up for in the weights.
    """
    if backend == "triton" and device == "cpu" and shape[0] * shape[1] > 10_000:
        pytest.skip("a million elements wait for a GPU: the interpreter takes 5 ms a program")
    n = shape[0] * shape[1]
    weight = 1 / 256 * (n / 1e6 if reduction == "mean" else 1.0)
    input = gaussian(*shape, seed=1, scale=0.05, dtype=torch.float16, device=device)
    target = gaussian(*shape, seed=2, scale=0.05, dtype=torch.float16, device=device)
    input.requires_grad_()
    target.requires_grad_()
    outside = torch.tensor(weight, dtype=torch.float32, device=device)
    upstream = 65536.0 if reduction == "mean" else 64.0
    check(input, target, None, outside, sigma=3.0, reduction=reduction, upstream=upstream)

    loss = smooth_l1_loss(input, target, None, outside, sigma=3.0, reduction=reduction)
    (gradient,) = torch.autograd.grad(loss, input, torch.full_like(loss, upstream))
    moved = (input != target).sum()
    assert gradient.count_nonzero() >= 0.999 * moved


def test_float16_through_a_scaled_loss(backend: str, device: str) -> None:
    """The way users meet it: (loss * scale).backward()."""
    operands = [gaussian(64, 4, seed=s, scale=0.05, device=device).half() for s in (1, 2)]
    gradients = []
    for dtype in (torch.float16, torch.float32):
        input = operands[0].detach().to(dtype, copy=True).requires_grad_()
        loss = smooth_l1_loss(input, operands[1].to(dtype), None, 2.0**-20, sigma=3.0)
        (loss * 65536.0).backward()
        assert input.grad is not None
        gradients.append(input.grad)
    assert torch.equal(gradients[0], gradients[1].half())


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_no_worse_than_the_composition(
    dtype: torch.dtype, reduction: Reduction, backend: str, device: str
) -> None:
    """Our error from the float64 truth is at most that of PyTorch's own loss on 16 bits."""
    input, target = (gaussian(40, 50, seed=s, dtype=dtype, device=device) for s in (1, 2))
    truth = oracle.smooth_l1(input, target, beta=0.3, reduction=reduction)
    ours = smooth_l1_loss(input, target, beta=0.3, reduction=reduction)
    theirs = torch.nn.functional.smooth_l1_loss(input, target, beta=0.3, reduction=reduction)
    error = abs(float64(ours) - truth.loss)
    assert error <= abs(float64(theirs) - truth.loss)
    assert error <= 40 * torch.finfo(torch.float32).eps * truth.loss


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_16_bit_results_agree(dtype: torch.dtype, device: str, triton_backend: str) -> None:
    """Rounding to 16 bits is to nearest even on both backends, whatever was rounded before."""
    results = []
    for name in ("eager", "triton"):
        with backend_set(name):
            input, target = (
                gaussian(11, 7, seed=s, dtype=dtype, device=device, requires_grad=True)
                for s in (1, 2)
            )
            weights = coin(11, 1, seed=3, device=device), gaussian(7, seed=4, device=device)
            loss = smooth_l1_loss(input, target, *weights, sigma=3.0, reduction="sum")
            results.append(torch.autograd.grad(loss, [input, target], torch.tensor(1.7).to(device)))
            loss = smooth_l1_loss(input, target, sigma=3.0, reduction="none")
            results[-1] += (loss.detach(),)
    for ours, theirs in zip(*results, strict=True):
        assert_same("loss or gradient", ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradient_narrower_than_the_loss(dtype: torch.dtype, backend: str, device: str) -> None:
    """The upstream gradient meets it in the wider type: either may be beyond the narrower's."""
    input = torch.tensor([0.0, 1.0, -3.0], dtype=dtype, device=device, requires_grad=True)
    target = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64, device=device)
    check(input, target, None, 1e-45, reduction="sum", upstream=1e45)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_float64_is_rounded_to_16_bits_by_float32(
    dtype: torch.dtype, backend: str, device: str
) -> None:
    """As PyTorch rounds it: what is hardly above the middle of two numbers goes to the even one."""
    eps = torch.finfo(dtype).eps
    weight = torch.tensor([1 + eps / 2 + 2.0**-40], dtype=torch.float64, device=device)
    input = torch.full((1,), 9.0, dtype=dtype, device=device, requires_grad=True)
    loss = smooth_l1_loss(input, torch.zeros_like(input), None, weight, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, input)
    assert torch.equal(gradient, weight.to(dtype))
