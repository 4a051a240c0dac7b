"""Any strides work, no operand is changed, and the gradient has the input's memory format.

Each layout is one that detection code makes: channels_last feature maps, slices of a head's
output, the permute from (B, C, H, W) to anchors, a transpose, views that start at an odd offset,
and stride-0 expansions. Every operand has the shape (4, 3, 6, 7), in which no permutation of the
sizes looks like another.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fused_smoothl1 import smooth_l1_loss
from fused_smoothl1.functional import Reduction
from tests.support import check, gaussian

SHAPE = (4, 3, 6, 7)


def _filler(values: Tensor) -> float:
    """Return what lies between the elements of a view, to be seen wherever it is read."""
    return 1e30 if values.is_floating_point() else 1


def _pad(values: Tensor, last: int) -> Tensor:
    """Return the same values as a view into a tensor whose last dimension is longer."""
    wide = values.new_full((*values.shape[:-1], values.shape[-1] + last), _filler(values))
    view = wide[..., last // 2 : last // 2 + values.shape[-1]]
    return view.copy_(values)


def _every_second(values: Tensor) -> Tensor:
    wide = values.new_full((*values.shape[:-1], 2 * values.shape[-1]), _filler(values))
    return wide[..., ::2].copy_(values)


def _every_third_row(values: Tensor) -> Tensor:
    wide = values.new_full(
        (values.shape[0], 3 * values.shape[1], *values.shape[2:]), _filler(values)
    )
    return wide[:, 1::3].copy_(values)


def _offset(values: Tensor) -> Tensor:
    """Return a dense view that starts one element into its storage, so it is not aligned."""
    flat = values.new_full((values.numel() + 1,), _filler(values))
    return flat[1:].view(values.shape).copy_(values)


def _expanded(dim: int) -> Callable[[Tensor], Tensor]:
    return lambda values: values.narrow(dim, 0, 1).clone().expand(values.shape)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda v: v,
    "channels_last": lambda v: v.contiguous(memory_format=torch.channels_last),
    "columns": lambda v: _pad(v, 5),
    "every_second": _every_second,
    "every_third_row": _every_third_row,
    "permuted": lambda v: v.permute(2, 0, 3, 1).contiguous().permute(1, 3, 0, 2),
    "transposed": lambda v: v.transpose(2, 3).contiguous().transpose(2, 3),
    "permuted_columns": lambda v: _pad(v.permute(1, 3, 0, 2).contiguous(), 2).permute(2, 0, 3, 1),
    "unaligned": _offset,
    "expanded_first": _expanded(0),
    "expanded_last": _expanded(3),
    "one_element": lambda v: v.flatten()[:1].clone().view(1, 1, 1, 1).expand(v.shape),
}


def _laid_out(layout: str, seed: int, device: str, requires_grad: bool = False) -> Tensor:
    values = LAYOUTS[layout](gaussian(*SHAPE, seed=seed, device=device))
    return values.detach().requires_grad_(requires_grad)


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_operands_alike(layout: str, reduction: str, backend: str, device: str) -> None:
    check(
        _laid_out(layout, 1, device, requires_grad=True),
        _laid_out(layout, 2, device, requires_grad=True),
        _laid_out(layout, 3, device),
        _laid_out(layout, 4, device),
        beta=0.5,
        reduction=reduction,
        upstream=1.5,
    )


@pytest.mark.parametrize("operand", range(4), ids=["input", "target", "inside", "outside"])
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "contiguous"])
def test_one_operand_differs(layout: str, operand: int, backend: str, device: str) -> None:
    """The operands need not be laid out alike; the gradient follows the input alone."""
    tensors = [
        _laid_out(layout if i == operand else "contiguous", i + 1, device, requires_grad=i < 2)
        for i in range(4)
    ]
    check(*tensors, beta=0.5, reduction="sum", upstream=1.5)


@pytest.mark.parametrize("operand", range(4), ids=["input", "target", "inside", "outside"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_gradient_alone(layout: str, operand: int, backend: str, device: str) -> None:
    """It is written in the input's order, whoever it belongs to."""
    tensors = [
        _laid_out(layout if i == 0 else "contiguous", i + 1, device, requires_grad=i == operand)
        for i in range(4)
    ]
    check(*tensors, beta=0.5, reduction="sum", upstream=1.5)


@pytest.mark.parametrize("mask", ["channels_last", "every_second", "permuted", "expanded_last"])
def test_masks_in_layouts(mask: str, backend: str, device: str) -> None:
    selected = LAYOUTS[mask]((gaussian(*SHAPE, seed=3, device=device) > 0).to(torch.uint8))
    check(
        _laid_out("channels_last", 1, device, requires_grad=True),
        _laid_out("contiguous", 2, device, requires_grad=True),
        selected,
        selected.bool(),
        reduction="sum",
    )


@pytest.mark.parametrize(
    "weight", [(1, 3, 1, 1), (4, 1, 1, 1), (4, 1, 6, 7), (7,), (6, 1)], ids=str
)
@pytest.mark.parametrize("layout", ["channels_last", "permuted", "columns"])
def test_broadcast_weights_over_layouts(
    layout: str, weight: tuple[int, ...], backend: str, device: str
) -> None:
    check(
        _laid_out(layout, 1, device, requires_grad=True),
        _laid_out(layout, 2, device, requires_grad=True),
        gaussian(*weight, seed=3, device=device),
        gaussian(*weight, seed=4, device=device) > 0,
        reduction="sum",
    )


def test_channels_last_3d(backend: str, device: str) -> None:
    shape = (2, 3, 4, 5, 3)
    input, target = (
        gaussian(*shape, seed=seed, device=device).to(memory_format=torch.channels_last_3d)
        for seed in (1, 2)
    )
    check(
        input.requires_grad_(),
        target.requires_grad_(),
        gaussian(3, 1, 1, 1, seed=3, device=device),
        gaussian(2, 1, 4, 5, 3, seed=4, device=device),
        reduction="batchmean",
    )
    loss = smooth_l1_loss(input, target)
    (gradient,) = torch.autograd.grad(loss, input)
    assert gradient.is_contiguous(memory_format=torch.channels_last_3d)


def test_seven_dimensions(backend: str, device: str) -> None:
    """More dimensions than any layout code unrolls, none of which can be merged."""
    base = gaussian(3, 2, 3, 2, 3, 2, 4, seed=1, device=device)
    input = base.permute(6, 4, 2, 0, 5, 3, 1).detach().requires_grad_()
    target = gaussian(4, 3, 3, 3, 2, 2, 2, seed=2, device=device)[..., ::1]
    weights = gaussian(3, 1, 3, 1, 2, 1, seed=3, device=device)
    check(input, target, weights, gaussian(1, 3, 1, 2, 1, 2, seed=4, device=device))


def test_none_keeps_the_memory_format(backend: str, device: str) -> None:
    input = _laid_out("channels_last", 1, device, requires_grad=True)
    loss = smooth_l1_loss(input, _laid_out("channels_last", 2, device), reduction="none")
    assert loss.is_contiguous(memory_format=torch.channels_last)
    loss.backward(torch.ones_like(loss))
    assert input.grad is not None
    assert input.grad.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("layout", ["channels_last", "every_second", "permuted", "expanded_first"])
def test_layout_of_the_upstream_gradient(layout: str, backend: str, device: str) -> None:
    """What comes from above may lie in any order."""
    input = _laid_out("contiguous", 1, device, requires_grad=True)
    target = _laid_out("contiguous", 2, device)
    upstream = _laid_out(layout, 5, device)
    loss = smooth_l1_loss(input, target, beta=0.5, reduction="none")
    (gradient,) = torch.autograd.grad(loss, input, upstream)
    slope = ((input - target) / 0.5).clamp(-1, 1)
    torch.testing.assert_close(gradient, (upstream * slope).detach())
    assert gradient.stride() == input.stride()


# Sizes and strides of which the furthest element lies 2³¹ elements in: by the product of index
# and stride, by one stride alone, and by a sum of two products that each fit 32 bits.
FAR = [((3, 4), (2**30, 1)), ((2, 4), (2**31, 1)), ((2, 2, 4), (2**30, 2**30 + 8, 1))]


@pytest.mark.parametrize("operand", range(4), ids=["input", "target", "inside", "outside"])
@pytest.mark.parametrize(("shape", "strides"), FAR, ids=str)
def test_offsets_beyond_32_bits(
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    operand: int,
    backend: str,
    device: str,
    tmp_path: Path,
    unpoisoned: None,
) -> None:
    """A view of few elements over a storage of 8 GiB: a sparse file, of which few pages exist."""
    size = 2**31 + 64
    if device == "cpu":
        name = str(tmp_path / "sparse")
        storage = torch.from_file(name, shared=True, size=size, dtype=torch.float32)
    else:
        storage = torch.empty(size, dtype=torch.float32, device=device)
    tensors = [gaussian(*shape, seed=i + 1, device=device) for i in range(4)]
    far = storage.as_strided(shape, strides)
    far.copy_(tensors[operand])
    tensors[operand] = far
    for i in range(2):
        tensors[i].requires_grad_()
    check(*tensors, beta=0.5, reduction="sum", upstream=1.5)
    check(*tensors, beta=0.5, reduction="none", upstream=1.5)


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_properties(0).total_memory < 40 * 2**30,
    reason="waits for a GPU with 40 GiB: 2**31 elements and their gradient",
)
def test_more_than_2_31_elements(triton_backend: str, unpoisoned: None) -> None:
    """The loss, its gradient, and what makes it another one for another upstream gradient."""
    for kind in ("none", "sum", "masked"):  # One after the other: each fills a large GPU's half.
        _check_more_than_2_31_elements(kind)


def _check_more_than_2_31_elements(kind: str) -> None:
    n = 2**31 + 4099
    values = {n - 1: 3.0, 2**31 - 1: 0.5}
    input = torch.zeros(n, dtype=torch.bfloat16, device="cuda")
    for index, value in values.items():
        input[index] = value
    mask = input != 0 if kind == "masked" else None
    target = torch.zeros((), dtype=torch.bfloat16, device="cuda").expand(n)
    reduction: Reduction = "none" if kind == "none" else "sum"
    input.requires_grad_()
    loss = smooth_l1_loss(input, target, mask, reduction=reduction)
    assert loss.detach().sum(dtype=torch.float32).item() == 2.5 + 0.125
    loss.backward(torch.full((), 2.0, dtype=loss.dtype, device="cuda").expand_as(loss))
    assert input.grad is not None
    assert [input.grad[index].item() for index in values] == [2.0, 1.0]
    assert input.grad.count_nonzero().item() == len(values)


@pytest.mark.parametrize("name", ["input", "target", "inside", "outside", "normalizer"])
def test_negated_view(name: str, backend: str, device: str) -> None:
    """The imaginary part of a conjugate holds the negatives of its values in memory."""

    def view(own: str, *shape: int) -> Tensor:
        values = gaussian(*shape, seed=len(own), device=device) + 3.0
        hidden = torch.complex(torch.zeros_like(values), -values).conj().imag
        assert hidden.is_neg()
        return hidden if own == name else values

    shapes = {"input": (5, 4), "target": (5, 4), "inside": (5, 1), "outside": (4,)}
    operands = [view(own, *shape).requires_grad_() for own, shape in shapes.items()]
    check(*operands, reduction="sum", normalizer=view("normalizer"), upstream=2.0)
