"""Host time of a call too small for the device to matter: what a wrapper costs by itself."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 (the name PyTorch users know it by)

from bench.measure import measure
from bench.rivals import composition, fused_on
from fused_smoothl1 import smooth_l1_loss
from fused_smoothl1.problem import Gradients, Needs, Problem

NUMEL = 1024
SECONDS = 1.0


def host_us(device: torch.device) -> dict[str, dict[str, float]]:
    """Return microseconds of forward + backward on `NUMEL` float32 elements for each contender.

    `smooth_l1_loss_plain` is PyTorch's own loss, `eager_composition` the same with two weights
    around it; `fused_plain` and `fused` do the same work. `fused_without_backend` computes and
    launches nothing: the checks, the autograd Function and PyTorch's engine are left.
    """
    generator = torch.Generator().manual_seed(0)
    input, target, inside, outside = (
        torch.randn(NUMEL, generator=generator).to(device) for _ in range(4)
    )
    input.requires_grad_()
    idle, weighted = fused_on(_Idle(input.detach())), (input, target, inside, outside)
    contenders: dict[str, Callable[[], Tensor]] = {
        "smooth_l1_loss_plain": lambda: F.smooth_l1_loss(input, target),
        "fused_plain": lambda: smooth_l1_loss(input, target),
        "eager_composition": lambda: composition(*weighted, sigma=1.0, reduction="mean"),
        "fused": lambda: smooth_l1_loss(*weighted),
        "fused_without_backend": lambda: idle(*weighted),
    }

    def step(loss: Callable[[], Tensor]) -> None:
        input.grad = None
        loss().backward()

    steps = {name: [partial(step, loss)] for name, loss in contenders.items()}
    return {
        name: {key.removesuffix("_ms"): 1e3 * ms for key, ms in timing._asdict().items()}
        for name, timing in measure(steps, device, SECONDS).items()
    }


class _Idle:
    """A `problem.Backend` that has made its results beforehand."""

    def __init__(self, input: Tensor) -> None:
        self._loss, self._gradient = input.new_zeros(()), torch.zeros_like(input)

    def forward(
        self, problem: Problem, needs: Needs, *, may_be_replayed: bool = False
    ) -> tuple[Tensor, Gradients]:
        # (Were somebody else to hold it too, autograd would copy the gradient.)
        return self._loss.detach(), (self._gradient.detach(), None, None, None)

    def scale(self, gradients: Gradients, upstream: Tensor, has_masks: bool = False) -> Gradients:
        return gradients
