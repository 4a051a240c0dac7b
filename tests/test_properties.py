"""Random calls: both backends agree with the oracle on values, dtypes, shapes and strides.

Hypothesis draws what a caller may do: 0 to 5 dimensions, sizes 0 and 1 among them, strides from
permuting, slicing and expanding, weights of every kind and broadcast pattern, special values.
"""

import math
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from hypothesis import given, note, settings
from hypothesis import strategies as st
from torch import Tensor

from tests import support
from tests.support import FLOATS, MASKS, REDUCTIONS, Shape, check, values

pytestmark = support.on_both

REAL = (*FLOATS, torch.int8, torch.int16, torch.int32, torch.int64, *MASKS, *MASKS)
SPECIAL = (math.nan, math.inf, -math.inf, 0.0, -0.0, 0.25, -0.25, 1.0)
SIZES = (0, 1, 1, 2, 3, 3, 4, 5, 7, 8)
# Any of Python's real numbers will do; none is computed with in its own precision.
NUMBERS = (2, 0.25, Fraction(1, 3), np.float16(0.7), np.int64(3))
UPSTREAM = (1.0, 1.0, -2.5, 0.0, 65536.0, 1e-3, 1e30, math.inf, -math.inf, math.nan)


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    shape = tuple(draw(st.lists(st.sampled_from(SIZES), max_size=5)))
    if shape and draw(st.integers(0, 9)) == 0:
        # Now and then more elements than a tile of the kernel holds.
        return shape[0], draw(st.integers(600, 1500))
    return shape


@st.composite
def patterns(draw: st.DrawFn, shape: Shape) -> Shape:
    """Return a shape that broadcasts to another one."""
    if draw(st.integers(0, 2)) == 0:
        return shape
    kept = shape[draw(st.integers(0, len(shape))) :]
    return tuple(1 if draw(st.booleans()) else size for size in kept)


@st.composite
def tensors(draw: st.DrawFn, shape: Shape, dtypes: Any, special: bool = False) -> Tensor:
    """Return a tensor with its dimensions in any order, with steps, gaps and an offset."""
    dtype, seed = draw(st.sampled_from(dtypes)), draw(st.integers(0, 2**16))
    axes, offset = range(len(shape)), draw(st.integers(0, 2))
    order = draw(st.permutations(axes)) if draw(st.booleans()) else list(axes)
    steps = [draw(st.sampled_from([1, 1, 1, 2, 3])) for _ in axes]
    is_expanded = [draw(st.integers(0, 7)) == 0 for _ in axes]
    gaps = [draw(st.sampled_from([0, 0, 0, 1, 4])) for _ in axes]
    stored = [1 if is_expanded[d] else shape[d] * steps[d] + gaps[d] for d in order]
    flat = values(offset + math.prod(stored), scale=0.8, seed=seed)
    if not dtype.is_floating_point:
        flat = (2 * flat).round().abs()
    elif special:
        rarity = draw(st.sampled_from([4, 40]))
        places = (rarity * values(*flat.shape, seed=seed + 1)).round()
        for place, value in enumerate(SPECIAL):
            flat[places == place] = value
    view = flat.to(dtype)[offset:].view(stored).permute([order.index(d) for d in axes])
    seen = [slice(0, n * step, step) for n, step in zip(shape, steps, strict=True)]
    view = view[tuple(seen)].expand(shape)
    if dtype.is_floating_point and draw(st.integers(0, 7)) == 0:
        # As is the imaginary part of a conjugate: memory holds the negatives of its values.
        view = torch._neg_view(-view)
    return view.requires_grad_(dtype.is_floating_point and draw(st.booleans()))


@st.composite
def arguments(draw: st.DrawFn) -> dict[str, Any]:
    """Return the arguments of `check`."""
    shape, special = draw(shapes()), draw(st.booleans())
    input = draw(tensors(shape, FLOATS, special))
    target = draw(tensors(shape, draw(st.sampled_from([FLOATS, [input.dtype]])), special))
    call: dict[str, Any] = {"input": input, "target": target}
    for name, numbers in (("inside_weights", []), ("outside_weights", [0, -1.7, *NUMBERS])):
        kind = draw(st.sampled_from([None, Tensor, Tensor, Tensor, *numbers]))
        call[name] = draw(tensors(draw(patterns(shape)), REAL, special)) if kind is Tensor else kind
    name = draw(st.sampled_from(["sigma", "beta", "beta"]))
    call[name] = draw(st.sampled_from([None, {"sigma": math.inf, "beta": 0.0}[name], *NUMBERS]))
    if draw(st.booleans()):
        transition = draw(tensors(draw(patterns(shape)), FLOATS, special))
        # Only special draws may hold values that are not allowed.
        call[name] = transition if special else transition.detach().abs().add(0.1)
        call[name].requires_grad_(transition.requires_grad)
    call["reduction"] = draw(st.sampled_from(REDUCTIONS))
    call["upstream"] = draw(st.sampled_from(UPSTREAM))
    if call["reduction"] == "none" and draw(st.booleans()):
        call["upstream"] = draw(tensors(shape, [torch.float32])).detach()
    elif call["reduction"] == "sum":
        kind = draw(st.sampled_from([None, *5 * [Tensor], *NUMBERS]))
        call["normalizer"] = draw(tensors((), REAL, special)).detach() if kind is Tensor else kind
    return call


@settings(max_examples=300 if support.HAS_GPU else 600)  # A GPU's kernels have to be compiled.
@given(call=arguments())
def test_against_the_oracle(call: dict[str, Any]) -> None:
    for name, value in call.items():
        if isinstance(value, Tensor):
            note(f"{name}: {value.dtype}, strides {value.stride()} from {value.storage_offset()}")
    check(**call)
