"""The very first launch of a process, wherever it happens.

Nothing is compiled then, no module is loaded and no workspace reserved. Each test runs in a fresh
process with an empty cache of Triton's: what another test has launched would warm it up. Most wait
for a GPU, as the interpreter compiles nothing.
"""

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 (the name PyTorch users know it by)
from torch import Tensor

from fused_smoothl1 import smooth_l1_loss
from tests.conftest import HAS_TRITON

ROOT = Path(__file__).parent.parent
THREADS = 6
SECONDS = 100  # more than a start of PyTorch and some compilations take on a busy machine


def _run_alone(code: str, folder: Path) -> None:
    """Run the code in a process of its own, with compiled kernels."""
    settings = {"TRITON_CACHE_DIR": str(folder), "FUSED_SMOOTHL1_BACKEND": "triton"}
    environment = {**os.environ, **settings}
    environment.pop("TRITON_INTERPRET", None)
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr


def _operands(rows: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator("cuda").manual_seed(rows)
    input, target = (torch.randn(rows, 4, device="cuda", generator=generator) for _ in range(2))
    return input.requires_grad_(), target


def _step(input: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    loss = smooth_l1_loss(input, target, beta=0.5)
    (gradient,) = torch.autograd.grad(loss, input, torch.full_like(loss, 3.0))
    return loss.detach(), gradient


def _check(found: tuple[Tensor, Tensor], input: Tensor, target: Tensor) -> None:
    loss = F.smooth_l1_loss(input, target, beta=0.5)
    (gradient,) = torch.autograd.grad(loss, input, torch.full_like(loss, 3.0))
    torch.testing.assert_close(found, (loss.detach(), gradient))


def in_several_threads() -> None:
    """Launch first in several threads at once, on one stream and on a stream each."""
    operands = [_operands(50_000 + 7_001 * index) for index in range(THREADS)]
    torch.cuda.synchronize()
    start = threading.Barrier(THREADS)
    found: dict[int, tuple[Tensor, Tensor]] = {}

    def work(index: int) -> None:
        stream = torch.cuda.Stream() if index % 2 else torch.cuda.default_stream()
        start.wait()
        with torch.cuda.stream(stream):
            found[index] = _step(*operands[index])
        stream.synchronize()

    threads = [threading.Thread(target=work, args=(index,)) for index in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == THREADS, "a thread ended with an exception"
    for index, pair in enumerate(operands):
        _check(found[index], *pair)


def in_autograds_thread() -> None:
    """Launch first inside a backward pass, which autograd runs in a thread of its own."""
    operands = _operands(50_000)
    found: list[tuple[Tensor, Tensor]] = []
    threads: list[int] = []

    def hook(gradient: Tensor) -> None:
        threads.append(threading.get_ident())
        with torch.enable_grad():
            found.append(_step(*operands))

    leaf = torch.ones((), device="cuda", requires_grad=True)
    doubled = leaf * 2
    doubled.register_hook(hook)
    doubled.backward()
    assert threads != [threading.get_ident()]
    _check(found[0], *operands)


def in_a_capture() -> None:
    """Capture what was never launched: it succeeds, or says why; then the library works as ever."""
    _try_to_capture(50_000)
    for rows in (50_000, 70_001):
        operands = _operands(rows)
        _check(_step(*operands), *operands)
    _capture_and_replay(50_000)


def in_a_capture_of_another_size() -> None:
    """As `in_a_capture`, after launches of other kinds: of one program, and of another type."""
    input, target = _operands(100)
    _check(_step(input, target), input, target)
    _step(input.bfloat16().detach().requires_grad_(), target)
    in_a_capture()


def _try_to_capture(rows: int) -> None:
    operands = _operands(rows)
    torch.cuda.synchronize()
    graph, refusal = torch.cuda.CUDAGraph(), None
    stream = torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph):
            found = _step(*operands)
    except RuntimeError as error:
        refusal = str(error)
        torch.cuda.set_stream(stream)  # PyTorch leaves the capture's the current one.
    if refusal is None:
        graph.replay()
        torch.cuda.synchronize()
        _check(found, *operands)
    else:
        assert "captur" in refusal


def _capture_and_replay(rows: int) -> None:
    """Capture what is warmed up by now, and replay it over other values."""
    static, other = _operands(rows), _operands(rows + 1)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        found = _step(*static)
    with torch.no_grad():
        for one, source in zip(static, other, strict=True):
            one.copy_(source[:rows])
    graph.replay()
    torch.cuda.synchronize()
    _check(found, *static)


# On a driver that launches nothing, and that refuses to load the first kernel.
LOADED_LATER = """
from types import SimpleNamespace
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget

from fused_smoothl1 import dispatch, smooth_l1_loss

loads, launched = [], []

def load_binary(name, kernel, shared, device):
    loads.append(name)
    if len(loads) == 1:
        raise RuntimeError("operation not permitted when stream is capturing")
    return object(), "the loaded kernel", 32, 0, 1024

triton.runtime.driver.set_active(
    SimpleNamespace(
        launcher_cls=lambda source, metadata: lambda *arguments: launched.append(arguments[4]),
        utils=SimpleNamespace(
            load_binary=load_binary,
            unload_module=lambda module: None,
            get_device_properties=lambda device: {"max_shared_mem": 2**16},
        ),
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
        get_active_torch_device=lambda: torch.device("cpu"),
    )
)
with mock.patch.object(dispatch, "TRITON_DEVICES", ("cpu",)):
    operands = torch.ones(5), torch.zeros(5)
    try:
        smooth_l1_loss(*operands)
    except RuntimeError as error:
        assert str(error).endswith("capturing")
    assert (len(loads), launched) == (1, [])
    for _ in range(2):
        smooth_l1_loss(*operands)
    assert (len(loads), launched) == (2, ["the loaded kernel"] * 2)
"""


@pytest.mark.skipif(not HAS_TRITON, reason="waits for a machine with Triton")
def test_kernel_that_could_not_be_loaded_is_loaded_later(tmp_path: Path) -> None:
    """The capture of a graph may refuse to load it, and Triton remembers what it compiled."""
    _run_alone(LOADED_LATER, tmp_path)


@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="waits for a CUDA GPU: the interpreter compiles nothing"
)
@pytest.mark.parametrize(
    "function",
    [in_several_threads, in_autograds_thread, in_a_capture, in_a_capture_of_another_size],
    ids=lambda function: function.__name__,
)
def test_first_launch(function: Callable[[], None], tmp_path: Path) -> None:
    name = function.__name__
    _run_alone(f"from tests.test_first_launch import {name}; {name}()", tmp_path)
