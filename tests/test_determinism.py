"""The same bits at every run, whatever order the programs run in.

The interpreter runs one program after another, so it can show neither a race nor a wrong memory
order; but it can run them in any order, as a GPU does, and the last to arrive must then add the
partial sums in an order of its own.
"""

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_smoothl1 import smooth_l1_loss
from fused_smoothl1.functional import Reduction
from tests.conftest import on_interpreter
from tests.support import coin, gaussian

# Elements: more tiles of any type than the interpreter has programs, and a tail.
SEVERAL = 5_011

on_gpu = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="waits for a CUDA GPU: programs that run at once"
)


def _operands(n: int, device: str, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    # Magnitudes over nine decades: any other order of a float32 sum gives other bits.
    spread = torch.logspace(-5, 4, n, dtype=torch.float64)[torch.randperm(n, generator=_seeded())]
    input = (gaussian(n, seed=1, dtype=torch.float64) * spread).to(dtype).to(device)
    target = gaussian(n, seed=2, dtype=dtype, device=device)
    mask, weights = coin(n, seed=3, device=device), gaussian(n, seed=4, device=device)
    return [input.requires_grad_(), target.requires_grad_(), mask, weights]


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _loss(operands: list[Tensor], reduction: Reduction = "mean") -> Tensor:
    input, target, mask, weights = operands
    return smooth_l1_loss(input, target, mask, weights, sigma=2.0, reduction=reduction)


def _run(operands: list[Tensor], reduction: Reduction = "mean") -> list[Tensor]:
    loss = _loss(operands, reduction)
    assert loss.isfinite().all()
    above = torch.full_like(loss, 1.7)
    return [loss.detach(), *torch.autograd.grad(loss, operands[:2], above)]


def _same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "batchmean"])
def test_repeated_runs(reduction: Reduction, dtype: torch.dtype, backend: str, device: str) -> None:
    operands = _operands(SEVERAL, device, dtype)
    first = _run(operands, reduction=reduction)
    for _ in range(3):
        assert _same(_run(operands, reduction=reduction), first)


@pytest.mark.smoke
def test_other_calls_in_between(backend: str, device: str) -> None:
    """A call leaves nothing behind that another one sees, neither larger nor smaller."""
    operands = _operands(SEVERAL, device)
    first = _run(operands)
    for n in (1, 30_000, 4097):
        _run(_operands(n, device), reduction="sum")
        assert _same(_run(operands), first)


def test_threads_of_the_cpu(eager_backend: str) -> None:
    """On the CPU the number of threads does not decide the bits either."""
    operands = _operands(600_011, "cpu")
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(_run(operands, reduction="sum"))
            assert _same(_run(operands, reduction="sum"), results[-1])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(results[0][1:], results[1][1:], strict=True))


def _shuffled(seed: int) -> Callable[[int], list[int]]:
    def order(n: int) -> list[int]:
        positions = list(range(n))
        random.Random(seed).shuffle(positions)
        return positions

    return order


ORDERS: dict[str, Callable[[int], list[int]]] = {
    "reversed": lambda n: list(reversed(range(n))),
    "rotated": lambda n: [(i + n // 2) % n for i in range(n)],
    "shuffled_1": _shuffled(1),
    "shuffled_2": _shuffled(2),
}


@on_interpreter
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("order", ORDERS)
def test_order_of_the_programs(
    order: str, reduction: Reduction, triton_backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    seen: list[int] = []
    original = builder.set_grid_idx

    def set_grid_idx(x: int, y: int, z: int) -> None:
        n = builder.grid_dim[0]
        x = ORDERS[order](n)[x]
        seen.append(x)
        original(x, y, z)

    operands = _operands(SEVERAL, "cpu")
    first = _run(operands, reduction=reduction)
    monkeypatch.setattr(builder, "set_grid_idx", set_grid_idx)
    assert _same(_run(operands, reduction=reduction), first)
    assert len(set(seen)) > 2, "there were programs to be put in order"
    assert seen != sorted(seen)


@pytest.mark.smoke
@on_gpu
def test_a_thousand_launches(triton_backend: str) -> None:
    operands = _operands(1_000_003, "cuda")
    first = _run(operands, reduction="sum")
    different = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(1000):
        for one, other in zip(_run(operands, reduction="sum"), first, strict=True):
            different += (one != other).sum()
    assert different.item() == 0


@pytest.mark.smoke
@on_gpu
def test_several_streams_at_once(triton_backend: str) -> None:
    operands = _operands(1_000_003, "cuda")
    first = _run(operands, reduction="sum")
    streams = [torch.cuda.Stream() for _ in range(4)]
    results: list[list[Tensor]] = []
    torch.cuda.synchronize()
    for _ in range(50):
        for stream in streams:
            with torch.cuda.stream(stream):
                results.append(_run(operands, reduction="sum"))
    torch.cuda.synchronize()
    assert all(_same(result, first) for result in results)


@pytest.mark.smoke
@on_gpu
def test_replayed_graph(triton_backend: str) -> None:
    """A captured launch keeps a ticket of its own: replays and eager calls do not meet in one."""
    operands = _operands(1_000_003, "cuda")
    first = _run(operands, reduction="sum")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        _loss(operands, reduction="sum")
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = _loss(operands, reduction="sum")
    for _ in range(20):
        graph.replay()
        eager = _loss(operands, reduction="sum")
        torch.cuda.synchronize()
        assert torch.equal(loss, first[0])
        assert torch.equal(eager, first[0])


@pytest.mark.smoke
def test_interrupted_launch(
    monkeypatch: pytest.MonkeyPatch, triton_backend: str, device: str
) -> None:
    """A launch that raises half-way leaves no ticket behind that the next one would trip over."""
    from fused_smoothl1 import launcher

    operands = _operands(SEVERAL, device)
    first = _run(operands)

    def interrupted(code: Any, programs: int, stream: int, tensors: Any, *_: Any) -> None:
        *_, partials, ticket = tensors
        partials.fill_(1e30)
        ticket.fill_(1)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(launcher.Code, "launch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            _run(operands)
    assert _same(_run(operands), first)
