"""What may be wrong with Triton on a machine with a GPU: run by the tests of `test_toolchain.py`.

    python -m tests.faults

Each fault has a process of its own, in which tensors of the CPU count as tensors on a GPU. What
happened is printed as JSON.
"""

import importlib.abc
import inspect
import json
import os
import sys
import tempfile
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from bench import stand_in
from fused_smoothl1 import dispatch, ops, smooth_l1_loss
from fused_smoothl1.problem import NO_NEEDS, make_problem

NOWHERE = "/dev/null/nowhere"
PTXAS = """#!/bin/sh
case "$*" in
*--version*) echo "Cuda compilation tools, release 12.8, V12.8.93" ;;
*) echo "ptxas fatal: Value 'sm_90' is not defined for option 'gpu-name'" >&2; exit 255 ;;
esac
"""
Fault = Callable[[Path], Any]


class Finder(importlib.abc.MetaPathFinder):
    """Lets the import of Triton raise."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def find_spec(self, name: str, *_: Any) -> None:
        """Raise for Triton; others find the rest."""
        if name == "triton":
            raise self.error


def modules(value: Any, *names: str) -> Fault:
    """Put something else in the place of Triton, and of these modules in it."""
    return lambda _: sys.modules.update(dict.fromkeys(("triton", *names), value))


def import_raises(error: Exception) -> Fault:
    return lambda _: sys.meta_path.insert(0, Finder(error))


def no_sources(_: Path) -> None:
    def getsourcelines(_: object) -> None:
        raise OSError("could not get source code")

    inspect.getsourcelines = getsourcelines  # type: ignore[assignment]


def nvidia(**environment: str) -> Fault:
    """Let Triton start its own driver for NVIDIA's GPUs, in such an environment."""

    def fault(folder: Path) -> None:
        torch.cuda.is_available = lambda: True
        os.environ.pop("CC", None)
        os.environ.update({"TRITON_CACHE_DIR": str(folder), **environment})

    return fault


def ptxas(folder: Path) -> None:
    program = folder / "ptxas"
    program.write_text(PTXAS)
    program.chmod(0o755)
    for name in ("TRITON_PTXAS_PATH", "TRITON_PTXAS_BLACKWELL_PATH"):
        os.environ[name] = str(program)


def load(_: Path) -> None:
    from triton.runtime import driver

    def load_binary(*_: Any) -> None:
        raise RuntimeError("Triton Error [CUDA]: device kernel image is invalid")

    driver.active.utils.load_binary = load_binary


# Those of Triton itself and of its driver, and those of what it compiles.
OF_TRITON: dict[str, Fault] = {
    "missing": modules(None),
    "stub": modules(ModuleType("triton")),
    "mock": modules(mock.MagicMock(), "triton.language", "triton.runtime"),
    "OSError": import_raises(OSError("libtriton.so: cannot open shared object file")),
    "RuntimeError": import_raises(RuntimeError("built for another Python")),
    "AttributeError": import_raises(AttributeError("module has no attribute")),
    "no sources": no_sources,
    "foreign": lambda _: None,  # Triton knows no such GPU as this, which is not there.
    "no libcuda": nvidia(),
    "no cache folder": nvidia(TRITON_LIBCUDA_PATH="/", TRITON_CACHE_DIR=NOWHERE),
    "no C compiler": nvidia(TRITON_LIBCUDA_PATH="/", PATH=NOWHERE),
}
OF_KERNELS: dict[str, Fault] = {"ptxas": ptxas, "load": load}


def operands(rows: int, *, masked: bool = False) -> list[Tensor]:
    generator = torch.Generator().manual_seed(rows)
    input, target, inside, outside = (
        torch.randn(rows, columns, generator=generator) for columns in (4, 4, 1, 4)
    )
    return [input, target, inside > 0 if masked else inside, outside]


def losses_and_gradients() -> Iterator[list[Tensor]]:
    """Make calls whose kernels differ, and those of whose backward passes too."""
    for rows, masked, reduction in (
        (9, False, "mean"),
        (9, False, "none"),
        (9, True, "sum"),
        (1 << 18, False, "sum"),  # so large that a kernel multiplies the gradient
        (0, False, "mean"),
    ):
        values = operands(rows, masked=masked)
        values[0].requires_grad_()
        loss = smooth_l1_loss(*values, sigma=2.0, reduction=reduction)
        upstream = torch.full_like(loss, 3.0)
        yield [loss.detach(), *torch.autograd.grad(loss, values[:1], upstream)]
    values = operands(9)
    yield [smooth_l1_loss(*values)]
    # As a compiled graph calls it, with a transition point that is a tensor.
    input, target, *_ = values
    problem = make_problem(input, target, beta=torch.tensor(0.5))
    yield [ops.FORWARD(*problem, *NO_NEEDS)[0]]


@contextmanager
def chosen(choice: str) -> Iterator[list[str]]:
    """Choose a backend; yield the warnings."""
    os.environ["FUSED_SMOOTHL1_BACKEND"] = choice
    dispatch.backend_on.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        told: list[str] = []
        yield told
        told += [f"{one.category.__name__}: {one.message}" for one in caught]
    dispatch.backend_on.cache_clear()


def in_threads(number: int) -> None:
    """Make a call in so many threads at once."""
    start = threading.Barrier(number)

    def work() -> None:
        start.wait()
        smooth_l1_loss(*operands(9))

    threads = [threading.Thread(target=work) for _ in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def gradients(between: Callable[[], Any]) -> list[Tensor]:
    """Return gradients where something happens between the forward passes and the backward passes.

    Of losses, of a sum under a mask, and a large one that is multiplied; none knows of the others.
    """
    several = [(operands(9), "none"), (operands(9, masked=True), "sum")]
    losses = [
        smooth_l1_loss(values[0].requires_grad_(), *values[1:], reduction=reduction)
        for values, reduction in several
    ]
    found = [torch.ones(1 << 20)]
    backend = dispatch.backend_on(found[0].device)
    between()
    backend.scale((found[0], None, None, None), torch.tensor(3.0))
    for loss, (values, _) in zip(losses, several, strict=True):
        dispatch._obstacles.clear()
        dispatch.backend_on.cache_clear()
        found += torch.autograd.grad(loss, values[:1], torch.full_like(loss, 3.0))
    return found


def tell(fault: Fault, folder: Path, on_stand_in: bool) -> dict[str, Any]:
    """Return what happens under a fault."""
    with chosen("eager"):
        expected = list(losses_and_gradients()), gradients(lambda: None)
    os.environ.update({**stand_in.ENVIRONMENT, "TRITON_CACHE_DIR": str(folder / "cache")})
    with stand_in.gpu() if on_stand_in else stand_in.tensors_on_gpu():
        told: dict[str, Any] = {}
        if on_stand_in:
            # (The fault of the second half comes after kernels that were compiled and loaded.)
            with chosen("auto") as told["in backward"]:
                found = gradients(lambda: fault(folder))
            torch.testing.assert_close(found, expected[1])
        fault(folder)
        dispatch._obstacles.clear()
        with chosen("auto") as told["warnings"]:
            losses = list(losses_and_gradients())
            in_threads(4)
        torch.testing.assert_close(losses, expected[0])
        dispatch._obstacles.clear()
        with chosen("triton"):
            try:
                list(losses_and_gradients())
            except Exception as error:
                told["refusal"] = f"{type(error).__name__}: {error}"
    return told


def isolated(fault: Fault, on_stand_in: bool) -> dict[str, Any]:
    """Return what happens under a fault, in a process of its own."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        process = os.fork()
        if not process:
            try:
                told = tell(fault, folder, on_stand_in)
            except BaseException:
                told = {"raised": traceback.format_exc()}
            (folder / "told").write_text(json.dumps(told))
            os._exit(0)
        os.waitpid(process, 0)
        found: dict[str, Any] = json.loads((folder / "told").read_text())
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    faults = {**dict.fromkeys(OF_TRITON, False), **dict.fromkeys(OF_KERNELS, True)}
    both = OF_TRITON | OF_KERNELS
    print(json.dumps({name: isolated(both[name], kind) for name, kind in faults.items()}))
