"""A handful of small calls that between them take every path of the library on a GPU."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fused_smoothl1 import smooth_l1_loss

SIGMA = 3.0
UPSTREAM = 3.7  # not 1, so the backward has something to do
COORDINATES = 4


@dataclass(frozen=True, eq=False)
class Call:
    """A forward and backward with fixed operands; calling it returns the loss and gradients."""

    name: str
    input: Tensor
    target: Tensor
    inside_weights: Tensor | None
    outside_weights: Tensor | None
    options: dict[str, Any]
    upstream: float

    def __call__(self) -> list[Tensor]:
        """Run once on the current stream, without waiting for it."""
        operands = (self.input, self.target, self.inside_weights, self.outside_weights)
        loss = smooth_l1_loss(*operands, sigma=SIGMA, **self.options)
        wanted = [t for t in operands if t is not None and t.requires_grad]
        gradients = torch.autograd.grad(loss, wanted, torch.full_like(loss, self.upstream))
        return [loss.detach(), *gradients]


def calls(rows: int, device: torch.device) -> Iterator[Call]:
    """Yield calls on boxes (rows, 4), or near that: reductions, types, weights, layouts, tails."""
    generator = torch.Generator(device).manual_seed(rows)

    def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    def call(
        name: str,
        input: Tensor,
        inside: Tensor | None = None,
        outside: Tensor | None = None,
        *,
        upstream: float = UPSTREAM,
        **options: Any,
    ) -> Call:
        target = torch.empty_like(input).copy_(random(*input.shape))
        return Call(name, input.requires_grad_(), target, inside, outside, options, upstream)

    boxes = (rows, COORDINATES)
    positives = torch.tensor(7.0, device=device)
    for reduction in ("none", "sum", "mean", "batchmean"):
        yield call(reduction, random(*boxes), random(*boxes), random(*boxes), reduction=reduction)
    yield call("upstream 1", random(*boxes), random(*boxes), random(*boxes), upstream=1.0)
    yield call("normalizer", random(*boxes), reduction="sum", normalizer=positives)
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        operands = [random(*boxes, dtype=dtype) for _ in range(3)]
        yield call(str(dtype), *operands)
    yield call("row mask", random(*boxes), random(rows, 1) > 0, reduction="sum")
    yield call("element mask", random(*boxes), None, random(*boxes) > 0)
    yield call("byte mask", random(*boxes), (random(rows, 1) > 0).to(torch.uint8))
    yield call("broadcast", random(*boxes), random(1, COORDINATES), random(rows, 1))
    yield call(
        "weight gradients",
        random(*boxes),
        random(1, COORDINATES).requires_grad_(),
        random(*boxes).requires_grad_(),
    )
    yield call("odd length", random(rows * COORDINATES + 3))
    yield call("every other column", random(rows, 2 * COORDINATES)[:, ::2].detach())
    yield call("transposed", random(COORDINATES, rows).t().detach(), random(rows, 1))
    maps = random(2, COORDINATES, rows, 3).to(memory_format=torch.channels_last)
    yield call("channels_last", maps, random(2, 1, rows, 3) > 0)
