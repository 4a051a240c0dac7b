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
from torch import Tensor, nn
from torch.testing import assert_close

from fused_smoothl1 import SmoothL1Loss, smooth_l1_loss
from fused_smoothl1.functional import Reduction
from tests.support import (
    CALLS,
    REDUCTIONS,
    assert_equal,
    boxes,
    call,
    coin,
    needs_gpu,
    on_both,
    on_kernel,
    results,
    values,
)

pytestmark = [needs_gpu, on_kernel]

ROWS = 100_003


@pytest.fixture(autouse=True)
def _finished() -> Iterator[None]:
    """Leave no work behind for the next test, nor an error that only a synchronisation shows."""
    yield
    torch.cuda.synchronize()


def _operands(rows: int = ROWS) -> list[Any]:
    return boxes(rows, coin(rows, 1), (4,))


_run = partial(results, smooth_l1_loss, upstream=1.5, sigma=2.0)


def _capture(
    function: Callable[..., list[Tensor]], *arguments: Any, **options: Any
) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
    """Warm up on a side stream, as PyTorch asks for, and capture."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            function(*arguments, **options)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = function(*arguments, **options)
    return graph, found


@on_both
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_graph_with_new_inputs(reduction: Reduction) -> None:
    static = _operands()
    graph, found = _capture(_run, static, reduction=reduction)
    for _ in range(3):
        other = _operands()
        with torch.no_grad():
            for one, source in zip(static, other, strict=True):
                one.copy_(source)
        graph.replay()
        torch.cuda.synchronize()
        assert_equal(found, _run(other, reduction=reduction))


def test_graph_reads_the_normalizer() -> None:
    """Nothing of its value was read when the graph was made."""
    normalizer = torch.tensor(1.0, device="cuda")
    graph, found = _capture(_run, _operands(), reduction="sum", normalizer=normalizer)
    graph.replay()
    whole = [one.clone() for one in found]
    normalizer.fill_(8.0)
    graph.replay()
    torch.cuda.synchronize()
    assert_equal([one * 8 for one in found], whole)


def test_graph_of_a_training_step() -> None:
    """Forward, backward and optimiser in one graph learn as they do in eager PyTorch."""
    features, target = values(4096, 8), values(4096, 4)
    criterion = SmoothL1Loss(sigma=3.0)
    heads = [nn.Linear(8, 4).cuda() for _ in range(2)]
    heads[1].load_state_dict(heads[0].state_dict())

    def stepper(head: nn.Linear) -> Callable[[], list[Tensor]]:
        optimizer = torch.optim.Adam(head.parameters(), lr=0.01, capturable=True)

        def step() -> list[Tensor]:
            optimizer.zero_grad(set_to_none=False)
            loss: Tensor = criterion(head(features), target)
            loss.backward()
            optimizer.step()
            return [loss.detach()]

        return step

    graph, found = _capture(stepper(heads[0]))
    for _ in range(10):
        graph.replay()
    # Capturing runs nothing; warming up ran two steps.
    step = stepper(heads[1])
    expected = [step() for _ in range(12)][-1]
    torch.cuda.synchronize()
    assert_close(found, expected)
    assert_close(heads[0].weight, heads[1].weight)


@pytest.mark.parametrize("at_once", [False, True], ids=["in_turns", "at_once"])
def test_several_graphs(at_once: bool) -> None:
    """Of several sizes, on one stream or each on its own, more than once, beside eager calls."""
    cases = [_operands(rows) for rows in (ROWS, 70_001, 150_000, ROWS)]
    expected = [_run(case) for case in cases]
    graphs, found = zip(*[_capture(_run, case) for case in cases], strict=True)
    main = torch.cuda.current_stream()
    streams = [torch.cuda.Stream() if at_once else main for _ in cases]
    torch.cuda.synchronize()
    for _ in range(20):
        eager = []
        for graph, stream, case in zip(graphs, streams, cases, strict=True):
            with torch.cuda.stream(stream):
                for _ in range(3):
                    graph.replay()
            eager.append(_run(case))
        torch.cuda.synchronize()
        assert_equal([*found, *eager], 2 * expected)


def test_branches_inside_one_graph() -> None:
    """Launches that a graph may run at the same time, or in a row, do not share a ticket."""
    cases = [_operands() for _ in range(6)]
    expected = [_run(case) for case in cases]
    branches = [torch.cuda.Stream() for _ in range(3)]

    def run() -> list[Any]:
        main = torch.cuda.current_stream()
        found = []
        for branch in branches:
            branch.wait_stream(main)
        for case, branch in zip(cases, 2 * branches, strict=True):
            with torch.cuda.stream(branch):
                found.append(_run(case))
        for branch in branches:
            main.wait_stream(branch)
        return found

    graph, found = _capture(run)
    for _ in range(50):
        graph.replay()
    torch.cuda.synchronize()
    assert_equal(found, expected)


@on_both
def test_several_streams_at_once() -> None:
    """Which come and go."""
    cases = [_operands() for _ in range(6)]
    expected = [_run(case) for case in cases]
    torch.cuda.synchronize()
    found = []
    for case in 30 * cases:
        with torch.cuda.stream(torch.cuda.Stream()):
            found.append(_run(case))
    torch.cuda.synchronize()
    assert_equal(found, 30 * expected)


@on_both
@pytest.mark.parametrize("own_streams", [False, True])
def test_several_host_threads(own_streams: bool) -> None:
    cases = [_operands(50_000 + 7_001 * i) for i in range(6)]
    expected = [_run(case) for case in cases]
    torch.cuda.synchronize()
    start = threading.Barrier(len(cases))

    def work(case: list[Any]) -> list[Any]:
        stream = torch.cuda.Stream() if own_streams else torch.cuda.default_stream()
        start.wait()
        with torch.cuda.stream(stream):
            found = [_run(case) for _ in range(50)]
        stream.synchronize()
        return found

    found = ThreadPoolExecutor(len(cases)).map(work, cases, timeout=120)
    assert_equal(list(found), [50 * [wanted] for wanted in expected])


@on_both
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="waits for a machine with two GPUs")
def test_several_devices() -> None:
    """The operands decide, whichever device is the current one."""
    names = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    first = _operands()
    cases = [[t.detach().to(name).requires_grad_(t.requires_grad) for t in first] for name in names]
    found = [_run(case) for case in 20 * cases]
    for name in names:
        torch.cuda.synchronize(name)
    assert torch.cuda.current_device() == 0
    for one in found:
        assert_close([tensor.cpu() for tensor in one], [tensor.cpu() for tensor in found[0]])


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


@pytest.mark.parametrize("rows", [33, 200_003], ids=["one_block", "many"])
@pytest.mark.parametrize("name", CALLS)
def test_every_kind_of_call(name: str, rows: int) -> None:
    """The same bits in a row, on several streams at once, and replayed over spoilt results."""
    operands, options = call(name, rows)
    run = partial(results, smooth_l1_loss, operands, 1.5, **options)
    first = run()
    streams = [torch.cuda.Stream() for _ in range(4)]
    torch.cuda.synchronize()
    found = [run() for _ in range(20)]
    for stream in 5 * streams:
        with torch.cuda.stream(stream):
            found.append(run())
    torch.cuda.synchronize()
    assert_equal(found, 40 * [first])
    graph, replayed = _capture(run)
    for _ in range(5):
        for one in replayed:
            one.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        assert_equal(replayed, first)
