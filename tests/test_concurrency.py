"""Calls at once: on streams, in graphs, in threads and in processes; and the first of a process.

On a GPU a launch adds up partial sums with the help of a ticket. Launches that share one while they
run together would hang, or add up what is not theirs; so would a graph that was captured with a
ticket which it does not reset. The operands are large enough for more than one program.
"""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain
from multiprocessing import get_all_start_methods, get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from fused_smoothl1 import smooth_l1_loss
from tests import support
from tests.composed import composed
from tests.support import CALLS, DEVICE, FLOATS, KINDS, assert_equal, boxes, call, check, results

Run = Callable[[], list[Any]]
Context = Callable[[list[Run]], Iterator[list[Any]]]
OPTIONS: dict[str, Any] = {"upstream": 1.5, "sigma": 2.0, "reduction": "sum"}
# Warms up on a side stream, captures, and returns the graph and its results.
_capture: Callable[[Run], tuple[torch.cuda.CUDAGraph, list[Any]]] = support.from_readme("captured")
_run: Callable[[list[Any]], list[Tensor]] = partial(results, smooth_l1_loss, **OPTIONS)
_compose: Callable[[list[Any]], list[Tensor]] = partial(results, composed, **OPTIONS)


@pytest.fixture(autouse=True)
def _finished() -> Iterator[None]:
    """Leave no work behind for the next test, nor an error that only a synchronisation shows."""
    yield
    if support.HAS_GPU:
        torch.cuda.synchronize()


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


def in_graphs(runs: list[Run]) -> Iterator[list[Any]]:
    """Replay two graphs at once, more than once in a row and over spoilt results, by eager calls.

    Each holds all runs, in branches: it may run some at the same time, and runs others in a row.
    """
    branches = [torch.cuda.Stream() for _ in range(3)]

    def branched() -> list[Any]:
        main, found = torch.cuda.current_stream(), []
        for branch in branches:
            branch.wait_stream(main)
        for i, run in enumerate(runs):
            with torch.cuda.stream(branches[i % 3]):
                found.append(run())
        for branch in branches:
            main.wait_stream(branch)
        return found

    graphs = [(torch.cuda.Stream(), *_capture(branched)) for _ in range(2)]
    torch.cuda.synchronize()
    for _ in range(20):
        found = []
        for stream, graph, replayed in graphs:
            with torch.cuda.stream(stream):
                for spoilt in chain.from_iterable(replayed):
                    spoilt.fill_(torch.nan)
                for _ in range(3):
                    graph.replay()
            found += [*(run() for run in runs), *replayed]
        yield found


def _check(context: Context, runs: list[Run]) -> None:
    expected = [run() for run in runs]
    torch.cuda.synchronize()
    for found in context(runs):
        torch.cuda.synchronize()
        assert_equal(found, len(found) // len(runs) * expected)


@pytest.mark.smoke
@support.needs_gpu
@support.on_both
@pytest.mark.parametrize("context", [on_streams, in_threads, in_graphs])
def test_at_once(context: Context) -> None:
    """Calls of several sizes and types: in float64 any other order of a sum gives other bits."""
    rows = [50_000 + 17_001 * i for i in range(6)]
    cases = [boxes(n, support.coin(n, 1), (4,), dtype=FLOATS[i % 4]) for i, n in enumerate(rows)]
    _check(context, [partial(_run, operands) for operands in cases])


@support.needs_gpu
@support.on_kernel
@pytest.mark.parametrize("rows", [33, 200_003], ids=["one_block", "many"])
@pytest.mark.parametrize("name", CALLS)
def test_every_kind_of_call(name: str, rows: int) -> None:
    """A replayed graph computes with new values: none was read when it was captured."""
    (operands, options), *others = [call(name, rows) for _ in range(3)]
    run = partial(results, smooth_l1_loss, operands, 1.5, **options)
    for context in (on_streams, in_graphs):
        _check(context, [run])
    graph, found = _capture(run)
    for new, new_options in others:
        sources = [*new, *new_options.values()]
        with torch.no_grad():
            for one, source in zip([*operands, *options.values()], sources, strict=True):
                if isinstance(one, Tensor):  # (Single numbers of the catalogue are always 7.)
                    one.copy_(source if source.dim() else source + 2)
        graph.replay()
        torch.cuda.synchronize()
        assert_equal(found, run())


@torch.library.custom_op("fused_smoothl1_tests::half_the_loss", mutates_args=())
def _half_the_loss(input: Tensor, target: Tensor, sigma: float, reduction: str) -> Tensor:
    return smooth_l1_loss(input, target, None, 0.5, sigma=sigma, reduction=reduction)  # type: ignore


@_half_the_loss.register_fake
def _(input: Tensor, target: Tensor, sigma: float, reduction: str) -> Tensor:
    return input.new_empty(())


def _through_an_operator(*pair: Tensor, **options: Any) -> Any:
    return 2 * _half_the_loss(*pair, **options)  # The product is what the compiler sees of it.


@support.needs_gpu
@support.on_kernel
@pytest.mark.parametrize("is_seen", [True, False], ids=["seen", "in an operator of a user's"])
def test_compiled_with_graphs(is_seen: bool) -> None:
    """What the library keeps must not lie in the memory of torch.compile's own CUDA graphs.

    Where the compiler sees the loss, no workspace is kept. Where it does not, the first launch on
    the stream on which it warms the graphs up reserves one.
    """
    from fused_smoothl1 import launch

    launch._kept_workspace.cache_clear()
    loss = smooth_l1_loss if is_seen else _through_an_operator
    compiled = torch.compile(loss, fullgraph=True, mode="reduce-overhead")
    for _ in range(4):
        pair = boxes(100_003, grad=int(is_seen))
        torch.compiler.cudagraph_mark_step_begin()
        assert_close(results(compiled, pair, **OPTIONS), _compose(pair))
    assert bool(launch._kept_workspace.cache_info().currsize) == (not is_seen)


def first_in_several_threads() -> None:
    """On one stream and on a stream each."""
    pairs = [boxes(50_000 + 7_001 * index) for index in range(6)]
    torch.cuda.synchronize()
    first = next(in_threads([partial(_run, pair) for pair in pairs]))
    assert_close(first, list(map(_compose, pairs)))


def first_in_a_backward_pass() -> None:
    """Which autograd runs in a thread of its own."""
    pair, found, threads = boxes(50_000), [], []

    def hook(gradient: Tensor) -> None:
        threads.append(threading.get_ident())
        with torch.enable_grad():
            found.append(_run(pair))

    doubled = torch.ones((), device=DEVICE, requires_grad=True) * 2
    doubled.register_hook(hook)
    doubled.backward()
    assert threads != [threading.get_ident()]
    assert_close(found, [_compose(pair)])


def first_in_a_capture(after_others: bool = False) -> None:
    """It succeeds, or says why; then the library works as ever.

    The others are a launch of one program, and one of another dtype.
    """
    if after_others:
        for dtype in (torch.float32, torch.bfloat16):
            _run(boxes(100, dtype=dtype))
    stream = torch.cuda.current_stream()
    for is_first in (True, False):
        pair, graph = boxes(50_000), torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        try:
            with torch.cuda.graph(graph):
                found = _run(pair)
        except RuntimeError as error:
            if not is_first or "captur" not in str(error):
                raise
            torch.cuda.set_stream(stream)  # PyTorch leaves the capture's the current one.
        else:
            for one in found:
                one.fill_(torch.nan)
            graph.replay()
            torch.cuda.synchronize()
            assert_close(found, _compose(pair))
        for rows in (50_000, 70_001):
            pair = boxes(rows)
            assert_close(_run(pair), _compose(pair))


def kinds_in_threads() -> None:
    """Let threads make the first call of all at once, and many more, each of another kind."""
    start = threading.Barrier(len(KINDS))

    def many(case: tuple[list[Any], dict[str, Any]]) -> None:
        operands, options = case
        start.wait()
        for _ in range(25):
            check(*operands, **options)

    with ThreadPoolExecutor(len(KINDS)) as pool:
        list(pool.map(many, [call(name, 50 + 40 * i) for i, name in enumerate(KINDS)]))


def compute(rows: int = 300) -> None:
    check(*boxes(rows), sigma=2.0, reduction="sum", upstream=3.0)


def in_children(method: str) -> None:
    """Compute in two processes, and before and after that in their parent."""
    compute()
    with get_context(method).Pool(2) as pool:
        pool.map_async(compute, [200, 300]).get(timeout=200)
    compute()


ON_A_GPU = (
    "first_in_several_threads()",
    "first_in_a_backward_pass()",
    "first_in_a_capture()",
    "first_in_a_capture(after_others=True)",
)
# (PyTorch does not use a GPU after a fork, and Triton's interpreter runs in one thread at a time.)
ON_THE_CPU = (
    "kinds_in_threads()",
    *(f"in_children('{method}')" for method in get_all_start_methods()),
)


@pytest.mark.parametrize(
    "step", [*(pytest.param(step, marks=support.needs_gpu) for step in ON_A_GPU), *ON_THE_CPU]
)
def test_process_of_its_own(step: str, tmp_path: Path) -> None:
    """One that has compiled, loaded and reserved nothing; and Triton's cache is empty."""
    code, gpu = f"from tests import test_concurrency; test_concurrency.{step}", step in ON_A_GPU
    settings: Any = {"FUSED_SMOOTHL1_BACKEND": "triton" if gpu else "eager"}
    settings |= {"TRITON_CACHE_DIR": str(tmp_path), "timeout": 100 if gpu else 300}
    support.run_python("-c", code, gpu=gpu, **settings)
