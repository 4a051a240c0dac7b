"""Host time of a call too small for the device to matter: what a wrapper costs by itself."""

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 (the name PyTorch users know it by)

from bench.measure import measure
from bench.rivals import Formula, autograd_step, composition, fused_on
from bench.workloads import Spec, Workload, build
from fused_smoothl1 import smooth_l1_loss
from fused_smoothl1.contract import Gradients, Needs, Problem

NUMEL = 1024
SECONDS = 1.0


def host_us(device: torch.device) -> dict[str, dict[str, float]]:
    """Return microseconds of forward + backward on `NUMEL` float32 elements for each contender.

    `smooth_l1_loss_plain` is PyTorch's own loss without any weights, `eager_composition` the same
    with two weights around it, as in the workloads; `fused_plain` and `fused` do the same work.
    `fused_without_backend` is `fused` with nothing computed and nothing launched: the checks, the
    autograd Function and PyTorch's engine. The rest of `fused` is its backend's.
    """
    plain, dense = (build(Spec(case, NUMEL), device) for case in ("no_weights", "dense"))
    contenders: dict[str, tuple[Formula, Workload]] = {
        "smooth_l1_loss_plain": (lambda i, t, *none, **options: F.smooth_l1_loss(i, t), plain),
        "fused_plain": (smooth_l1_loss, plain),
        "eager_composition": (composition, dense),
        "fused": (smooth_l1_loss, dense),
        "fused_without_backend": (fused_on(_Idle(dense.input)), dense),
    }
    steps = {name: [autograd_step(*contender)] for name, contender in contenders.items()}
    return {
        name: {key.removesuffix("_ms"): 1e3 * ms for key, ms in timing._asdict().items()}
        for name, timing in measure(steps, device, SECONDS).items()
    }


class _Idle:
    """A `contract.Backend` that has made its results beforehand."""

    def __init__(self, input: Tensor) -> None:
        self._loss, self._gradient = input.detach().sum(), torch.zeros_like(input)

    def forward(
        self, problem: Problem, needs: Needs, *, is_recorded: bool = False
    ) -> tuple[Tensor, Gradients]:
        # (Were somebody else to hold it too, autograd would copy the gradient.)
        return self._loss.detach(), (self._gradient.detach(), None, None, None)

    def rescale(self, gradients: Gradients, upstream: Tensor) -> Gradients:
        return gradients
