"""A call for every kind of launch: every float dtype, access, kind of weight and role of a launch.

`python -m bench codegen` compiles them, and the tests run them: by themselves, in CUDA graphs,
under compute-sanitizer, and amid all that PyTorch puts around a call. What makes the launcher pick
something new belongs here. Kinds that do not touch each other share a call, which saves
compilation. Most are in float32; what another type changes is repeated in it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

# Listing the calls needs no PyTorch, making one does.
if TYPE_CHECKING:
    from torch import Tensor

LONG = 2**31 + 65539  # more elements than an int32 can count
SIGMA = 3.0

Make = Callable[..., "Tensor"]  # of the sizes given, and of the type named `dtype`


class Operand(NamedTuple):
    """A tensor to be made, and what is then seen of it."""

    shape: tuple[int, ...]
    dtype: str = "float32"
    view: Callable[[Any], Any] = lambda tensor: tensor


@dataclass(frozen=True)
class Call:
    """A forward and backward: operands in the order of the loss's arguments, and its options.

    The first `wanted` operands require a gradient, and so does a tensor beta if `wants_beta`.
    `upstream` is what is seen of the gradient that arrives at a loss of every element.
    """

    name: str
    operands: tuple[Operand, ...]
    wanted: int = 1
    reduction: str = "mean"
    normalizer: str | None = None  # the type of a tensor on the device
    outside_number: float | None = None  # in the place of outside weights
    beta: Operand | float | None = None  # if there is none, sigma is a number
    wants_beta: bool = False
    upstream: Callable[[Any], Any] = lambda gradient: gradient

    def bind(self, make: Make) -> tuple[list["Tensor"], dict[str, Any]]:
        """Make the operands and the options."""
        operands = [o.view(make(*o.shape, dtype=o.dtype)).detach() for o in self.operands]
        for operand in operands[: self.wanted]:
            operand.requires_grad_()
        options: dict[str, Any] = {"reduction": self.reduction, "normalizer": None}
        if self.normalizer is not None:
            options["normalizer"] = make(dtype=self.normalizer)
        if self.outside_number is not None:
            options["outside_weights"] = self.outside_number
        if self.beta is None:
            options["sigma"] = SIGMA
        elif not isinstance(self.beta, Operand):
            options["beta"] = self.beta
        else:
            beta = make(*self.beta.shape, dtype=self.beta.dtype).abs()
            options["beta"] = self.beta.view(beta).requires_grad_(self.wants_beta)
        return operands, options

    @property
    def dtype(self) -> str:
        """The types of input and target, named once if they are the same."""
        return ", ".join(dict.fromkeys(operand.dtype for operand in self.operands[:2]))


def calls(rows: int) -> list[Call]:
    """Return the calls, on boxes (rows, 4) or near that."""

    def of(*shape: int, dtype: str = "float32") -> Operand:
        return Operand(shape, dtype)

    flat = 4 * rows - 1  # divisible by nothing that a wide access needs
    channels_last = Operand((2, 32, 34, 4), view=lambda maps: maps.permute(0, 3, 1, 2))
    planes, pixels = of(2, 4, 32, 34), of(2, 1, 32, 34)  # of sizes that a wide access divides
    pixel_mask = pixels._replace(dtype="bool")
    columns = Operand((rows, 8), view=lambda wide: wide[:, :4])
    every_other = Operand((rows, 8), view=lambda wide: wide[:, ::2])
    transposed = Operand((4, rows), view=lambda turned: turned.t())
    unaligned = Operand((1000,), view=lambda longer: longer[1:])
    boxes = 2 * (of(rows, 4),)
    half, bfloat = of(flat, dtype="float16"), of(flat, dtype="bfloat16")

    def row_mask(dtype: str, normalizer: str) -> Call:
        operands = 2 * (of(rows, 4, dtype=dtype),) + (of(rows, 1, dtype="bool"),)
        name = f"row mask, {normalizer} normalizer"
        return Call(name, operands, reduction="sum", normalizer=normalizer)

    return [
        Call("dense", 4 * (of(flat),)),
        Call("dense, elementwise", 4 * (of(flat),), reduction="none"),
        *(
            Call(f"{layout} of the upstream gradient", boxes, 1, "none", upstream=view)
            for layout, view in {
                "rows": lambda gradient: gradient[:, :1].expand_as(gradient),
                "slice": lambda gradient: gradient.repeat(1, 2)[:, :4],
                "transposition": lambda gradient: gradient.t().contiguous().t(),
            }.items()
        ),
        row_mask("float32", "int64"),
        Call("element mask", (*boxes, of(rows, 4, dtype="uint8"))),
        Call(
            "outside mask, gradient of channel weights",
            (*boxes, of(1, 4), of(rows, 4, dtype="bool")),
            wanted=3,
        ),
        Call("rows of 5", (of(rows, 5), of(rows, 5), of(5), of(rows, 1)), reduction="batchmean"),
        Call(
            "channels_last, channel and pixel weights",
            (channels_last, channels_last, of(1, 4, 1, 1), pixels),
        ),
        Call("planes, channels_last target, pixel mask", (planes, channels_last, pixel_mask)),
        Call("two masks", (*boxes, of(rows, 1, dtype="bool"), of(4, dtype="uint8")), wanted=2),
        Call("row and column weights, all gradients", (*boxes, of(rows, 1), of(4)), wanted=4),
        Call("unaligned, one program, a number", (unaligned, unaligned), outside_number=-2.0),
        Call("slice of columns, no gradient", (columns, columns), wanted=0),
        Call("every other column, transposed target, L1", (every_other, transposed), beta=0.0),
        Call("dense, both gradients", (of(flat), bfloat), wanted=2),
        Call("dense", 4 * (bfloat,)),
        Call("dense", 4 * (half,)),
        Call("dense, all gradients", 4 * (of(flat, dtype="float64"),), wanted=4),
        row_mask("bfloat16", "float32"),
        Call("dense, beta for all", 4 * (of(flat),), beta=of()),
        Call("dense, beta for all, elementwise", 4 * (of(flat),), reduction="none", beta=of()),
        Call("beta of rows, its gradient", boxes, beta=of(rows, 1), wants_beta=True),
        Call("beta of channels, row mask", (*boxes, of(rows, 1, dtype="bool")), beta=of(4)),
        Call("every other beta", boxes, beta=every_other),
        *(
            Call("dense, a beta each, all gradients", 4 * (own,), 4, beta=own, wants_beta=True)
            for own in (of(flat), of(flat, dtype="float64"))
        ),
    ]


# It is compiled alone: memory that is never touched is never there.
LONG_CALL = Call("dense, long, no weights", 2 * (Operand((LONG,)),))
