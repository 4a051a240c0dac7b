"""On a GPU: graphs, streams, devices and host threads at once, and always the same bits.

A launch adds up partial sums with the help of a ticket. Launches that share one while they run
together would hang, or add up what is not theirs; so would a graph that was captured with a ticket
which it does not reset. The operands are large enough for more than one program.
"""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from fused_smoothl1 import smooth_l1_loss
from fused_smoothl1.functional import Reduction
from tests import support
from tests.support import (
    CALLS,
    DEVICE,
    REDUCTIONS,
    assert_equal,
    boxes,
    call,
    coin,
    results,
    values,
)

pytestmark = [support.needs_gpu, support.on_both]

ROWS = 100_003

Run = Callable[[], list[Any]]
_run = partial(results, smooth_l1_loss, upstream=1.5, sigma=2.0)


@pytest.fixture(autouse=True)
def _finished() -> Iterator[None]:
    """Leave no work behind for the next test, nor an error that only a synchronisation shows."""
    yield
    torch.cuda.synchronize()


def _operands(rows: int = ROWS) -> list[Any]:
    return boxes(rows, coin(rows, 1), (4,))


def _capture(run: Run) -> tuple[torch.cuda.CUDAGraph, list[Any]]:
    """Warm up on a side stream, as PyTorch asks for, and capture."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run()
    return graph, found


def on_streams(runs: list[Run]) -> Iterator[list[Any]]:
    """Run each again and again, on streams that come and go."""
    found = []
    for run in 30 * runs:
        with torch.cuda.stream(torch.cuda.Stream()):
            found.append(run())
    yield found


def in_threads(runs: list[Run]) -> Iterator[list[Any]]:
    """Run each again and again in a host thread; half of them on one stream, half on their own."""
    start = threading.Barrier(len(runs))

    def work(index: int) -> list[Any]:
        stream = torch.cuda.Stream() if index % 2 else torch.cuda.default_stream()
        start.wait()
        with torch.cuda.stream(stream):
            found = [runs[index]() for _ in range(50)]
        stream.synchronize()
        return found

    # (Not in a `with`, which would wait for a thread that hangs.)
    found = list(ThreadPoolExecutor(len(runs)).map(work, range(len(runs)), timeout=120))
    yield from map(list, zip(*found, strict=True))


def in_graphs(runs: list[Run], own_streams: bool = False) -> Iterator[list[Any]]:
    """Replay a graph of each, more than once in a row and over spoilt results, by eager calls."""
    graphs, found = zip(*map(_capture, runs), strict=True)
    main = torch.cuda.current_stream()
    streams = [torch.cuda.Stream() if own_streams else main for _ in runs]
    torch.cuda.synchronize()
    for _ in range(20):
        eager = []
        for run, graph, spoilt, stream in zip(runs, graphs, found, streams, strict=True):
            with torch.cuda.stream(stream):
                for one in spoilt:
                    one.fill_(torch.nan)
                for _ in range(3):
                    graph.replay()
            eager.append(run())
        yield [*eager, *found]


def in_branches(runs: list[Run]) -> Iterator[list[Any]]:
    """Replay one graph of all, which may run some at the same time, and runs others in a row."""
    branches = [torch.cuda.Stream() for _ in range(3)]

    def branched() -> list[Any]:
        main = torch.cuda.current_stream()
        found = []
        for branch in branches:
            branch.wait_stream(main)
        for i, run in enumerate(runs):
            with torch.cuda.stream(branches[i % 3]):
                found.append(run())
        for branch in branches:
            main.wait_stream(branch)
        return found

    graph, found = _capture(branched)
    for _ in range(50):
        graph.replay()
    yield found


CONTEXTS: dict[str, Callable[[list[Run]], Iterator[list[Any]]]] = {
    "streams": on_streams,
    "threads": in_threads,
    "graphs, one stream": in_graphs,
    "graphs": partial(in_graphs, own_streams=True),
    "branches of a graph": in_branches,
}


def _check(context: str, runs: list[Run]) -> None:
    expected = [run() for run in runs]
    torch.cuda.synchronize()
    for found in CONTEXTS[context](runs):
        torch.cuda.synchronize()
        assert_equal(found, len(found) // len(runs) * expected)


@pytest.mark.parametrize("context", CONTEXTS)
def test_at_once(context: str) -> None:
    """Calls of several sizes."""
    _check(context, [partial(_run, _operands(50_000 + 17_001 * i)) for i in range(6)])


@support.on_kernel
@pytest.mark.parametrize("rows", [33, 200_003], ids=["one_block", "many"])
@pytest.mark.parametrize("name", CALLS)
def test_every_kind_of_call(name: str, rows: int) -> None:
    operands, options = call(name, rows)
    run = partial(results, smooth_l1_loss, operands, 1.5, **options)
    for context in ("streams", "graphs, one stream"):
        _check(context, [run])


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_graph_with_new_values(reduction: Reduction) -> None:
    """Of operands and normalizer: nothing of them was read when the graph was made."""

    def run(operands: list[Any], number: Tensor) -> list[Tensor]:
        normalizer = number if reduction == "sum" else None
        return _run(operands, reduction=reduction, normalizer=normalizer)

    static, *others = [(_operands(), torch.tensor(0.5 + i, device=DEVICE)) for i in range(4)]
    graph, found = _capture(partial(run, *static))
    for operands, number in others:
        with torch.no_grad():
            for one, source in zip([*static[0], static[1]], [*operands, number], strict=True):
                one.copy_(source)
        graph.replay()
        torch.cuda.synchronize()
        assert_equal(found, run(operands, number))


@support.on_kernel
def test_graph_of_a_training_step() -> None:
    """Forward, backward and optimiser in one graph learn as they do in eager PyTorch."""
    features, target = values(4096, 8), values(4096, 4)
    weights = [values(8, 4, seed=1, grad=True) for _ in range(2)]
    one, other = (torch.optim.Adam([own], lr=0.01, capturable=True) for own in weights)

    def step(weight: Tensor, optimizer: torch.optim.Optimizer) -> list[Tensor]:
        optimizer.zero_grad(set_to_none=False)
        loss = smooth_l1_loss(features @ weight, target, sigma=3.0)
        loss.backward()
        optimizer.step()
        return [loss.detach()]

    graph, found = _capture(partial(step, weights[0], one))
    for _ in range(10):
        graph.replay()
    # Capturing runs nothing; warming up ran two steps.
    expected = [step(weights[1], other) for _ in range(12)][-1]
    torch.cuda.synchronize()
    assert_close([*found, weights[0]], [*expected, weights[1]])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="waits for a machine with two GPUs")
def test_several_devices() -> None:
    """The operands decide, whichever device is the current one."""
    names = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    first = _operands()
    cases = [[t.detach().to(name).requires_grad_(t.requires_grad) for t in first] for name in names]
    found = [[one.cpu() for one in _run(case)] for case in 20 * cases]
    assert torch.cuda.current_device() == 0
    assert_close(found, len(found) * found[:1])


@support.on_kernel
def test_compiled_with_graphs() -> None:
    """torch.compile's own CUDA graphs, around the registered operator.

    No call before has reserved a workspace that it could use: it must not keep one in the graphs'
    memory.
    """
    from fused_smoothl1 import launch

    torch._dynamo.reset()
    compiled = torch.compile(smooth_l1_loss, fullgraph=True, mode="reduce-overhead")
    for _ in range(4):
        operands = _operands()
        launch._kept_workspace.cache_clear()
        torch.compiler.cudagraph_mark_step_begin()
        found = results(compiled, operands, upstream=1.5, sigma=2.0)
        assert not launch._kept_workspace.cache_info().currsize
        assert_close(found, _run(operands))
    torch._dynamo.reset()


@torch.library.custom_op("fused_smoothl1_tests::loss_and_gradient", mutates_args=())
def _loss_and_gradient(input: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """A user's operator, opaque to the compiler, that calls the library."""
    with torch.enable_grad():
        loss, gradient = _run([input.detach().requires_grad_(), target], reduction="sum")
    return loss, gradient


@_loss_and_gradient.register_fake
def _(input: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    return input.new_empty(()), torch.empty_like(input)


@support.on_kernel
def test_users_operator_compiled_with_graphs() -> None:
    """The library is not seen there, and what it keeps must not lie in the graphs' memory.

    Its first launch on the stream where torch.compile warms the graphs up reserves a workspace.
    """
    from fused_smoothl1 import launch

    def step(input: Tensor, target: Tensor) -> list[Tensor]:
        loss, gradient = _loss_and_gradient(input, target)
        return [loss * 2, gradient + 1]

    torch._dynamo.reset()
    launch._kept_workspace.cache_clear()
    compiled = torch.compile(step, fullgraph=True, mode="reduce-overhead")
    for _ in range(4):
        operands = boxes(ROWS, grad=0)
        torch.compiler.cudagraph_mark_step_begin()
        found = [tensor.clone() for tensor in compiled(*operands)]
        assert_close(found, step(*operands))
    kept = launch._kept_workspace.cache_info().currsize
    assert kept > 1, "one was reserved while the graphs were warmed up"
    torch._dynamo.reset()
