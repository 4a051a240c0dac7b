"""The loss as somebody without this library writes it: around PyTorch's own, with masks by where.

Whatever context of PyTorch this works in, the library must work in, with the same result.
"""

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (the name PyTorch users know it by)
from torch import Tensor

MASKS = (torch.bool, torch.uint8)


def composed(
    input: Tensor,
    target: Tensor,
    inside_weights: Any = None,
    outside_weights: Any = None,
    *,
    sigma: Any = None,
    beta: Any = None,
    reduction: str = "mean",
    normalizer: Any = None,
) -> Tensor:
    """Return what `smooth_l1_loss` must return."""
    if sigma is not None:
        beta = 1 / sigma / sigma
    # Masks first: what they exclude must meet no weights, because 0 times NaN is NaN.
    x = input - target
    multipliers: list[Any] = []
    for weights in (inside_weights, outside_weights):
        if isinstance(weights, Tensor) and weights.dtype in MASKS:
            x = torch.where(weights != 0, x, 0)
            multipliers.append(None)
        else:
            multipliers.append(weights)
    inside, outside = multipliers
    x = x if inside is None else x * inside
    if isinstance(beta, Tensor):  # PyTorch's own loss takes no tensor.
        size = x.abs()
        loss = torch.where(size < beta, 0.5 * size**2 / beta, size - 0.5 * beta)
    else:
        loss = F.smooth_l1_loss(
            x, torch.zeros_like(x), reduction="none", beta=1.0 if beta is None else beta
        )
    loss = loss if outside is None else loss * outside
    if reduction == "none":
        return loss
    if reduction == "mean":
        return loss.mean()
    divisor = input.shape[0] if reduction == "batchmean" else normalizer
    return loss.sum() if divisor is None else loss.sum() / divisor
