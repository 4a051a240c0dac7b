"""Is a provider right? Its loss and gradient against the tests' float64 oracle."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.cases import Workload
from tests.oracle import Reference, smooth_l1

BLOCK_ELEMENTS = 2**18  # a block's float64 temporaries stay in a core's cache


@dataclass(frozen=True)
class Expected:
    """The oracle's answer: the loss, and the input's gradient in float64 on the device."""

    loss: float
    gradient: Tensor


def expected(workload: Workload) -> Expected:
    """Ask the oracle block by block of rows, in threads: NumPy lets go of the interpreter."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        blocks = list(pool.map(lambda rows: _reference(workload, rows), _row_blocks(workload)))
    gradient = torch.cat([torch.from_numpy(block.input) for block in blocks])
    loss = sum(float(block.loss) for block in blocks)
    return Expected(loss, gradient.to(workload.input.device))


def problem(workload: Workload, truth: Expected, loss: Tensor, gradient: Tensor) -> str | None:
    """Say what is wrong with an answer, or return None.

    Loss: every term is at least 0, so the sum loses at most a rounding a term; the roundings
    cancel like a random walk, sqrt(numel) of them, and a few constant ones are allowed on top.

    Gradient: about ten float32 roundings, then one to the gradient's own type; below that type's
    normal range, one step of the subnormal grid.
    """
    if loss.shape != () or gradient.shape != workload.input.shape:
        return f"wrong shapes: loss {tuple(loss.shape)}, gradient {tuple(gradient.shape)}"
    if gradient.dtype != workload.input.dtype:
        return f"the gradient is {gradient.dtype}, the input {workload.input.dtype}"
    single = torch.finfo(torch.float32).eps
    allowed = single * (16 + workload.input.numel() ** 0.5 / 4) * abs(truth.loss)
    error = abs(float(loss) - truth.loss)
    if not error <= allowed:  # written so that NaN fails
        return f"wrong loss: {float(loss):.9g}, should be {truth.loss:.9g}"
    own = torch.finfo(gradient.dtype)
    relative, absolute = own.eps + 10 * single, own.smallest_normal * own.eps
    bound = truth.gradient.abs().mul_(relative).add_(absolute)
    wrong = int((~((gradient.double() - truth.gradient).abs_() <= bound)).sum())
    return f"wrong gradient: {wrong:,} of {gradient.numel():,} elements" if wrong else None


def _row_blocks(workload: Workload) -> Iterator[slice]:
    rows = workload.input.shape[0]
    step = max(BLOCK_ELEMENTS * rows // workload.input.numel(), 1)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def _reference(workload: Workload, rows: slice) -> Reference:
    def block(tensor: Tensor | None) -> Tensor | None:
        varies = tensor is not None and tensor.shape[0] == workload.input.shape[0]
        return tensor[rows] if tensor is not None and varies else tensor

    return smooth_l1(
        workload.input.detach()[rows],
        workload.target[rows],
        block(workload.inside_weights),
        block(workload.outside_weights),
        beta=workload.sigma**-2,
        # A block does not know the whole, so it sums, and divides by what the whole divides by.
        reduction="sum",
        normalizer=_divisor(workload),
        upstream=workload.loss_scale,
    )


def _divisor(workload: Workload) -> float:
    if workload.reduction == "mean":
        return workload.input.numel()
    if workload.reduction == "batchmean":
        return workload.input.shape[0]
    return 1.0 if workload.normalizer is None else float(workload.normalizer)
