"""The same bits at every run, whatever order the programs run in.

The interpreter runs one program after another, so it can show neither a race nor a wrong memory
order (`test_concurrency.py` looks for them on a GPU); but it can run them in any order, as a
GPU does, and the last to arrive must then add the partial sums in an order of its own.
"""

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_smoothl1 import smooth_l1_loss
from tests import support
from tests.support import DEVICE, FLOATS, REDUCTIONS, assert_equal, boxes, check, coin, results

SEVERAL = 5_011  # elements: more tiles of any type than the interpreter has programs, and a tail


def _operands(n: int = SEVERAL, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    # Over nine decades, so that a sum in another order has other bits, in float64 at least.
    spread = torch.logspace(-5, 4, n, dtype=torch.float64)[torch.randperm(n)].to(DEVICE)
    input, target, mask, weights = boxes((n,), coin(n), (n,), grad=0, dtype=torch.float64)
    trained = [tensor.to(dtype).requires_grad_() for tensor in (input * spread, target)]
    return [*trained, mask, weights.float()]


def _run(operands: list[Tensor], reduction: str = "mean") -> list[Tensor]:
    return results(smooth_l1_loss, operands, 1.7, sigma=2.0, reduction=reduction)


@support.on_both
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_repeated_runs(reduction: str, dtype: torch.dtype) -> None:
    """Other calls in between leave nothing behind that is seen, neither larger nor smaller ones."""
    operands = _operands(dtype=dtype)
    first = _run(operands, reduction)
    assert first[0].isfinite().all()
    for n in (1, 30_000, 4097):
        _run(_operands(n), "sum")
        assert_equal(_run(operands, reduction), first)


@support.on_kernel
@support.needs_no_gpu
@pytest.mark.parametrize("seed", range(3))
def test_order_of_the_programs(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.interpreter import interpreter_builder as builder

    seen: list[int] = []
    original = builder.set_grid_idx

    def set_grid_idx(x: int, y: int, z: int) -> None:
        programs = range(builder.grid_dim[0])
        seen.append(random.Random(seed).sample(programs, len(programs))[x])
        original(seen[-1], y, z)

    operands = _operands()
    first = _run(operands)
    _run(_operands())  # Leaves other partial sums behind.
    monkeypatch.setattr(builder, "set_grid_idx", set_grid_idx)
    assert_equal(_run(operands), first)
    assert sorted(seen[:8]) == [*range(8)] != seen[:8]


@support.on_kernel
@support.needs_no_gpu
def test_more_partial_sums_than_are_added_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU of more than 128 multiprocessors, each with eight programs."""
    from fused_smoothl1 import launch, launcher

    large = replace(launcher.gpu_of(torch.device("cpu")), multiprocessors=140)
    monkeypatch.setattr(launch, "gpu_of", lambda _: large)
    check(*boxes((140 * 8 * 512,), grad=0, dtype=torch.float64))


@pytest.mark.smoke
@support.on_kernel
def test_interrupted_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A launch that raises half-way leaves no ticket behind that the next one would trip over."""
    from fused_smoothl1.launcher import Code

    def interrupted(code: Any, programs: int, stream: int, tensors: Any, *_: Any) -> None:
        *_, partials, ticket = tensors
        partials.fill_(1e30)
        ticket.fill_(1)
        raise KeyboardInterrupt

    operands = _operands()
    first = _run(operands)
    with monkeypatch.context() as patch:
        patch.setattr(Code, "launch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            _run(operands)
    assert_equal(_run(operands), first)
