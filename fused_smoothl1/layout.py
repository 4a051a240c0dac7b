"""How the elements of several tensors of one shape are numbered: order and collapse dimensions.

The kernel walks its operands through this numbering, so that it never copies one.
"""

from collections.abc import Sequence

Ints = tuple[int, ...]


def broadcast_strides(shape: Ints, strides: Ints, to: Ints) -> Ints:
    """Return the strides of a tensor expanded to the shape `to`: 0 where it is broadcast."""
    padded = (1,) * (len(to) - len(shape)) + shape
    aligned = (0,) * (len(to) - len(shape)) + strides
    return tuple(0 if size == 1 else stride for size, stride in zip(padded, aligned, strict=True))


def contiguous_strides(sizes: Ints) -> Ints:
    """Return the strides of a row-major tensor of these sizes."""
    strides: list[int] = []
    step = 1
    for size in reversed(sizes):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))


def collapse(shape: Ints, strides: tuple[Ints, ...]) -> tuple[Ints, tuple[Ints, ...]]:
    """Order dimensions as they lie in memory, and merge neighbours that all tensors allow to merge.

    Args:
        shape: the shape that all tensors have (after broadcasting), without a 0.
        strides: one tuple per tensor, in elements. The first tensor decides the order.

    Returns:
        The collapsed sizes (at least one), outermost first, and each tensor's strides for them.
    """
    kept = [d for d, size in enumerate(shape) if size != 1]
    kept.sort(key=lambda d: strides[0][d], reverse=True)
    sizes: list[int] = []
    steps: list[Ints] = []  # of all tensors, one tuple a collapsed dimension
    for d in kept:
        inner = tuple(tensor[d] for tensor in strides)
        if sizes and steps[-1] == tuple(step * shape[d] for step in inner):
            sizes[-1] *= shape[d]
            steps[-1] = inner
        else:
            sizes.append(shape[d])
            steps.append(inner)
    if not sizes:
        return (1,), ((0,),) * len(strides)
    return tuple(sizes), tuple(zip(*steps, strict=True))


def extent(sizes: Sequence[int], strides: Sequence[int]) -> int:
    """Return how many elements of memory a tensor spans."""
    return 1 + sum((size - 1) * step for size, step in zip(sizes, strides, strict=True))
