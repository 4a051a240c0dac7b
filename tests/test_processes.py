"""Threads of one process, and processes that are forked or spawned from one that used the loss.

Each test runs in a process of its own: pytest's has threads, which do not survive a fork. (On a
GPU `test_streams_and_graphs.py` has the threads, and PyTorch itself refuses a fork.)
"""

import threading
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_all_start_methods, get_context
from typing import Any

import pytest

from tests import support
from tests.support import KINDS, boxes, call, check, run_python


def compute(rows: int) -> None:
    check(*boxes(rows), sigma=2.0, reduction="sum", upstream=3.0)


def in_children(method: str) -> None:
    """Compute in two processes, and before and after that in their parent."""
    compute(300)
    with get_context(method).Pool(2) as pool:
        pool.map_async(compute, [300, 300]).get(timeout=200)
    compute(300)


def in_threads() -> None:
    """Let threads make the first call of all at once, and many more, each of another kind."""
    start = threading.Barrier(len(KINDS))

    def many(case: tuple[list[Any], dict[str, Any]]) -> None:
        operands, options = case
        start.wait()
        for _ in range(25):
            check(*operands, **options)

    with ThreadPoolExecutor(len(KINDS)) as pool:
        list(pool.map(many, [call(name, 50 + 40 * i) for i, name in enumerate(KINDS)]))


METHODS = sorted({"fork", "spawn"} & {*get_all_start_methods()})


@pytest.mark.parametrize(
    ("step", "choice"),
    [
        ("in_threads()", "eager"),  # Triton's interpreter allows one at a time.
        *((f"in_children('{method}')", "eager") for method in METHODS),
        *(
            pytest.param(f"in_children('{method}')", "triton", marks=support.needs_interpreter)
            for method in METHODS
        ),
    ],
)
def test_processes(step: str, choice: str) -> None:
    settings: Any = {"TRITON_INTERPRET": "1", "FUSED_SMOOTHL1_BACKEND": choice}
    code = f"from tests import test_processes; test_processes.{step}"
    done = run_python("-c", code, timeout=300, **settings)
    assert done.returncode == 0, done.stderr
