"""The same bits at every run, whatever order the programs run in.

The interpreter runs one program after another, so it can show neither a race nor a wrong memory
order; but it can run them in any order, as a GPU does, and the last to arrive must then add the
partial sums in an order of its own.
"""

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_smoothl1 import smooth_l1_loss
from tests import support
from tests.support import DEVICE, FLOATS, REDUCTIONS, assert_equal, boxes, coin, results

pytestmark = support.on_both

# Elements: more tiles of any type than the interpreter has programs, and a tail.
SEVERAL = 5_011
MANY = 1_000_003


def _operands(n: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    # Magnitudes over nine decades: any other order of a float32 sum gives other bits.
    spread = torch.logspace(-5, 4, n, dtype=torch.float64)[torch.randperm(n)].to(DEVICE)
    input, target, mask, weights = boxes((n,), coin(n), (n,), grad=0, dtype=torch.float64)
    trained = [tensor.to(dtype).requires_grad_() for tensor in (input * spread, target)]
    return [*trained, mask, weights.float()]


def _run(operands: list[Tensor], reduction: str = "mean") -> list[Tensor]:
    return results(smooth_l1_loss, operands, 1.7, sigma=2.0, reduction=reduction)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_repeated_runs(reduction: str, dtype: torch.dtype) -> None:
    operands = _operands(SEVERAL, dtype)
    first = _run(operands, reduction)
    assert first[0].isfinite().all()
    for _ in range(3):
        assert_equal(_run(operands, reduction), first)


@pytest.mark.smoke
def test_other_calls_in_between() -> None:
    """A call leaves nothing behind that another one sees, neither larger nor smaller."""
    operands = _operands(SEVERAL)
    first = _run(operands)
    for n in (1, 30_000, 4097):
        _run(_operands(n), "sum")
        assert_equal(_run(operands), first)


@support.on_kernel
@support.needs_no_gpu
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("seed", range(3))
def test_order_of_the_programs(seed: int, reduction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.interpreter import interpreter_builder as builder

    seen: list[int] = []
    original = builder.set_grid_idx

    def set_grid_idx(x: int, y: int, z: int) -> None:
        programs = range(builder.grid_dim[0])
        seen.append(random.Random(seed).sample(programs, len(programs))[x])
        original(seen[-1], y, z)

    operands = _operands(SEVERAL, torch.float64)  # Float32 would round a difference away.
    first = _run(operands, reduction)
    _run(_operands(SEVERAL, torch.float64), reduction)  # Leaves other partial sums behind.
    monkeypatch.setattr(builder, "set_grid_idx", set_grid_idx)
    assert_equal(_run(operands, reduction), first)
    assert len(set(seen)) > 2, "there were programs to be put in order"
    assert seen != sorted(seen)


@pytest.mark.smoke
@support.needs_gpu
@support.on_kernel
def test_a_thousand_launches() -> None:
    operands = _operands(MANY)
    first = _run(operands, "sum")
    different = torch.zeros((), dtype=torch.int64, device=DEVICE)
    for _ in range(1000):
        for one, other in zip(_run(operands, "sum"), first, strict=True):
            different += (one != other).sum()
    assert different == 0


@pytest.mark.smoke
@support.needs_gpu
@support.on_kernel
def test_several_streams_at_once() -> None:
    operands = _operands(MANY)
    first = _run(operands, "sum")
    streams = [torch.cuda.Stream() for _ in range(4)]
    torch.cuda.synchronize()
    found = []
    for stream in 50 * streams:
        with torch.cuda.stream(stream):
            found.append(_run(operands, "sum"))
    torch.cuda.synchronize()
    assert_equal(found, len(found) * [first])


@pytest.mark.smoke
@support.needs_gpu
@support.on_kernel
def test_replayed_graph() -> None:
    """A captured launch keeps a ticket of its own: replays and eager calls do not meet in one."""
    operands = _operands(MANY)
    first = smooth_l1_loss(*operands, sigma=2.0)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        smooth_l1_loss(*operands, sigma=2.0)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = smooth_l1_loss(*operands, sigma=2.0)
    for _ in range(20):
        graph.replay()
        eager = smooth_l1_loss(*operands, sigma=2.0)
        torch.cuda.synchronize()
        assert torch.equal(loss, first)
        assert torch.equal(eager, first)


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

    operands = _operands(SEVERAL)
    first = _run(operands)
    with monkeypatch.context() as patch:
        patch.setattr(Code, "launch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            _run(operands)
    assert_equal(_run(operands), first)
