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
from tests import support
from tests.support import boxes, check, run_python


def compute(rows: int = 300) -> None:
    check(*boxes(rows), sigma=2.0, reduction="sum", upstream=3.0)


def child(queue: Any, criterion: SmoothL1Loss) -> None:
    compute()
    queue.put(criterion(torch.ones(2), torch.zeros(2)).item())


def in_children(method: str) -> None:
    """Compute in two processes, and before and after that in their parent."""
    compute()
    context: Any = get_context(method)
    queue, criterion = context.Queue(), SmoothL1Loss(sigma=2.0, reduction="sum")
    children = [context.Process(target=child, args=(queue, criterion)) for _ in range(2)]
    for process in children:
        process.start()
    assert [queue.get(timeout=200) for _ in children] == [1.75, 1.75]
    for process in children:
        process.join()
        assert process.exitcode == 0
    compute()


def in_threads() -> None:
    """Let eight threads make the first call of all at once, and many more."""
    start = threading.Barrier(8)

    def many(thread: int) -> None:
        start.wait()
        for _ in range(25):
            compute(10 + thread)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(many, range(8)))


METHODS = sorted({"fork", "spawn"} & {*get_all_start_methods()})


@pytest.mark.parametrize(
    ("call", "choice"),
    [
        ("in_threads()", "eager"),  # Triton's interpreter allows one at a time.
        *((f"in_children('{method}')", "eager") for method in METHODS),
        *(
            pytest.param(f"in_children('{method}')", "triton", marks=support.needs_interpreter)
            for method in METHODS
        ),
    ],
)
def test_processes(call: str, choice: str) -> None:
    settings: Any = {"TRITON_INTERPRET": "1", "FUSED_SMOOTHL1_BACKEND": choice}
    code = f"from tests import test_processes; test_processes.{call}"
    done = run_python("-c", code, timeout=300, **settings)
    assert done.returncode == 0, done.stderr
