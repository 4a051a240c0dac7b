"""Any strides work, no operand is changed, and the gradient has the input's memory format.

Each layout is one that detection code makes: channels_last feature maps, slices of a head's
output, the permute from (B, C, H, W) to anchors, a transpose, views that start at an odd offset,
and stride-0 expansions. Every operand has the shape (4, 3, 6, 8), in which no permutation of the
sizes looks like another. (Hypothesis draws others, in test_properties.py.)
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_smoothl1 import smooth_l1_loss
from fused_smoothl1.functional import Reduction
from tests.support import DEVICE, HAS_GPU, NAMES, Shape, check, coin, on_both, on_kernel, values

SHAPE = (4, 3, 6, 8)
# What lies in memory, and what is seen of it.
LAYOUTS: dict[str, tuple[Shape, Callable[[Tensor], Tensor]]] = {
    "contiguous": (SHAPE, lambda t: t),
    "channels_last": ((4, 6, 8, 3), lambda t: t.permute(0, 3, 1, 2)),
    "columns": ((4, 3, 6, 13), lambda t: t[..., 2:10]),
    "every_second": ((4, 3, 6, 16), lambda t: t[..., ::2]),
    "every_third_row": ((4, 9, 6, 8), lambda t: t[:, 1::3]),
    "permuted": ((6, 4, 8, 3), lambda t: t.permute(1, 3, 0, 2)),
    "transposed": ((4, 3, 8, 6), lambda t: t.transpose(2, 3)),
    "permuted_columns": ((3, 8, 4, 10), lambda t: t.permute(2, 0, 3, 1)[:, :, 2:8]),
    "unaligned": ((577,), lambda t: t[1:].view(SHAPE)),
    "expanded_first": ((1, 3, 6, 8), lambda t: t.expand(SHAPE)),
    "expanded_last": ((4, 3, 6, 1), lambda t: t.expand(SHAPE)),
    "one_element": ((1, 1, 1, 1), lambda t: t.expand(SHAPE)),
}


def laid_out(layout: str) -> Tensor:
    sizes, view = LAYOUTS[layout]
    return view(values(*sizes))


@on_both
@pytest.mark.parametrize("alone", [*NAMES[:4], None])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_operands(layout: str, alone: str | None) -> None:
    """One or all of them; the results follow the input, whoever's gradient it is."""
    tensors = [laid_out(layout if alone in (name, None) else "contiguous") for name in NAMES[:4]]
    input, target, inside, outside = tensors
    check(input, target, inside > 0, (outside > 0).to(torch.uint8), reduction="sum")
    for reduction in ("none", "sum"):
        for trained in ((0, 1), (NAMES.index(alone or "target"),), (0, 1, 2, 3)):
            operands = [t.detach().requires_grad_(i in trained) for i, t in enumerate(tensors)]
            found = check(*operands, beta=0.5, reduction=reduction, upstream=1.5)
        if reduction == "none":
            assert found["loss"].stride() == torch.empty_like(input).stride()


@on_both
@pytest.mark.parametrize("layout", LAYOUTS)
def test_broadcast_weights_and_upstream_gradients(layout: str) -> None:
    """What comes from above may lie in any order too."""
    for weight in ((1, 3, 1, 1), (4, 1, 1, 1), (4, 1, 6, 8), (8,), (6, 1)):
        operands = [laid_out(layout).requires_grad_(), laid_out(layout).requires_grad_()]
        check(*operands, values(*weight), coin(*weight), reduction="sum")
    for own in (layout, "contiguous"):
        pair = laid_out(own).requires_grad_(), laid_out("contiguous")
        check(*pair, beta=0.5, reduction="none", upstream=laid_out(layout))


@on_both
@pytest.mark.parametrize("order", [(0, 4, 1, 2, 3), (6, 4, 2, 0, 5, 3, 1)], ids=str)
def test_many_dimensions(order: Shape) -> None:
    """channels_last_3d, and more dimensions than PyTorch has a name for."""
    input = values(*(4, 3, 3, 3, 2, 2, 2)[: len(order)]).permute(order).requires_grad_()
    target = values(*input.shape, grad=True)
    odd, even = (
        values(*(1 if axis % 2 == rest else n for axis, n in enumerate(input.shape)))
        for rest in (0, 1)
    )
    check(input, target, odd, even, reduction="batchmean")


# Sizes and strides of which the furthest element lies 2³¹ elements in: by the product of index
# and stride, by one stride alone, and by a sum of two products that each fit 32 bits.
FAR = [((3, 4), (2**30, 1)), ((2, 4), (2**31, 1)), ((2, 2, 4), (2**30, 2**30 + 8, 1))]


@on_both
@pytest.mark.parametrize("operand", range(4), ids=NAMES[:4])
@pytest.mark.parametrize(("shape", "strides"), FAR, ids=str)
def test_offsets_beyond_32_bits(
    shape: Shape, strides: Shape, operand: int, tmp_path: Path, unpoisoned: None
) -> None:
    """A view of few elements over a storage of 8 GiB: a sparse file, of which few pages exist."""
    size = 2**31 + 64
    if HAS_GPU:
        storage = torch.empty(size, device=DEVICE)
    else:
        storage = torch.from_file(str(tmp_path / "sparse"), shared=True, size=size)
    operands = [values(*shape) for _ in range(4)]
    operands[operand] = storage.as_strided(shape, strides).copy_(operands[operand])
    for trained in operands[:2]:
        trained.requires_grad_()
    for reduction in ("none", "sum"):
        check(*operands, beta=0.5, reduction=reduction, upstream=1.5)


@on_kernel
@pytest.mark.skipif(
    not HAS_GPU or torch.cuda.get_device_properties(0).total_memory < 40 * 2**30,
    reason="waits for a GPU with 40 GiB: 2**31 elements and their gradient",
)
def test_more_than_2_31_elements(unpoisoned: None) -> None:
    """The loss, its gradient, and what makes it another one for another upstream gradient."""
    for kind in ("none", "sum", "masked"):  # One after the other: each fills a large GPU's half.
        _check_more_than_2_31_elements(kind)


def _check_more_than_2_31_elements(kind: str) -> None:
    n = 2**31 + 4099
    places = [n - 1, 2**31 - 1]
    input = torch.zeros(n, dtype=torch.bfloat16, device=DEVICE)
    input[places] = torch.tensor([3.0, 0.5], dtype=torch.bfloat16, device=DEVICE)
    mask = input != 0 if kind == "masked" else None
    target = torch.zeros((), dtype=torch.bfloat16, device=DEVICE).expand(n)
    reduction: Reduction = "none" if kind == "none" else "sum"
    loss = smooth_l1_loss(input.requires_grad_(), target, mask, reduction=reduction)
    assert loss.detach().sum(dtype=torch.float32).item() == 2.5 + 0.125
    loss.backward(torch.full((), 2.0, dtype=loss.dtype, device=DEVICE).expand_as(loss))
    assert input.grad is not None
    assert input.grad[places].tolist() == [2.0, 1.0]
    assert input.grad.count_nonzero().item() == len(places)


@on_both
@pytest.mark.parametrize("name", [*NAMES[:4], "normalizer"])
def test_negated_view(name: str) -> None:
    """The imaginary part of a conjugate holds the negatives of its values in memory."""
    shapes = {"input": (5, 4), "target": (5, 4), "inside_weights": (5, 1), "outside_weights": (4,)}
    operands: dict[str, Any] = {own: values(*size) for own, size in shapes.items()}
    operands["normalizer"] = torch.tensor(3.0, device=DEVICE)
    hidden = torch.complex(operands[name], -operands[name]).conj().imag
    assert hidden.is_neg()
    operands[name] = hidden
    for own in shapes:
        operands[own].requires_grad_()
    check(**operands, reduction="sum", upstream=2.0)
