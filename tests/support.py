"""What several test files need: operands, the tolerance, and one comparison with the oracle.

Tolerances are derived, not guessed. The package computes in the accumulator's dtype (float32, or
float64 where an operand is float64), so a value that is not a sum passes through at most ELEMENT
roundings of that dtype, each of half an epsilon, and the loss at most doubles the relative error
of x. A sum of n terms made as a tree, of any shape, adds about log2(n) roundings of the sum of
the terms' absolute values. Storing in 16 bits adds one rounding, or two where a saved gradient is
multiplied by an upstream gradient afterwards.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from fused_smoothl1 import dispatch, smooth_l1_loss
from tests import oracle

ELEMENT = 16
NAMES = ("input", "target", "inside_weights", "outside_weights", "sigma", "beta")
MASKS = (torch.bool, torch.uint8)


def gaussian(
    *shape: int,
    seed: int,
    scale: float = 1.0,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    requires_grad: bool = False,
) -> Tensor:
    """Return normally distributed values, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator, dtype=torch.float64) * scale
    return values.to(dtype).to(device).requires_grad_(requires_grad)


def coin(*shape: int, seed: int, p: float = 0.5, device: str = "cpu") -> Tensor:
    """Return a boolean mask of independent throws with probability p, which differ."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(shape, generator=generator) < p
    assert mask.numel() < 6 or p in (0, 1) or mask.any() != mask.all(), "take another seed"
    return mask.to(device)


def maker(device: str) -> Callable[..., Tensor]:
    """Return what makes the operands of a `bench.codegen.calls.Call`, each with its own seed."""
    seeds = itertools.count()

    def make(*shape: int, dtype: str) -> Tensor:
        kind = getattr(torch, dtype)
        if not shape:  # a normalizer
            return torch.tensor(7, dtype=kind, device=device)
        if kind in MASKS:
            return coin(*shape, seed=next(seeds), device=device).to(kind)
        return gaussian(*shape, seed=next(seeds), dtype=kind, device=device)

    return make


@contextmanager
def backend_set(name: str | None) -> Iterator[None]:
    """Choose a backend (None: leave the choice unset) as for a new process, which reads it once."""
    with pytest.MonkeyPatch.context() as patch:
        if name is None:
            patch.delenv("FUSED_SMOOTHL1_BACKEND", raising=False)
        else:
            patch.setenv("FUSED_SMOOTHL1_BACKEND", name)
        dispatch._backends.clear()
        yield
    dispatch._backends.clear()


def accumulator(*operands: Any) -> torch.dtype:
    """Return the dtype of the arithmetic."""
    wide = any(isinstance(t, Tensor) and t.dtype == torch.float64 for t in operands)
    return torch.float64 if wide else torch.float32


def loss_dtype(reduction: str, *operands: Any) -> torch.dtype:
    """Return the dtype that the contract gives the loss."""
    if reduction != "none":
        return accumulator(*operands)
    floating = [t.dtype for t in operands if isinstance(t, Tensor) and t.is_floating_point()]
    dtype = floating[0]
    for other in floating[1:]:
        dtype = torch.promote_types(dtype, other)
    return dtype


def float64(value: Tensor) -> npt.NDArray[np.float64]:
    return value.detach().cpu().to(torch.float64).numpy()


def assert_near(
    what: str,
    actual: Tensor,
    expected: npt.NDArray[np.float64],
    *,
    computed_in: torch.dtype,
    magnitude: npt.NDArray[np.float64] | None = None,
    terms: int = 1,
    storage_roundings: float = 0.5,
) -> None:
    """Compare with the oracle: the same NaN, the same infinities, and the rest within bounds.

    `magnitude` is the sum of the absolute values of the terms where `expected` is a sum.
    """
    assert tuple(actual.shape) == expected.shape, f"{what}: shape {tuple(actual.shape)}"
    stored = torch.finfo(actual.dtype)
    inside = torch.finfo(computed_in)
    got = float64(actual)
    with np.errstate(all="ignore"):
        rounded = float64(torch.from_numpy(np.array(expected)).to(actual.dtype))
        special = ~np.isfinite(rounded)
        np.testing.assert_array_equal(got[special], rounded[special], err_msg=what)
        size = np.abs(expected) if magnitude is None else np.maximum(magnitude, np.abs(expected))
        bound = (ELEMENT + 2 * math.log2(max(terms, 1))) * 0.5 * inside.eps * size
        if stored.eps > inside.eps:
            bound += storage_roundings * stored.eps * np.abs(expected)
        bound += stored.smallest_normal * stored.eps + inside.smallest_normal
        excess = np.abs(got - expected)[~special] - bound[~special]
    worst = excess.max(initial=-math.inf)
    # Written so that a NaN which should not be there fails too.
    assert worst <= 0 or not excess.size, (
        f"{what}: {int((~(excess <= 0)).sum())} of {expected.size} values are out of bounds, "
        f"the worst by {worst:.3g}; got {got[~special].ravel()[np.argmax(excess)]!r}, "
        f"expected {expected[~special].ravel()[np.argmax(excess)]!r}"
    )


def assert_same(what: str, one: Tensor, other: Tensor) -> None:
    """Assert the same values to rounding, and the same NaN and infinities.

    Two ways to compute one thing may each use all of the roundings that `assert_near` allows.
    """
    assert (one.dtype, one.shape) == (other.dtype, other.shape), what
    stored, inside = torch.finfo(one.dtype), torch.finfo(accumulator(one))
    torch.testing.assert_close(
        one,
        other,
        rtol=ELEMENT * inside.eps + (2.02 * stored.eps if stored.eps > inside.eps else 0),
        atol=2 * (stored.smallest_normal * stored.eps + inside.smallest_normal),
        equal_nan=True,
        msg=lambda text: f"{what}: {text}",
    )


def _magnitude(name: str, operands: dict[str, Any], **kwargs: Any) -> Any:
    """Return the sum of the absolute terms of a broadcast operand's gradient, and their number."""
    operand = operands[name]
    wide = {**operands, name: operand.detach().expand(operands["input"].shape)}
    terms = getattr(oracle.smooth_l1(**wide, **kwargs), name)
    with np.errstate(all="ignore"):
        sums = oracle._sum_to_shape(np.abs(terms), operand)
    return sums, max(terms.size // max(operand.numel(), 1), 1)


def _absolute(weights: Any) -> Any:
    is_mask = isinstance(weights, Tensor) and weights.dtype in MASKS
    return weights if weights is None or is_mask or isinstance(weights, bool) else abs(weights)


def check(
    input: Tensor,
    target: Tensor,
    inside_weights: Any = None,
    outside_weights: Any = None,
    *,
    sigma: Any = None,
    beta: Any = None,
    upstream: Any = 1.0,
    **options: Any,
) -> dict[str, Tensor]:
    """Hold the loss, and the gradient of each operand that requires one, against the oracle.

    Also asserts what is true of every call: dtypes, shapes, the gradient's strides, and that no
    operand was written to. Returns the loss and the gradients by name.
    """
    values = (input, target, inside_weights, outside_weights, sigma, beta)
    operands = dict(zip(NAMES, values, strict=True))
    tensors = {name: t for name, t in operands.items() if isinstance(t, Tensor)}
    before = [(t.detach().clone(), t._version) for t in tensors.values()]
    reduction = options.get("reduction", "mean")

    loss = smooth_l1_loss(**operands, **options)

    assert loss.dtype == loss_dtype(reduction, *values)
    assert loss.device == input.device
    # As autograd hands it down, so that the oracle multiplies by the same rounded number.
    grad_output = torch.as_tensor(upstream, dtype=loss.dtype, device=loss.device)
    sources = {name: t for name, t in tensors.items() if t.requires_grad}
    gradients: dict[str, Tensor] = {}
    if sources:
        upstreams = grad_output.expand(loss.shape)
        results = torch.autograd.grad(loss, list(sources.values()), upstreams)
        gradients = dict(zip(sources, results, strict=True))

    settings = {
        "reduction": reduction,
        "normalizer": options.get("normalizer"),
        "upstream": grad_output,
    }
    expected = oracle.smooth_l1(**operands, **settings)
    computed_in = accumulator(*values)
    if reduction == "none":
        assert_near("loss", loss, expected.loss, computed_in=computed_in)
    else:
        positive = {**operands, "outside_weights": _absolute(outside_weights)}
        absolute = oracle.smooth_l1(**positive, **settings).loss
        assert_near(
            "loss",
            loss,
            expected.loss,
            computed_in=computed_in,
            magnitude=absolute,
            terms=input.numel(),
        )
    for name, gradient in gradients.items():
        operand = operands[name]
        assert gradient.dtype == operand.dtype, f"{name}: gradient in {gradient.dtype}"
        magnitude, terms = None, 1
        if name == "input":
            assert gradient.stride() == torch.empty_like(input).stride(), gradient.stride()
        if name not in NAMES[:2]:
            magnitude, terms = _magnitude(name, operands, **settings)
        assert_near(
            f"gradient of {name}",
            gradient,
            getattr(expected, name),
            computed_in=computed_in,
            magnitude=magnitude,
            terms=terms,
            # A saved gradient is rounded, multiplied by the upstream gradient and rounded again.
            # Not in float16: its values must meet the upstream gradient first.
            storage_roundings=0.51 if operand.dtype == torch.float16 else 1.01,
        )
    for tensor, (value, version) in zip(tensors.values(), before, strict=True):
        assert tensor._version == version, "an operand was written to"
        torch.testing.assert_close(tensor.detach(), value, rtol=0, atol=0, equal_nan=True)
    return {"loss": loss.detach(), **gradients}


def gradient_unless_modified(loss: Tensor, operand: Tensor) -> Tensor | None:
    """Return the gradient, or None if autograd refuses because an operand was modified."""
    try:
        (gradient,) = torch.autograd.grad(loss, operand, torch.ones_like(loss))
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        return None
    return gradient
