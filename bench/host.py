"""Host time of a call too small for the device to matter: what a wrapper costs by itself."""

import torch
import torch.nn.functional as F  # noqa: N812 (the name PyTorch users know it by)
from torch import Tensor

from bench.measure import Action, Timing, measure
from fused_smoothl1 import smooth_l1_loss

NUMEL = 1024
SECONDS = 1.0


def host_timings(device: torch.device) -> dict[str, Timing]:
    """Return the time of forward + backward on `NUMEL` float32 elements for each contender.

    `smooth_l1_loss_plain` is PyTorch's own loss without any weights, `eager_composition` the same
    with two weights around it, as in the workloads; `fused_plain` and `fused` do the same work.
    """
    generator = torch.Generator().manual_seed(0)
    input, target, inside, outside = (
        torch.randn(NUMEL, generator=generator).to(device) for _ in range(4)
    )
    input.requires_grad_()

    def composition() -> Tensor:
        x = inside * (input - target)
        losses = F.smooth_l1_loss(x, torch.zeros_like(x), reduction="none")
        return (outside * losses).mean()

    contenders = {
        "smooth_l1_loss_plain": lambda: F.smooth_l1_loss(input, target),
        "fused_plain": lambda: smooth_l1_loss(input, target),
        "eager_composition": composition,
        "fused": lambda: smooth_l1_loss(input, target, inside, outside),
    }

    def step(loss: Action) -> Action:
        def run() -> None:
            input.grad = None
            loss().backward()  # type: ignore[attr-defined]

        return run

    return measure({name: [step(loss)] for name, loss in contenders.items()}, device, SECONDS)
