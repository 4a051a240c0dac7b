"""Random calls: eager, the kernel and the oracle agree on values, dtypes, shapes, strides, errors.

Hypothesis draws what a caller may do: 0 to 5 dimensions, sizes 0 and 1 among them, strides from
permuting, slicing and expanding, weights of every kind and broadcast pattern, special values,
and now and then a call that must raise. An example that once failed stays at the end of the file.
"""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fused_smoothl1 import smooth_l1_loss
from tests.support import MASKS, assert_same, backend_set, check, gaussian

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
REAL = [*FLOATS, torch.int8, torch.int16, torch.int32, torch.int64, *MASKS]
SPECIAL = [math.nan, math.inf, -math.inf, 0.0, -0.0, 0.25, -0.25, 1.0]
SIZES = st.sampled_from([0, 1, 1, 2, 3, 3, 5, 7])


class Call:
    """A call of the function, and the error that the contract wants of it, if any."""

    def __init__(self, operands: list[Any], options: dict[str, Any], upstream: Any) -> None:
        self.operands = operands
        self.options = options
        self.upstream = upstream
        self.error: type[Exception] | None = None

    def __repr__(self) -> str:
        """Tell what matters of tensors when an example fails."""
        told = [
            f"{t.dtype} {tuple(t.shape)} strides {t.stride()} offset {t.storage_offset()}"
            f"{' requires grad' if t.requires_grad else ''}"
            if isinstance(t, Tensor)
            else repr(t)
            for t in self.operands
        ]
        return f"Call({told}, {self.options}, upstream={self.upstream!r}, {self.error})"


@st.composite
def shapes(draw: st.DrawFn) -> tuple[int, ...]:
    shape = tuple(draw(st.lists(SIZES, max_size=5)))
    if shape and draw(st.integers(0, 9)) == 0:
        # Now and then more elements than a tile of the kernel holds.
        shape = (*shape[:1], draw(st.integers(600, 1500)))
    return shape


@st.composite
def tensors(draw: st.DrawFn, shape: tuple[int, ...], dtype: torch.dtype, special: bool) -> Tensor:
    """Return values in a drawn memory layout."""
    seed = draw(st.integers(0, 2**16))
    # Laid out with the dimensions in any order, with steps, and from any offset.
    order = draw(st.permutations(range(len(shape)))) if draw(st.booleans()) else range(len(shape))
    expand = [draw(st.integers(0, 7)) == 0 for _ in shape]
    steps = [draw(st.sampled_from([1, 1, 1, 2, 3])) for _ in shape]
    stored = [1 if expand[d] else shape[d] * steps[d] for d in order]
    offset = draw(st.integers(0, 2))
    if dtype.is_floating_point:
        flat = gaussian(offset + math.prod(stored), seed=seed, scale=0.8)
        if special:
            where = gaussian(flat.numel(), seed=seed + 1)
            for i, value in enumerate(SPECIAL):
                flat[(where * 40).round() == i] = value
    else:
        flat = (gaussian(offset + math.prod(stored), seed=seed) * 2).round().abs()
    base = flat.to(dtype)[offset:].view(stored)
    inverse = [list(order).index(d) for d in range(len(shape))]
    view = base.permute(inverse)
    for d, step in enumerate(steps):
        if not expand[d] and step > 1:
            view = view[(slice(None),) * d + (slice(None, None, step),)]
    return view.expand(shape)


@st.composite
def weights(draw: st.DrawFn, shape: tuple[int, ...], special: bool, numbers: list[Any]) -> Any:
    """Return None, one of the numbers, or a tensor."""
    other = draw(st.sampled_from([None, None, *numbers[:1], Tensor, Tensor, Tensor]))
    if other is None:
        return None
    if other is not Tensor:
        return draw(st.sampled_from(numbers))
    dtype = draw(st.sampled_from(REAL))
    return draw(tensors(draw(patterns(shape)), dtype, special))


@st.composite
def patterns(draw: st.DrawFn, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return a shape that broadcasts to another one."""
    if draw(st.integers(0, 2)) == 0:
        return shape
    dims = draw(st.integers(0, len(shape)))
    return tuple(
        1 if draw(st.booleans()) else n for n in (shape[len(shape) - dims :] if dims else ())
    )


@st.composite
def transitions(draw: st.DrawFn, shape: tuple[int, ...], special: bool) -> dict[str, Tensor]:
    """Return a tensor as beta or sigma; values that are not allowed only where any are special."""
    value = draw(tensors(draw(patterns(shape)), draw(st.sampled_from(FLOATS)), special))
    value = value if special else value.abs() + 0.1
    name = draw(st.sampled_from(["sigma", "beta", "beta"]))
    return {name: value.requires_grad_(draw(st.booleans()))}


@st.composite
def calls(draw: st.DrawFn) -> Call:
    shape = draw(shapes())
    special = draw(st.booleans())
    dtype = draw(st.sampled_from(FLOATS))
    other = dtype if draw(st.booleans()) else draw(st.sampled_from(FLOATS))
    operands: list[Any] = [
        draw(tensors(shape, dtype, special)),
        draw(tensors(shape, other, special)),
        draw(weights(shape, special, [])),
        draw(weights(shape, special, [0, 1, -2, 0.5, 0.0, 1.7])),
    ]
    for operand in operands:
        if isinstance(operand, Tensor) and operand.is_floating_point():
            operand.requires_grad_(draw(st.booleans()))

    reduction = draw(st.sampled_from(["none", "sum", "mean", "batchmean"]))
    options: dict[str, Any] = {"reduction": reduction}
    width = draw(st.sampled_from([{}, {"sigma": 3.0}, {"sigma": 0.7}, {"sigma": math.inf}]))
    width = draw(st.sampled_from([width, {"beta": 0.25}, {"beta": 0.0}, {"beta": 2}]))
    options |= draw(transitions(shape, special)) if draw(st.booleans()) else width
    upstream: Any = draw(st.sampled_from([1.0, 1.0, -2.5, 0.0, 65536.0, 1e-3]))
    if reduction == "none" and draw(st.booleans()):
        upstream = gaussian(*shape, seed=draw(st.integers(0, 99)))
    if reduction == "sum" and operands[0].numel() and draw(st.booleans()):
        normalizers = [2, 0.3, torch.tensor(2.5), torch.tensor(3), torch.tensor(0.1).double()]
        options["normalizer"] = draw(st.sampled_from(normalizers))
    return Call(operands, options, upstream)


@st.composite
def bad_calls(draw: st.DrawFn) -> Call:
    """Return a call with one thing wrong."""
    call = draw(calls())
    operands, options = call.operands, call.options
    shape = tuple(operands[0].shape)
    what = draw(st.sampled_from(["target", "dtype", "widen", "dims", "reduction", "both", "range"]))
    name = draw(st.integers(2, 3))
    call.error = TypeError if what == "dtype" else ValueError
    if what == "target":
        operands[1] = torch.zeros((*shape, draw(st.integers(0, 3))))
    elif what == "dtype":
        wrong = draw(st.sampled_from([torch.int64, torch.complex64, torch.bool]))
        operands[draw(st.integers(0, 1))] = torch.zeros(shape, dtype=wrong)
    elif what == "widen":
        wider = tuple(n + 2 for n in shape) or (2,)
        operands[name] = torch.ones(wider, dtype=draw(st.sampled_from(REAL)))
    elif what == "dims":
        operands[name] = torch.ones((1, *shape))
    elif what == "reduction":
        options["reduction"] = draw(st.sampled_from(["avg", "Sum", ""]))
    elif what == "both":
        options |= {"sigma": 2.0} if "beta" in options else {"sigma": 2.0, "beta": 0.25}
    else:
        options.pop("beta", None)
        options["sigma"] = draw(st.sampled_from([0.0, -1.0, math.nan]))
    return call


def _on(device: str, call: Call) -> Call:
    def moved(value: Any) -> Any:
        if not isinstance(value, Tensor) or device == "cpu":
            return value
        # `to` keeps the strides of dense tensors only, so the copy is made in a view like it.
        extent = 1 + sum((n - 1) * s for n, s in zip(value.shape, value.stride(), strict=True))
        flat = value.detach().new_zeros(max(extent, 1), device=device)
        view = flat.as_strided(value.shape, value.stride())
        if value.numel():
            source = value.detach().as_strided((extent,), (1,))
            flat.copy_(source)
        return view.requires_grad_(value.requires_grad)

    options = {name: moved(value) for name, value in call.options.items()}
    there = Call([moved(v) for v in call.operands], options, moved(call.upstream))
    there.error = call.error
    return there


def _evaluate(call: Call) -> dict[str, Tensor]:
    return check(*call.operands, upstream=call.upstream, **call.options)


def _agree(call: Call) -> None:
    """Compare the kernel with the oracle, and with eager where nothing is summed."""
    with backend_set("eager"):
        eager = _evaluate(call)
    with backend_set("triton"):
        kernel = _evaluate(call)
    assert eager.keys() == kernel.keys()
    for name, value in eager.items():
        assert (value.dtype, value.shape) == (kernel[name].dtype, kernel[name].shape), name
        assert value.stride() == kernel[name].stride(), name
        # `check` has held sums to the oracle; how far two of them may differ depends on the terms.
        if name in ("input", "target") or value.shape == call.operands[0].shape != ():
            assert_same(name, kernel[name], value)


@settings(max_examples=400)
@given(call=calls())
def test_eager_is_the_oracle(call: Call, device: str, eager_backend: str) -> None:
    _evaluate(_on(device, call))


@settings(max_examples=200)
@given(call=calls())
def test_kernel_is_eager_is_the_oracle(call: Call, device: str, triton_backend: str) -> None:
    _agree(_on(device, call))


@settings(max_examples=100)
@given(call=bad_calls())
def test_both_raise_the_same(call: Call, device: str, triton_backend: str) -> None:
    call = _on(device, call)
    messages = []
    for name in ("eager", "triton"):
        with backend_set(name), pytest.raises((ValueError, TypeError)) as caught:
            smooth_l1_loss(*call.operands, **call.options)
        assert type(caught.value) is call.error
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
