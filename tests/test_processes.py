"""Threads of one process, and processes that are forked or spawned from one that used the loss.

Each test runs in a process of its own: pytest's has threads, which do not survive a fork. (On a
GPU, threads are tested by `test_first_launch.py`, and PyTorch itself refuses a fork.)
"""

import os
import subprocess
import sys
from multiprocessing import get_all_start_methods
from pathlib import Path

import pytest

from tests.conftest import HAS_INTERPRETER, NO_INTERPRETER

ROOT = Path(__file__).parents[1]
SETUP = """
import multiprocessing
import threading

import torch
from torch.nn import functional as F
from fused_smoothl1 import SmoothL1Loss

criterion = SmoothL1Loss(sigma=2.0, reduction="sum")


def right(seed, rows=300):
    generator = torch.Generator().manual_seed(seed)
    input, target = (torch.randn(rows, 4, generator=generator) for _ in range(2))
    input.requires_grad_()
    expected = F.smooth_l1_loss(input, target, beta=0.25, reduction="sum")
    pairs = []
    for loss in (criterion(input, target), expected):
        pairs.append((loss.detach(), *torch.autograd.grad(3 * loss, input)))
    torch.testing.assert_close(*pairs)


def work(queue, criterion, seed):
    right(seed)
    queue.put(criterion(torch.ones(2), torch.zeros(2)).item())


if __name__ == "__main__":
"""
CHILDREN = """
    right(0)
    context = multiprocessing.get_context("{method}")
    queue = context.Queue()
    children = [context.Process(target=work, args=(queue, criterion, seed)) for seed in (1, 2)]
    for child in children:
        child.start()
    assert [queue.get(timeout=60) for _ in children] == [1.75, 1.75]
    for child in children:
        child.join()
        assert child.exitcode == 0
    right(3)
"""
THREADS = """
    finished = []
    start = threading.Barrier(8)

    def many(seed):
        start.wait()
        for offset in range(25):
            right(seed + offset, rows=10 + seed)
        finished.append(seed)

    threads = [threading.Thread(target=many, args=(100 * index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(finished) == 8
"""
BACKENDS = [
    "eager",
    pytest.param("triton", marks=pytest.mark.skipif(not HAS_INTERPRETER, reason=NO_INTERPRETER)),
]


def _run(code: str, backend: str, folder: Path) -> None:
    # (A spawned process imports the file that its parent runs.)
    file = folder / "main.py"
    file.write_text(SETUP + code)
    hidden = {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
    chosen = {"FUSED_SMOOTHL1_BACKEND": backend, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, str(file)],
        env={**os.environ, **hidden, **chosen},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("method", sorted({"fork", "spawn"} & {*get_all_start_methods()}))
def test_processes(method: str, backend: str, tmp_path: Path) -> None:
    """They call the loss, and the parent that called it before still can."""
    _run(CHILDREN.format(method=method), backend, tmp_path)


def test_threads(tmp_path: Path) -> None:
    """Eight make the first call of all at once. The interpreter allows one at a time."""
    _run(THREADS, "eager", tmp_path)
