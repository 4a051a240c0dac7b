"""Any strides work, no operand is changed, and the gradient has the input's memory format.

Each layout is one that detection code makes: channels_last feature maps, slices of a head's
output, the permute from (B, C, H, W) to anchors, a transpose, views that start at an odd offset,
and stride-0 expansions. (Hypothesis draws others, in test_properties.py.)
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from fused_smoothl1 import smooth_l1_loss
from tests import support
from tests.support import DEVICE, HAS_GPU, OPERANDS, boxes, check, results, values

pytestmark = support.on_both

SHAPE = (4, 3, 6, 8)  # No permutation of it looks like another.
# What lies in memory, and what is seen of it.
LAYOUTS: dict[str, Any] = {
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


@pytest.mark.parametrize("alone", [*OPERANDS[:4], None])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, alone: str | None) -> None:
    """Of one operand or of all; the results follow the input, whoever's gradient it is."""
    chosen = [LAYOUTS[layout if alone in (name, None) else "contiguous"] for name in OPERANDS[:4]]
    tensors = [view(values(*sizes)) for sizes, view in chosen]
    for trained in ([0, 1, 2, 3], [0, 1], [0], [1], [2], [3]):
        operands = [t.detach().requires_grad_(i in trained) for i, t in enumerate(tensors)]
        reduction = "none" if len(trained) == 4 else "sum"
        found = check(*operands, beta=0.5, reduction=reduction, upstream=1.5)
        assert found["loss"].stride() in (torch.empty_like(tensors[0]).stride(), ())
    masks = tensors[2] > 0, (tensors[3] > 0).to(torch.uint8)
    check(tensors[0].requires_grad_(), tensors[1], *masks, reduction="sum")


def test_seven_dimensions() -> None:
    input = values(2, 3, 2, 3, 2, 3, 4).permute(6, 4, 2, 0, 5, 3, 1).requires_grad_()
    weights = values(2, 1, 2, 1, 3, 1), values(1, 2, 1, 3, 1, 3)
    check(input, values(*input.shape, grad=True), *weights)


# Sizes and strides of which the furthest element lies 2³¹ elements in: by the product of index
# and stride, by one stride alone, and by a sum of two products that each fit 32 bits.
FAR = [((3, 4), (2**30, 1)), ((2, 4), (2**31, 1)), ((2, 2, 4), (2**30, 2**30 + 8, 1))]


@pytest.mark.parametrize("operand", range(4), ids=OPERANDS[:4])
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
    """The loss, its gradient, and what makes it another one for another upstream gradient."""
    n, places = 2**31 + 4099, [2**31 + 4098, 2**31 - 1]
    input = torch.zeros(n, dtype=torch.bfloat16, device=DEVICE)
    input[places] = torch.tensor([3.0, 0.5]).to(input)
    target, mask = torch.zeros_like(input[:1]).expand(n), input != 0 if masked else None
    operands = [input.requires_grad_(), target, mask]
    loss, gradient = results(smooth_l1_loss, operands, upstream=2.0, reduction=reduction)
    assert loss.sum(dtype=torch.float32) == 2.5 + 0.125
    assert gradient[places].tolist() == [2.0, 1.0]
    assert gradient.count_nonzero() == 2


@pytest.mark.parametrize("position", range(5), ids=[*OPERANDS[:4], "normalizer"])
def test_negated_view(position: int) -> None:
    """As is the imaginary part of a conjugate: memory holds the negatives of its values."""
    operands = [*boxes(5, (5, 1), (4,)), torch.tensor(3.0, device=DEVICE)]
    operands[position] = torch._neg_view(-operands[position].detach())
    *operands, normalizer = operands
    trained = [t.detach().requires_grad_() for t in operands]
    check(*trained, reduction="sum", normalizer=normalizer, upstream=2.0)
