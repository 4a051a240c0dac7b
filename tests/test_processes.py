"""Threads of one process, and processes that are forked or spawned from one that used the loss.

Each test runs in a process of its own: pytest's has threads, which do not survive a fork. (On a
GPU, threads are tested by `test_first_launch.py`, and PyTorch itself refuses a fork.)
"""

import threading
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_all_start_methods, get_context
from typing import Any

import pytest
import torch

from fused_smoothl1 import SmoothL1Loss
from tests.support import boxes, check, needs_interpreter, on_both, run_python


def compute(rows: int = 300) -> None:
    check(*boxes(rows), sigma=2.0, reduction="sum", upstream=3.0)


def child(queue: Any, criterion: SmoothL1Loss) -> None:
    compute()
    queue.put(criterion(torch.ones(2), torch.zeros(2)).item())


def in_children(method: str) -> None:
    """Compute in two processes, and before and after that in their parent."""
    compute()
    context = get_context(method)
    queue, criterion = context.Queue(), SmoothL1Loss(sigma=2.0, reduction="sum")
    children = [context.Process(target=child, args=(queue, criterion)) for _ in range(2)]  # type: ignore[attr-defined]
    for process in children:
        process.start()
    assert [queue.get(timeout=60) for _ in children] == [1.75, 1.75]
    for process in children:
        process.join()
        assert process.exitcode == 0
    compute()


def in_threads() -> None:
    """Compute in eight threads, which make the first call of all at once."""
    start = threading.Barrier(8)

    def many(thread: int) -> None:
        start.wait()
        for _ in range(25):
            compute(10 + thread)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(many, range(8)))


def _runs(call: str, backend: str) -> None:
    code = f"from tests import test_processes; test_processes.{call}"
    chosen = {"FUSED_SMOOTHL1_BACKEND": backend, "TRITON_INTERPRET": "1"}
    done = run_python("-c", code, timeout=120, **chosen)
    assert done.returncode == 0, done.stderr


@on_both
@needs_interpreter
@pytest.mark.parametrize("method", sorted({"fork", "spawn"} & {*get_all_start_methods()}))
def test_processes(method: str, backend: str) -> None:
    _runs(f"in_children({method!r})", backend)


def test_threads() -> None:
    """The interpreter allows one at a time."""
    _runs("in_threads()", "eager")
