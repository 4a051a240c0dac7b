"""Calls that between them make every kind of launch.

Kinds that do not touch each other share a call, so that the table is made in under a minute: every
float dtype, access, kind of weight and role of a launch is in at least one. Most are in float32;
what another type changes is repeated in it.
"""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

# Only who makes the calls needs PyTorch, not who lists them.
if TYPE_CHECKING:
    from torch import Tensor

ROWS = 16385  # of 4 coordinates: several tiles, and a tail
MAPS = (2, 4, 32, 34)  # planes and pixels of sizes that a wide access divides
ODD = 65539  # elements of a flat tensor, divisible by nothing that a wide access needs
LONG = 2**31 + ODD  # more than an int32 can count (memory that is never touched is never there)


class Variant(NamedTuple):
    """A call whose launches are variants."""

    dtype: str
    name: str
    call: Callable[[], object]


def variants() -> Iterator[Variant]:
    """Yield the calls."""
    yield _dense("float32")
    yield Variant(
        "float32",
        "dense, elementwise",
        lambda: _differentiate(*_empty(ODD, number=4), reduction="none"),
    )
    yield _row_mask("float32", normalizer="int64")
    yield from _layout_variants()
    yield from _launch_variants()
    for dtype in ("bfloat16", "float16"):
        yield _dense(dtype)
    yield Variant(
        "float64",
        "dense, all gradients",
        lambda: _differentiate(*_empty(ODD, number=4, dtype="float64"), wanted=4),
    )
    yield _row_mask("bfloat16", normalizer="float32")


def _dense(dtype: str) -> Variant:
    return Variant(dtype, "dense", lambda: _differentiate(*_empty(ODD, number=4, dtype=dtype)))


def _row_mask(dtype: str, *, normalizer: str) -> Variant:
    def call() -> None:
        (mask,) = _empty(ROWS, 1, dtype="bool")
        (positives,) = _empty(dtype=normalizer)
        boxes = _empty(ROWS, 4, number=2, dtype=dtype)
        _differentiate(*boxes, mask, reduction="sum", normalizer=positives)

    return Variant(dtype, f"row mask, {normalizer} normalizer", call)


def _layout_variants() -> Iterator[Variant]:
    def variant(name: str, operands: Callable[[], "list[Tensor]"]) -> Variant:
        return Variant("float32", name, lambda: _differentiate(*operands()))

    yield variant(
        "element mask",
        lambda: _empty(ROWS, 4, number=2) + _empty(ROWS, 4, dtype="uint8"),
    )
    yield variant(
        "rows of 5",
        lambda: _empty(ROWS, 5, number=2) + _empty(5) + _empty(ROWS, 1),
    )
    yield variant(
        "channels_last, channel and pixel weights",
        lambda: _channels_last(2) + _empty(1, 4, 1, 1) + _empty(2, 1, 32, 34),
    )
    yield variant(
        "planes, channels_last target, pixel weights",
        lambda: _empty(*MAPS) + _channels_last(1) + _empty(2, 1, 32, 34),
    )


def _launch_variants() -> Iterator[Variant]:
    def variant(name: str, call: Callable[[], object]) -> Variant:
        return Variant("float32", name, call)

    yield variant("dense, long, no weights", lambda: _differentiate(*_empty(LONG, number=2)))
    yield variant(
        "unaligned, one program",
        lambda: _differentiate(*(flat[1:] for flat in _empty(1000, number=2))),
    )
    yield variant(
        "slice of columns, no gradient",
        lambda: _differentiate(*(rows[:, :4] for rows in _empty(ROWS, 8, number=2)), wanted=0),
    )
    yield Variant(
        "float32, bfloat16",
        "dense, both gradients",
        lambda: _differentiate(*_empty(ODD), *_empty(ODD, dtype="bfloat16"), wanted=2),
    )


def _empty(*shape: int, number: int = 1, dtype: str = "float32") -> "list[Tensor]":
    import torch

    return [torch.empty(shape, dtype=getattr(torch, dtype)) for _ in range(number)]


def _channels_last(number: int) -> "list[Tensor]":
    import torch

    return [maps.to(memory_format=torch.channels_last) for maps in _empty(*MAPS, number=number)]


def _differentiate(*operands: "Tensor", wanted: int = 1, **options: Any) -> None:
    """Ask for the loss and for the gradients of the first operands."""
    import torch

    from fused_smoothl1 import smooth_l1_loss

    sources = [operand.detach().requires_grad_() for operand in operands[:wanted]]
    loss = smooth_l1_loss(*sources, *operands[wanted:], **options)
    if sources:
        torch.autograd.grad(loss, sources, torch.empty_like(loss))
