"""Is a rival right? Its loss and gradient against the composition in float64, on the device.

The composition is PyTorch's own loss with the weights around it, so it shares no code with the
library; `tests/test_rivals.py` holds it against the tests' oracle.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from bench.rivals import composition
from bench.workloads import Workload

BLOCK_ELEMENTS = 2**22  # at a time: float64 temporaries of a large workload would fill a GPU
SUM_TOLERANCE = 1e-5  # of a float32 sum: what leaving out one element in 100,000 would change
ROUNDINGS = 10  # of float32, on the way to one element of the gradient or the loss


class Expected(NamedTuple):
    """The right answer in float64: the loss, and the input's gradient where there is one."""

    loss: Tensor
    gradient: Tensor | None


def expected(workload: Workload) -> Expected:
    """Compute the answer, block by block of rows."""
    rows = len(workload.input)
    step = max(BLOCK_ELEMENTS * rows // workload.input.numel(), 1)
    blocks = [_reference(workload, slice(start, start + step)) for start in range(0, rows, step)]
    losses, gradients = zip(*blocks, strict=True)
    return Expected(
        torch.cat(losses) if workload.reduction == "none" else torch.stack(losses).sum(),
        torch.cat(gradients) if workload.backward else None,
    )


def problem(
    workload: Workload, truth: Expected, loss: Tensor, gradient: Tensor | None
) -> str | None:
    """Say what is wrong with an answer, or return None.

    A reduced loss is a sum of terms of at least 0, in trees. A rival may hold single terms in the
    operands' type; those roundings cancel like a random walk. Single elements may have some float32
    roundings, and four to their own type, in which PyTorch's backward of 16-bit operands computes
    on a GPU; below that type's normal range, one step of the subnormal grid.
    """
    input = workload.input
    if loss.shape != truth.loss.shape:
        return f"wrong shape of the loss: {tuple(loss.shape)}"
    if truth.loss.shape:
        wrong = _wrong_elements(loss, truth.loss)
        if wrong:
            return f"wrong loss: {wrong:,} of {loss.numel():,} elements"
    else:
        found, right = float(loss), float(truth.loss)
        of_terms = 4 * torch.finfo(input.dtype).eps / input.numel() ** 0.5
        if not abs(found - right) <= (SUM_TOLERANCE + of_terms) * abs(right):  # so that NaN fails
            return f"wrong loss: {found:.9g}, should be {right:.9g}"
    if truth.gradient is None:
        return None
    if gradient is None or (gradient.shape, gradient.dtype) != (input.shape, input.dtype):
        kind = None if gradient is None else (tuple(gradient.shape), gradient.dtype)
        return f"wrong kind of gradient: {kind}, the input is {tuple(input.shape), input.dtype}"
    wrong = _wrong_elements(gradient, truth.gradient)
    return f"wrong gradient: {wrong:,} of {gradient.numel():,} elements" if wrong else None


def _wrong_elements(values: Tensor, truth: Tensor) -> int:
    own = torch.finfo(values.dtype)
    relative = 2 * own.eps + ROUNDINGS * torch.finfo(torch.float32).eps
    bound = truth.abs().mul_(relative).add_(own.smallest_normal * own.eps)
    return int((~((values.double() - truth).abs_() <= bound)).sum())  # so that NaN is wrong


def _reference(workload: Workload, rows: slice) -> Expected:
    def block(tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        return (tensor[rows] if len(tensor) == len(workload.input) else tensor).double()

    input = workload.input.detach()[rows].double().requires_grad_(workload.backward)
    target, inside, outside = (block(tensor) for tensor in workload.operands)
    assert target is not None
    # A block does not know the whole, so it sums, and is divided by what the whole is divided by.
    reduction = "none" if workload.reduction == "none" else "sum"
    options = {**workload.options, "reduction": reduction, "normalizer": None}
    if workload.beta is not None:
        options["beta"] = block(workload.beta)
    total = composition(input, target, inside, outside, **options)
    numbers = {"mean": workload.input.numel(), "batchmean": len(workload.input)}
    divisor = numbers.get(workload.reduction, 1)
    loss = total / (divisor if workload.normalizer is None else workload.normalizer)
    if not workload.backward:
        return Expected(loss, None)
    upstream = block(workload.upstream)
    if upstream is None:
        upstream = torch.full_like(loss, workload.loss_scale)
    (gradient,) = torch.autograd.grad(loss, input, upstream)
    return Expected(loss.detach(), gradient)
