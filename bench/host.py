"""Host time of a call too small for the device to matter: what a wrapper costs by itself."""

from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (the name PyTorch users know it by)
from torch import Tensor

from bench.measure import Action, Timing, measure
from fused_smoothl1 import functional, smooth_l1_loss
from fused_smoothl1.contract import Gradients, Needs, Problem

NUMEL = 1024
SECONDS = 1.0


def host_timings(device: torch.device) -> dict[str, Timing]:
    """Return the time of forward + backward on `NUMEL` float32 elements for each contender.

    `smooth_l1_loss_plain` is PyTorch's own loss without any weights, `eager_composition` the same
    with two weights around it, as in the workloads; `fused_plain` and `fused` do the same work.
    `fused_without_backend` is `fused` with nothing computed and nothing launched: the checks, the
    autograd Function and PyTorch's engine. The rest of `fused` is its backend's.
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

    idle: Callable[..., Tensor] = _with_backend(_Idle(input.detach()))
    contenders = {
        "smooth_l1_loss_plain": lambda: F.smooth_l1_loss(input, target),
        "fused_plain": lambda: smooth_l1_loss(input, target),
        "eager_composition": composition,
        "fused": lambda: smooth_l1_loss(input, target, inside, outside),
        "fused_without_backend": lambda: idle(input, target, inside, outside),
    }

    def step(loss: Action) -> Action:
        def run() -> None:
            input.grad = None
            loss().backward()  # type: ignore[attr-defined]

        return run

    return measure({name: [step(loss)] for name, loss in contenders.items()}, device, SECONDS)


class _Idle:
    """A `contract.Backend` that has made its results beforehand."""

    def __init__(self, input: Tensor) -> None:
        self._loss, self._gradient = input.new_zeros(()), torch.zeros_like(input)

    def forward(
        self, problem: Problem, needs: Needs, *, is_recorded: bool = False
    ) -> tuple[Tensor, Gradients]:
        # (Were somebody else to hold it too, autograd would copy the gradient.)
        return self._loss.detach(), (self._gradient.detach(), None, None, None)

    def rescale(self, gradients: Gradients, upstream: Tensor) -> Gradients:
        return gradients


def _with_backend(backend: Any) -> Callable[..., Tensor]:
    """Return the public function as it would be if the dispatch chose this backend."""
    namespace = {**vars(functional), "backend_for": lambda input: backend}
    copy: Any = FunctionType(
        smooth_l1_loss.__code__, namespace, argdefs=smooth_l1_loss.__defaults__
    )
    copy.__kwdefaults__ = smooth_l1_loss.__kwdefaults__
    function: Callable[..., Tensor] = copy
    return function
