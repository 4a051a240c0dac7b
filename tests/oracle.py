"""The loss and its gradients in NumPy float64, written from the formula of the Caffe layer.

This file imports nothing of the package under test: two implementations that share no code
cannot share a mistake.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Reference:
    """Loss and gradients; a gradient is None where the operand is not a differentiable tensor."""

    loss: Array
    input: Array
    target: Array
    inside_weights: Array | None
    outside_weights: Array | None
    sigma: Array | None
    beta: Array | None


def as_float64(value: Any) -> Array:
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().to(torch.float64).resolve_neg().numpy()
    return np.asarray(value, dtype=np.float64)


def _weights(weights: Any, shape: tuple[int, ...]) -> tuple[Array, npt.NDArray[np.bool_]]:
    """Return the factor and the selection of one weight, both of the full shape."""
    if weights is None:
        return np.ones(shape), np.ones(shape, dtype=bool)
    values = np.broadcast_to(as_float64(weights), shape)
    if isinstance(weights, torch.Tensor) and weights.dtype in (torch.bool, torch.uint8):
        return np.ones(shape), values != 0
    return values, np.ones(shape, dtype=bool)


def _transition(sigma: Any, beta: Any, shape: tuple[int, ...]) -> tuple[Array, Array]:
    """Return beta and its derivative by sigma, both of the full shape.

    Where a tensor's value is one that a number may not have, there is no transition: NaN.
    """
    with np.errstate(all="ignore"):
        if sigma is not None:
            value = as_float64(sigma)
            transition = np.where(value > 0, 1 / value**2, np.nan)
            of_sigma = np.where(value > 0, -2 / value**3, np.nan)
        else:
            value, of_sigma = as_float64(1.0 if beta is None else beta), np.zeros(())
            transition = np.where((value >= 0) & (value < np.inf), value, np.nan)
    return np.broadcast_to(transition, shape), np.broadcast_to(of_sigma, shape)


def sum_to_shape(gradient: Array, operand: Any) -> Array | None:
    if not isinstance(operand, torch.Tensor) or not operand.is_floating_point():
        return None
    shape = tuple(operand.shape)
    extra = gradient.ndim - len(shape)
    gradient = gradient.sum(axis=tuple(range(extra)))
    kept = tuple(i for i, n in enumerate(shape) if n == 1)
    return np.asarray(gradient.sum(axis=kept, keepdims=True)).reshape(shape)


def smooth_l1(
    input: torch.Tensor,
    target: torch.Tensor,
    inside_weights: Any = None,
    outside_weights: Any = None,
    *,
    sigma: Any = None,
    beta: Any = None,
    reduction: str = "mean",
    normalizer: Any = None,
    upstream: Any = 1.0,
) -> Reference:
    """Evaluate the loss, and the gradients for the given upstream gradient of the loss."""
    shape = tuple(input.shape)
    inside, inside_selected = _weights(inside_weights, shape)
    outside, outside_selected = _weights(outside_weights, shape)
    selected = inside_selected & outside_selected
    transition, of_sigma = _transition(sigma, beta, shape)

    divisor = 1.0
    if not input.numel():
        pass  # The sum of nothing is 0, whatever divides it.
    elif reduction == "mean":
        divisor = float(input.numel())
    elif reduction == "batchmean":
        divisor = float(shape[0]) if shape else 1.0
    elif normalizer is not None:
        divisor = float(as_float64(normalizer))

    with np.errstate(all="ignore"):
        difference = as_float64(input) - as_float64(target)
        x = inside * difference
        size = np.abs(x)
        quadratic = size < transition
        f = np.where(quadratic, 0.5 * (x / transition) * x, size - 0.5 * transition)
        slope = np.where(quadratic, x / transition, np.sign(x))
        of_beta = np.where(quadratic, -0.5 * (x / transition) ** 2, -0.5)
        for values in (slope, of_beta):
            values[np.isnan(x) | np.isnan(transition)] = np.nan

        factor = np.broadcast_to(as_float64(upstream), shape) / divisor

        def kept(values: Array) -> Array:
            return np.where(selected, values, 0.0)

        elementwise = kept(outside * f)
        loss = elementwise if reduction == "none" else elementwise.sum() / divisor
        grad_x = factor * outside * slope
        grad_input = kept(grad_x * inside)
        grad_beta = factor * outside * of_beta
        return Reference(
            loss=np.asarray(loss),
            input=grad_input,
            target=-grad_input,
            inside_weights=sum_to_shape(kept(grad_x * difference), inside_weights),
            outside_weights=sum_to_shape(kept(factor * f), outside_weights),
            sigma=sum_to_shape(kept(grad_beta * of_sigma), sigma),
            beta=sum_to_shape(kept(grad_beta), beta),
        )
