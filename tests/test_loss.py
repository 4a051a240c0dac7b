"""Every kind of launch, and what small random calls do not reach: sizes, offsets, and scales."""

from pathlib import Path
from typing import Any

import pytest
import torch

from fused_smoothl1 import smooth_l1_loss
from tests import support
from tests.support import CALLS, DEVICE, FLOATS, HAS_GPU, REDUCTIONS, boxes, check, coin, values

pytestmark = support.on_both


@pytest.mark.sanitize
@support.on_kernel
@pytest.mark.parametrize("rows", [1, 33, 1031])
@pytest.mark.parametrize("name", CALLS)
def test_every_kind_of_launch(name: str, rows: int) -> None:
    """For an upstream gradient of 1, another, and one for each element."""
    operands, options = support.call(name, rows)
    upstreams: list[Any] = [1.0, 3.7]
    if options["reduction"] == "none":  # a loss of every element gets a gradient for each
        view = support.catalogued(name, rows).upstream
        upstreams.append(view(values(*operands[0].shape)))
    for upstream in upstreams:
        check(*operands, upstream=upstream, **options)


@pytest.mark.smoke
@pytest.mark.parametrize("dtype", [torch.float32, torch.bool], ids=["float", "mask"])
def test_rpn(dtype: torch.dtype) -> None:
    """About 20 positives and 236 negatives of 21,546 anchors; outside weights 1/256 on both."""
    anchors = torch.stack([coin(2, 9, 38, 63, p=n / 21546) for n in (20, 236)])
    positive, negative = anchors.repeat_interleave(4, dim=2)
    weights = positive.to(dtype), (positive | negative) / 256
    input, target = boxes((2, 36, 38, 63), grad=2, scale=0.3)
    target.data *= positive
    for reduction in ("sum", "batchmean"):
        check(input, target, *weights, sigma=3.0, reduction=reduction)


@pytest.mark.smoke
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("size", [3, 1024, 1025, 8191])
def test_last_elements(size: int, dtype: torch.dtype) -> None:
    """The kernel's own mask of the last, partial block combines with the caller's masks."""
    check(*boxes((size,), (size,), (size,), grad=2, dtype=dtype), sigma=2.4, reduction="sum")
    is_last = torch.arange(size, device=DEVICE) == size - 1
    for mask in (is_last, ~is_last):
        input, target = boxes((size,), grad=2, dtype=dtype)
        input.data[~mask] = torch.nan
        check(input, target, mask, mask.to(torch.int8), upstream=torch.inf)
        check(input, target, None, mask, reduction="none", upstream=2.0)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_no_elements(reduction: Any) -> None:
    """They give 0, of which all derivatives are 0 too, where PyTorch's mean is NaN."""
    operands = boxes(0, (), (1, 4), grad=4)
    normalizer = torch.tensor(0, device=DEVICE) if reduction == "sum" else None
    for given in (operands[:2], operands):
        options: Any = {"reduction": reduction, "normalizer": normalizer}
        check(*given, **options)
        loss = smooth_l1_loss(*given, **options)
        first = torch.autograd.grad(loss.sum(), given, create_graph=True)
        second = torch.autograd.grad([gradient.sum() for gradient in first], given)
        assert not any(gradient.any() for gradient in second)


# The dtypes of input and target, what the sum is divided by, and the gradient that arrives.
SCALES = [(torch.float16, torch.float16, 256e6, 65536.0)]
SCALES += [(dtype, torch.float64, 1e45, 1e45) for dtype in FLOATS[1:]]


@pytest.mark.parametrize(("dtype", "wider", "divisor", "upstream"), SCALES, ids=str)
def test_scales_meet_before_they_are_rounded(
    dtype: torch.dtype, wider: torch.dtype, divisor: float, upstream: float
) -> None:
    """A million float16 elements with a GradScaler, each weighted by 1/256, are the first case.

    Divided by all this, a gradient underflows unless the upstream gradient was multiplied by first.
    """
    input = values(500, dtype=dtype, scale=0.1, grad=True)
    target = values(500, dtype=wider, scale=0.1, grad=True)
    options: dict[str, Any] = {"sigma": 3.0, "reduction": "sum", "upstream": upstream}
    for number in (divisor, torch.tensor(divisor, dtype=torch.float64, device=DEVICE)):
        check(input, target, **options, normalizer=number)
    for weight in (1 / divisor, torch.tensor(1 / divisor, dtype=torch.float64, device=DEVICE)):
        check(input, target, None, weight, **options)


# Sizes and strides of which the furthest element lies 2³¹ elements in: by the product of index
# and stride, by one stride alone, and by a sum of two products that each fit 32 bits.
FAR = [((3, 4), (2**30, 1)), ((2, 4), (2**31, 1)), ((2, 2, 4), (2**30, 2**30 + 8, 1))]


@pytest.mark.parametrize("operand", range(4), ids=support.OPERANDS[:4])
@pytest.mark.parametrize(("shape", "strides"), FAR, ids=str)
@pytest.mark.usefixtures("unpoisoned")
def test_offsets_beyond_32_bits(shape: Any, strides: Any, operand: int, tmp_path: Path) -> None:
    """A view of few elements over a storage of 8 GiB: a sparse file, of which few pages exist."""
    size, file = 2**31 + 64, str(tmp_path / "sparse")
    storage = torch.empty(size, device=DEVICE) if HAS_GPU else torch.from_file(file, True, size)
    operands = [values(*shape) for _ in range(4)]
    operands[operand] = storage.as_strided(shape, strides).copy_(operands[operand])
    for reduction in ("none", "sum"):
        trained = [t.detach().requires_grad_(i < 2) for i, t in enumerate(operands)]
        check(*trained, beta=0.5, reduction=reduction, upstream=1.5)


@support.on_kernel
@pytest.mark.skipif(
    not HAS_GPU or torch.cuda.get_device_properties(0).total_memory < 40 * 2**30,
    reason="waits for a GPU with 40 GiB: 2**31 elements and their gradient",
)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_more_than_2_31_elements(reduction: str, masked: bool, unpoisoned: None) -> None:
    """Indices beyond int32 in the loss, its gradient, and the product with 2."""
    n, places = 2**31 + 4099, [2**31 + 4098, 2**31 - 1]
    input = torch.zeros(n, dtype=torch.bfloat16, device=DEVICE)
    input[places] = torch.tensor([3.0, 0.5]).to(input)
    target, mask = torch.zeros_like(input[:1]).expand(n), input != 0 if masked else None
    operands = [input.requires_grad_(), target, mask]
    loss, gradient = support.results(smooth_l1_loss, operands, upstream=2.0, reduction=reduction)
    assert loss.sum(dtype=torch.float32) == 2.5 + 0.125
    assert gradient[places].tolist() == [2.0, 1.0]
    assert gradient.count_nonzero() == 2
