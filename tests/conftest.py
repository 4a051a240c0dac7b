"""Backends and instruments of all tests.

Without a GPU the kernel runs in Triton's interpreter. Triton reads TRITON_INTERPRET when it is
imported, so this file sets it before anything can import it.

Memory that an allocation leaves uninitialised is filled with NaN (or the largest integer) for
the whole run: a kernel that reads what it did not write, or does not write what it promises,
gives NaN here rather than the zeros a fresh page happens to hold.
"""

import gc
import os
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

from tests.support import HAS_GPU, HAS_INTERPRETER, HAS_TRITON, NO_INTERPRETER, backend_set

if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"

settings.register_profile(
    "the same at every run",
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("the same at every run")


def pytest_configure(config: pytest.Config) -> None:
    # The tensors are small, and on a busy machine threads wait for each other far longer than
    # they work.
    torch.set_num_threads(1)
    if config.getoption("markexpr") == "sanitize":
        # Compute-sanitizer finds what was never written by itself, and accesses beyond a tensor's
        # end if each is an allocation of its own.
        os.environ.setdefault("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")
    else:
        torch.use_deterministic_algorithms(True, warn_only=True)
        # A property of a module that is an object, which type checkers do not know.
        setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)  # noqa: B010
    for harmless in (
        # Deterministic mode is here for the NaN fill only; what it says about other operators of
        # PyTorch is not a finding about this package.
        "ignore:.*does not have a deterministic implementation",
        # NumPy, under the interpreter, tells of every NaN and overflow. The tests make them.
        "ignore:.*encountered in:RuntimeWarning",
    ):
        config.addinivalue_line("filterwarnings", harmless)


@pytest.fixture(scope="session", autouse=True)
def _strict_interpreter() -> None:
    """Make the interpreter refuse what a GPU would not survive, and round as a GPU does."""
    if HAS_TRITON and not HAS_GPU:
        from tests.interpreter import make_strict

        make_strict()


@pytest.fixture
def unpoisoned() -> Iterator[None]:
    """Leave uninitialised memory alone, and take PyTorch's fast operators.

    It is for tests that reserve far more than they touch, or that count or time PyTorch's
    operators. On a GPU they give back what they reserved: it would be missing in another process.
    """
    torch.use_deterministic_algorithms(False)
    yield
    torch.use_deterministic_algorithms(True, warn_only=True)
    if torch.cuda.is_initialized():
        gc.collect()
        torch.cuda.empty_cache()


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let torch.compile return what it is given."""
    # Imported here because few tests need the benchmark.
    from bench import rivals

    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    for kept in (rivals._compiled, rivals._grad_and_value):
        kept.cache_clear()
    yield
    for kept in (rivals._compiled, rivals._grad_and_value):
        kept.cache_clear()


@pytest.fixture(autouse=True)
def _fresh_start() -> None:
    """Let a test draw the same values at every run, and compile anew what it compiles."""
    torch.manual_seed(0)
    torch._dynamo.reset()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test on the backends that it is marked with."""
    mark = metafunc.definition.get_closest_marker("backends")
    if mark:
        metafunc.parametrize("backend", mark.args, indirect=True)


@pytest.fixture(autouse=True)
def backend(request: pytest.FixtureRequest) -> Iterator[str | None]:
    """Choose the backend that the test is marked with; otherwise leave the choice unset."""
    name: str | None = getattr(request, "param", None)
    if name == "triton" and not HAS_TRITON:
        pytest.skip("waits for a machine with Triton")
    if name == "triton" and not HAS_INTERPRETER and not HAS_GPU:
        pytest.skip(NO_INTERPRETER)
    with backend_set(name) if name else nullcontext():
        yield name


@pytest.fixture
def launches(backend: str | None, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Collect the name of every Triton kernel launched, whoever launches it.

    On a GPU Triton's own hook tells of each launch. The interpreter has none: what runs a kernel
    there is patched at the class, so that one this file has never heard of is counted too.
    """
    names: list[str] = []
    if HAS_GPU:
        from triton import knobs

        def tell(metadata: Any) -> None:
            names.append(metadata.get()["name"])

        knobs.runtime.launch_enter_hook.add(tell)
        yield names
        knobs.runtime.launch_enter_hook.remove(tell)
        return
    from triton.runtime.interpreter import GridExecutor

    original = GridExecutor.__call__

    def call(self, *args, **kwargs):  # type: ignore[no-untyped-def]
        names.append(self.fn.__name__)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(GridExecutor, "__call__", call)
    yield names
