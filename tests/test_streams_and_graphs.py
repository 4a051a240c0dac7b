"""On a GPU: graphs, streams, devices and host threads at once, and always the same bits.

A launch adds up partial sums with the help of a ticket. Launches that share one while they run
together would hang, or add up what is not theirs; so would a graph that was captured with a ticket
which it does not reset. The operands are large enough for more than one program.
"""

import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench.codegen.calls import calls
from fused_smoothl1 import SmoothL1Loss, smooth_l1_loss
from fused_smoothl1.functional import Reduction
from tests.support import coin, gaussian, maker
from tests.variants import trained

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="waits for a CUDA GPU: streams and graphs are of CUDA"
)
several_gpus = pytest.mark.skipif(
    torch.cuda.device_count() < 2, reason="waits for a machine with two GPUs"
)

ROWS = 100_003


@pytest.fixture(autouse=True)
def _finished() -> Iterator[None]:
    """Leave no work behind for the next test, nor an error that only a synchronisation shows."""
    yield
    torch.cuda.synchronize()


def _operands(seed: int = 0, rows: int = ROWS, device: str = "cuda") -> list[Any]:
    return [
        gaussian(rows, 4, seed=seed, device=device, requires_grad=True),
        gaussian(rows, 4, seed=seed + 1, device=device),
        coin(rows, 1, seed=seed + 2, device=device),
        gaussian(4, seed=seed + 3, device=device),
    ]


def _run(operands: list[Any], reduction: Reduction = "mean", **options: Any) -> list[Tensor]:
    if "beta" not in options:
        options = {"sigma": 2.0, **options}
    loss = smooth_l1_loss(*operands, reduction=reduction, **options)
    wanted = trained(operands)
    above = torch.full_like(loss, 1.5)
    return [loss.detach(), *(torch.autograd.grad(loss, wanted, above) if wanted else ())]


def _same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def _copy(into: list[Any], source: list[Any]) -> None:
    with torch.no_grad():
        for one, other in zip(into, source, strict=True):
            one.copy_(other)


def _capture(function: Callable[[], list[Tensor]]) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
    """Warm up on a side stream, as PyTorch asks for, and capture."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = function()
    return graph, results


@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "batchmean"])
def test_graph_with_new_inputs(reduction: Reduction, backend: str) -> None:
    static = _operands()
    graph, results = _capture(lambda: _run(static, reduction))
    for seed in (10, 20, 30):
        other = _operands(seed)
        _copy(static, other)
        graph.replay()
        torch.cuda.synchronize()
        assert _same(results, _run(other, reduction))


def test_graph_reads_the_normalizer(triton_backend: str) -> None:
    """Nothing of its value was read when the graph was made."""
    static, normalizer = _operands(), torch.tensor(1.0, device="cuda")

    def run() -> list[Tensor]:
        return [smooth_l1_loss(*static, reduction="sum", normalizer=normalizer).detach()]

    graph, (loss,) = _capture(run)
    graph.replay()
    whole = loss.clone()
    normalizer.fill_(8.0)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(loss * 8, whole)


def test_graph_of_a_training_step(triton_backend: str) -> None:
    """Forward, backward and optimiser in one graph learn as they do in eager PyTorch."""
    features, target = gaussian(4096, 8, seed=1).cuda(), gaussian(4096, 4, seed=2).cuda()
    criterion = SmoothL1Loss(sigma=3.0)

    def make() -> tuple[nn.Linear, torch.optim.Optimizer]:
        torch.manual_seed(0)
        head = nn.Linear(8, 4).cuda()
        return head, torch.optim.Adam(head.parameters(), lr=0.01, capturable=True)

    def step(head: nn.Linear, optimizer: torch.optim.Optimizer) -> list[Tensor]:
        optimizer.zero_grad(set_to_none=False)
        loss: Tensor = criterion(head(features), target)
        loss.backward()
        optimizer.step()
        return [loss.detach()]

    one, other = make(), make()
    graph, (loss,) = _capture(lambda: step(*one))
    for _ in range(10):
        graph.replay()
    # Capturing runs nothing; warming up ran two steps.
    for _ in range(12):
        (expected,) = step(*other)
    torch.cuda.synchronize()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(one[0].weight, other[0].weight)


def test_several_graphs(triton_backend: str) -> None:
    """Of several sizes, replayed in turns, between eager calls, and more than once in a row."""
    cases = [_operands(seed, rows) for seed, rows in ((0, ROWS), (10, 70_001), (20, 150_000))]
    expected = [_run(case) for case in cases]
    captured = [_capture(lambda case=case: _run(case)) for case in cases]  # type: ignore[misc]
    for _ in range(20):
        for (graph, results), wanted, case in zip(captured, expected, cases, strict=True):
            graph.replay()
            graph.replay()
            eager = _run(case)
            torch.cuda.synchronize()
            assert _same(results, wanted)
            assert _same(eager, wanted)


def test_two_losses_in_one_graph(triton_backend: str) -> None:
    cases = [_operands(seed) for seed in (0, 10)]
    expected = [tensor for case in cases for tensor in _run(case)]
    graph, results = _capture(lambda: [tensor for case in cases for tensor in _run(case)])
    for _ in range(20):
        graph.replay()
    torch.cuda.synchronize()
    assert _same(results, expected)


def test_graphs_on_several_streams_at_once(triton_backend: str) -> None:
    """Graphs captured on one stream, replayed together on others, beside eager calls."""
    cases = [_operands(10 * i) for i in range(4)]
    expected = [_run(case) for case in cases]
    captured = [_capture(lambda case=case: _run(case)) for case in cases]  # type: ignore[misc]
    streams = [torch.cuda.Stream() for _ in cases]
    torch.cuda.synchronize()
    for _ in range(50):
        for (graph, _), stream in zip(captured, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
        eager = _run(cases[0])
    torch.cuda.synchronize()
    assert _same(eager, expected[0])
    for (_, results), wanted in zip(captured, expected, strict=True):
        assert _same(results, wanted)


def test_branches_inside_one_graph(triton_backend: str) -> None:
    """Launches that a graph may run at the same time do not share a ticket."""
    cases = [_operands(10 * i) for i in range(3)]
    expected = [tensor for case in cases for tensor in _run(case)]
    branches = [torch.cuda.Stream() for _ in cases]

    def run() -> list[Tensor]:
        results: list[Tensor] = []
        main = torch.cuda.current_stream()
        for case, branch in zip(cases, branches, strict=True):
            branch.wait_stream(main)
            with torch.cuda.stream(branch):
                results += _run(case)
        for branch in branches:
            main.wait_stream(branch)
        return results

    graph, results = _capture(run)
    for _ in range(50):
        graph.replay()
    torch.cuda.synchronize()
    assert _same(results, expected)


def test_several_streams_at_once(backend: str) -> None:
    cases = [_operands(10 * i) for i in range(6)]
    expected = [_run(case) for case in cases]
    streams = [torch.cuda.Stream() for _ in cases]
    torch.cuda.synchronize()
    results: list[tuple[int, list[Tensor]]] = []
    for _ in range(30):
        for index, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                results.append((index, _run(cases[index])))
    torch.cuda.synchronize()
    assert all(_same(found, expected[index]) for index, found in results)


@pytest.mark.parametrize("own_streams", [False, True])
def test_several_host_threads(own_streams: bool, backend: str) -> None:
    cases = [_operands(10 * i, 50_000 + 7_001 * i) for i in range(6)]
    expected = [_run(case) for case in cases]
    torch.cuda.synchronize()
    start = threading.Barrier(len(cases))
    failures: list[int] = []

    def work(index: int) -> None:
        stream = torch.cuda.Stream() if own_streams else torch.cuda.default_stream()
        start.wait()
        with torch.cuda.stream(stream):
            found = [_run(cases[index]) for _ in range(50)]
        stream.synchronize()
        if not all(_same(one, expected[index]) for one in found):
            failures.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(cases))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
        assert not thread.is_alive(), "a thread hangs"
    assert failures == []


def test_a_stream_that_is_gone(triton_backend: str) -> None:
    """Streams come and go, and their numbers with them."""
    operands = _operands()
    expected = _run(operands)
    torch.cuda.synchronize()
    for _ in range(100):
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            found = _run(operands)
        stream.synchronize()
        del stream
        assert _same(found, expected)


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_a_thousand_launches(reduction: Reduction, triton_backend: str) -> None:
    operands = _operands()
    first = _run(operands, reduction)
    different = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(1000):
        for one, other in zip(_run(operands, reduction), first, strict=True):
            different += (one != other).sum()
    assert different.item() == 0


@several_gpus
def test_several_devices(backend: str) -> None:
    """The operands decide, whichever device is the current one."""
    names = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    expected = [tensor.cpu() for tensor in _run(_operands(device="cuda:0"))]
    results = []
    for _ in range(20):
        results += [_run(_operands(device=name)) for name in names]
    for name in names:
        torch.cuda.synchronize(name)
    assert torch.cuda.current_device() == 0
    for found in results:
        torch.testing.assert_close([tensor.cpu() for tensor in found], expected)


def test_compiled_with_graphs(triton_backend: str) -> None:
    """torch.compile's own CUDA graphs, around the registered operator.

    No call before has reserved a workspace that it could use: it must not keep one in the graphs'
    memory.
    """
    from fused_smoothl1 import launch

    torch._dynamo.reset()
    compiled = torch.compile(smooth_l1_loss, fullgraph=True, mode="reduce-overhead")
    for seed in (0, 10, 20, 30):
        operands = _operands(seed)
        launch._kept_workspace.cache_clear()
        torch.compiler.cudagraph_mark_step_begin()
        loss = compiled(*operands, sigma=2.0)
        (gradient,) = torch.autograd.grad(loss, operands[0])
        assert not launch._kept_workspace.cache_info().currsize
        expected = smooth_l1_loss(*operands, sigma=2.0)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(gradient, torch.autograd.grad(expected, operands[0])[0])
    torch._dynamo.reset()


@torch.library.custom_op("fused_smoothl1_tests::loss_and_gradient", mutates_args=())
def _loss_and_gradient(input: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """A user's operator, opaque to the compiler, that calls the library."""
    with torch.enable_grad():
        source = input.detach().requires_grad_()
        loss = smooth_l1_loss(source, target, sigma=2.0, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, source)
    return loss.detach(), gradient


@_loss_and_gradient.register_fake
def _(input: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    return input.new_empty((), dtype=torch.float32), torch.empty_like(input)


def test_users_operator_compiled_with_graphs(triton_backend: str) -> None:
    """The library is not seen there, and what it keeps must not lie in the graphs' memory.

    Its first launch on the stream where torch.compile warms the graphs up reserves a workspace.
    """
    from fused_smoothl1 import launch

    def step(input: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        loss, gradient = _loss_and_gradient(input, target)
        return loss * 2, gradient + 1

    torch._dynamo.reset()
    launch._kept_workspace.cache_clear()
    compiled = torch.compile(step, fullgraph=True, mode="reduce-overhead")
    for seed in (0, 10, 20, 30):
        input, target, *_ = _operands(seed)
        torch.compiler.cudagraph_mark_step_begin()
        found = [tensor.clone() for tensor in compiled(input.detach(), target)]
        torch.testing.assert_close(found, list(step(input.detach(), target)))
    kept = launch._kept_workspace.cache_info().currsize
    assert kept > 1, "one was reserved while the graphs were warmed up"
    torch._dynamo.reset()


@pytest.mark.parametrize("rows", [33, 200_003], ids=["one_block", "many"])
def test_every_kind_of_call(rows: int, triton_backend: str) -> None:
    """The same bits in a row, on several streams at once, and replayed over spoilt results."""
    streams = [torch.cuda.Stream() for _ in range(4)]
    for call in calls(rows):
        operands, options = call.bind(maker("cuda"))
        first = _run(operands, **options)
        torch.cuda.synchronize()
        found = [_run(operands, **options) for _ in range(20)]
        for stream in 5 * streams:
            with torch.cuda.stream(stream):
                found.append(_run(operands, **options))
        torch.cuda.synchronize()
        assert all(_same(one, first) for one in found), call.name
        graph, results = _capture(partial(_run, operands, **options))
        for _ in range(5):
            for result in results:
                result.fill_(torch.nan)
            graph.replay()
            torch.cuda.synchronize()
            assert _same(results, first), call.name
