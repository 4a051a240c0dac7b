"""The very first launch of a process, wherever it happens.

Nothing is compiled then, no module is loaded and no workspace reserved. Each function runs in a
fresh process with an empty cache of Triton's: what another test has launched would warm it up. Most
wait for a GPU, as the interpreter compiles nothing.
"""

import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from bench import stand_in
from fused_smoothl1 import smooth_l1_loss
from tests import support
from tests.composed import composed
from tests.support import DEVICE, boxes, results, run_python
from tests.test_streams_and_graphs import in_threads

SECONDS = 100  # more than a start of PyTorch and some compilations take on a busy machine

_step = partial(results, smooth_l1_loss, upstream=3.0, beta=0.5)


def _check(found: list[Tensor], pair: list[Tensor]) -> None:
    assert_close(found, results(composed, pair, upstream=3.0, beta=0.5))


def in_several_threads() -> None:
    """Launch first in several threads at once, on one stream and on a stream each."""
    pairs = [boxes(50_000 + 7_001 * index) for index in range(6)]
    torch.cuda.synchronize()
    first = next(in_threads([partial(_step, pair) for pair in pairs]))
    for found, pair in zip(first, pairs, strict=True):
        _check(found, pair)


def in_autograds_thread() -> None:
    """Launch first inside a backward pass, which autograd runs in a thread of its own."""
    pair, found, threads = boxes(50_000), [], []

    def hook(gradient: Tensor) -> None:
        threads.append(threading.get_ident())
        with torch.enable_grad():
            found.append(_step(pair))

    doubled = torch.ones((), device=DEVICE, requires_grad=True) * 2
    doubled.register_hook(hook)
    doubled.backward()
    assert threads != [threading.get_ident()]
    _check(found[0], pair)


def in_a_capture() -> None:
    """Capture what was never launched: it succeeds, or says why; then the library works as ever."""
    stream = torch.cuda.current_stream()
    for is_first in (True, False):
        pair, graph = boxes(50_000), torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        try:
            with torch.cuda.graph(graph):
                found = _step(pair)
        except RuntimeError as error:
            if not is_first or "captur" not in str(error):
                raise
            torch.cuda.set_stream(stream)  # PyTorch leaves the capture's the current one.
        else:
            for one in found:
                one.fill_(torch.nan)
            graph.replay()
            torch.cuda.synchronize()
            _check(found, pair)
        for rows in (50_000, 70_001):
            pair = boxes(rows)
            _check(_step(pair), pair)


def in_a_capture_of_another_size() -> None:
    """As `in_a_capture`, after launches of other kinds: of one program, and of another type."""
    pair = boxes(100)
    _check(_step(pair), pair)
    _step(boxes(100, dtype=torch.bfloat16))
    in_a_capture()


def refused_once() -> None:
    """Launch again what could not be loaded: the capture of a graph may refuse it.

    Triton remembers what it compiled then, and that it has loaded it.
    """
    loads, launched = [], []

    def load_binary(*_: Any) -> tuple[Any, ...]:
        loads.append("one")
        if len(loads) == 1:
            raise RuntimeError("operation not permitted when stream is capturing")
        return object(), "the loaded kernel", 32, 0, 1024

    def launch(_: Any, *arguments: Any) -> None:
        launched.append(arguments[4])

    with stand_in.gpu(), mock.patch.object(stand_in._Launcher, "__call__", launch):
        from triton.runtime import driver

        driver.active.utils.load_binary = load_binary
        with pytest.raises(RuntimeError, match="when stream is capturing"):
            smooth_l1_loss(*boxes(5))
        assert (len(loads), launched) == (1, [])
        for _ in range(2):
            smooth_l1_loss(*boxes(5))
        assert (len(loads), launched) == (2, ["the loaded kernel"] * 2)


ON_A_GPU = [in_several_threads, in_autograds_thread, in_a_capture, in_a_capture_of_another_size]


@pytest.mark.parametrize(
    "function",
    [
        *(pytest.param(function, marks=support.needs_gpu) for function in ON_A_GPU),
        pytest.param(refused_once, marks=support.needs_triton),
    ],
    ids=lambda function: function.__name__,
)
def test_first_launch(function: Callable[[], None], tmp_path: Path) -> None:
    name = function.__name__
    code = f"from tests.test_first_launch import {name}; {name}()"
    environment = {"TRITON_CACHE_DIR": str(tmp_path), **stand_in.ENVIRONMENT}
    done = run_python("-c", code, gpu=function in ON_A_GPU, timeout=SECONDS, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
