"""Is a provider right? Its loss and gradient against the composition in float64, on the device.

The composition is PyTorch's own loss with the weights around it, so it shares no code with the
library; `tests/test_bench.py` holds it against the tests' oracle.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.cases import Workload
from bench.providers import Operands, Options, composition

BLOCK_ELEMENTS = 2**22  # at a time: float64 temporaries of a large workload would fill a GPU
SUM_TOLERANCE = 1e-5  # of a float32 sum: what leaving out one element in 100,000 would change
ROUNDINGS = 10  # of float32, on the way to one element of the gradient or the loss


@dataclass(frozen=True)
class Expected:
    """The right answer in float64: the loss, and the input's gradient where there is one."""

    loss: Tensor
    gradient: Tensor | None


def expected(workload: Workload) -> Expected:
    """Compute the answer, block by block of rows."""
    blocks = [_reference(workload, rows) for rows in _row_blocks(workload)]
    losses, gradients = zip(*blocks, strict=True)
    return Expected(
        torch.cat(losses) if workload.reduction == "none" else torch.stack(losses).sum(),
        torch.cat(gradients) if workload.backward else None,
    )


def problem(
    workload: Workload, truth: Expected, loss: Tensor, gradient: Tensor | None
) -> str | None:
    """Say what is wrong with an answer, or return None.

    A reduced loss: every term is at least 0, and everybody adds up in trees, so that little is
    lost. A rival may hold single terms in the operands' type; those roundings cancel like a random
    walk.

    Every element of a loss or a gradient: some float32 roundings, and four to its own type, in
    which PyTorch's backward of 16-bit operands computes on a GPU; below that type's normal range,
    one step of the subnormal grid.
    """
    if loss.shape != truth.loss.shape:
        return f"wrong shape of the loss: {tuple(loss.shape)}"
    if truth.loss.shape:
        wrong = _wrong_elements(loss, truth.loss)
        if wrong:
            return f"wrong loss: {wrong:,} of {loss.numel():,} elements"
    else:
        of_terms = 4 * torch.finfo(workload.input.dtype).eps / workload.input.numel() ** 0.5
        allowed = (SUM_TOLERANCE + of_terms) * abs(float(truth.loss))
        error = abs(float(loss) - float(truth.loss))
        if not error <= allowed:  # written so that NaN fails
            return f"wrong loss: {float(loss):.9g}, should be {float(truth.loss):.9g}"
    if truth.gradient is None:
        return None
    if gradient is None or gradient.shape != workload.input.shape:
        return f"wrong shape of the gradient: {gradient if gradient is None else gradient.shape}"
    if gradient.dtype != workload.input.dtype:
        return f"the gradient is {gradient.dtype}, the input {workload.input.dtype}"
    wrong = _wrong_elements(gradient, truth.gradient)
    return f"wrong gradient: {wrong:,} of {gradient.numel():,} elements" if wrong else None


def _wrong_elements(values: Tensor, truth: Tensor) -> int:
    own = torch.finfo(values.dtype)
    relative = 2 * own.eps + ROUNDINGS * torch.finfo(torch.float32).eps
    bound = truth.abs().mul_(relative).add_(own.smallest_normal * own.eps)
    return int((~((values.double() - truth).abs_() <= bound)).sum())  # so that NaN is wrong


def _row_blocks(workload: Workload) -> Iterator[slice]:
    rows = workload.input.shape[0]
    step = max(BLOCK_ELEMENTS * rows // workload.input.numel(), 1)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def _reference(workload: Workload, rows: slice) -> tuple[Tensor, Tensor | None]:
    def block(tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        return (tensor[rows] if tensor.shape[0] == workload.input.shape[0] else tensor).double()

    operands = Operands(
        workload.target[rows].double(),
        block(workload.inside_weights),
        block(workload.outside_weights),
        None,
    )
    input = workload.input.detach()[rows].double().requires_grad_(workload.backward)
    # A block does not know the whole, so it sums, and is divided by what the whole is divided by.
    reduction = "none" if workload.reduction == "none" else "sum"
    loss = composition(input, operands, Options(workload.sigma, reduction)) / workload.divisor
    if not workload.backward:
        return loss, None
    upstream = block(workload.upstream)
    if upstream is None:
        upstream = torch.full_like(loss, workload.loss_scale)
    (gradient,) = torch.autograd.grad(loss, input, upstream)
    return loss.detach(), gradient
