"""What may be wrong with Triton on a machine with a GPU: run by the tests of `test_toolchain.py`.

    python -m tests.faults

Each fault has a process of its own, in which tensors of the CPU count as tensors on a GPU. What
happened is printed as JSON.
"""

import importlib.abc
import inspect
import json
import os
import subprocess
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
from torch.nn import functional as F  # noqa: N812 (the name PyTorch users know it by)

from bench import stand_in
from fused_smoothl1 import dispatch, ops, smooth_l1_loss
from fused_smoothl1.functional import Reduction
from fused_smoothl1.problem import NO_GRADIENTS, NO_NEEDS, make_problem

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


def no_libcuda(folder: Path) -> None:
    nvidia()(folder)
    os.environ.pop("LD_LIBRARY_PATH", None)
    # Where it is, `ldconfig` would say so.
    subprocess.check_output = lambda *_, **__: b""  # type: ignore[assignment]


def ptxas(folder: Path) -> None:
    program = folder / "ptxas"
    program.write_text(PTXAS)
    program.chmod(0o755)
    for name in ("TRITON_PTXAS_PATH", "TRITON_PTXAS_BLACKWELL_PATH"):
        os.environ[name] = str(program)


def driver(**replaced: Any) -> Fault:
    """Replace functions of the stand-in for a driver."""

    def fault(_: Path) -> None:
        from triton.runtime import driver

        vars(driver.active.utils).update(replaced)

    return fault


def raising(error: BaseException) -> Callable[..., Any]:
    def function(*_: Any) -> None:
        raise error

    return function


def failing_launch(_: Path) -> None:
    from triton.runtime import driver

    launcher = raising(RuntimeError("unspecified launch failure"))
    driver.active.launcher_cls = lambda *_: launcher


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
    "no libcuda": no_libcuda,
    "no cache folder": nvidia(TRITON_LIBCUDA_PATH="/", TRITON_CACHE_DIR=NOWHERE),
    "no C compiler": nvidia(TRITON_LIBCUDA_PATH="/", PATH=NOWHERE),
}
OF_KERNELS: dict[str, Fault] = {
    "ptxas": ptxas,
    "load": driver(
        load_binary=raising(RuntimeError("Triton Error [CUDA]: device kernel image is invalid"))
    ),
    # Of which there are fewer than the kernel needs; Triton says it only once.
    "threads": driver(load_binary=lambda *_: (1, 1, 0, 0, 64)),
}
# What is no fault of Triton's comes through, and may pass.
PASSING: dict[str, Fault] = {
    "memory": driver(load_binary=raising(RuntimeError("Triton Error [CUDA]: out of memory"))),
    "capture": driver(load_binary=raising(RuntimeError("not permitted when capturing"))),
    "interrupt": driver(load_binary=raising(KeyboardInterrupt("interrupted"))),
    "launch": failing_launch,
}


def operands(rows: int, *, masked: bool = False) -> list[Tensor]:
    generator = torch.Generator().manual_seed(rows)
    input, target, inside, outside = (
        torch.randn(rows, columns, generator=generator) for columns in (4, 4, 1, 4)
    )
    return [input, target, inside > 0 if masked else inside, outside]


def step(rows: int, masked: bool, reduction: Reduction) -> Callable[[], list[Tensor]]:
    """Return what computes a loss and a gradient."""

    def compute() -> list[Tensor]:
        values = operands(rows, masked=masked)
        values[0].requires_grad_()
        loss = smooth_l1_loss(*values, sigma=2.0, reduction=reduction)
        return [loss.detach(), *torch.autograd.grad(loss, values[:1], torch.full_like(loss, 3.0))]

    return compute


def without_gradient() -> list[Tensor]:
    with torch.no_grad():
        return [smooth_l1_loss(*operands(9))]


def operator() -> list[Tensor]:
    """Call the operators as a compiled graph does, with a transition point that is a tensor.

    Such a graph relies on the strides that it was told when it was compiled.
    """
    input, target = torch.randn(3, 5, 2).permute(2, 0, 1).requires_grad_(), torch.randn(2, 3, 5)
    mask = torch.randn(2, 1, 5) > 0
    problem = make_problem(input.detach(), target, mask, beta=torch.tensor(0.5), reduce=False)
    (losses, *_), upstream = ops.FORWARD(*problem, *NO_NEEDS), torch.ones_like(target)
    gradient, *_ = ops.BACKWARD(upstream, *problem, True, False, False, False, False)
    assert losses.stride() == gradient.stride() == input.stride()
    right = F.smooth_l1_loss(input, target, beta=0.5, reduction="none") * mask
    torch.testing.assert_close(losses, right.detach())
    torch.testing.assert_close(gradient, torch.autograd.grad(right, input, upstream)[0])
    return []


def compiled() -> list[Tensor]:
    """Compute them in compiled graphs, whose generated code has no names."""
    input, *others = operands(9)
    input.requires_grad_()
    torch._dynamo.reset()
    loss = torch.compile(smooth_l1_loss, backend="aot_eager", fullgraph=True)(input, *others)
    return [loss.detach(), *torch.autograd.grad(loss, input)]


# Their kernels differ, and those of their backward passes.
CALLS = (
    step(9, False, "mean"),
    step(9, False, "none"),
    step(9, True, "sum"),
    step(1 << 18, False, "sum"),  # so large that a kernel multiplies the gradient
    without_gradient,
    operator,
)


@contextmanager
def chosen(choice: str) -> Iterator[list[str]]:
    """Choose a backend; yield the warnings."""
    os.environ["FUSED_SMOOTHL1_BACKEND"] = choice
    dispatch._backends.clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.filterwarnings("ignore")
        warnings.filterwarnings("always", "fused_smoothl1")
        told: list[str] = []
        yield told
        told += [f"{one.category.__name__}: {one.message}" for one in caught]
    dispatch._backends.clear()


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
    # (Of another dtype than all other calls, whose kernels must not have been loaded yet.)
    several = [
        [t.double() if t.is_floating_point() else t for t in operands(9, masked=masked)]
        for masked in (False, True)
    ]
    reductions: tuple[Reduction, ...] = ("none", "sum")
    losses = [
        smooth_l1_loss(values[0].requires_grad_(), *values[1:], reduction=reduction)
        for values, reduction in zip(several, reductions, strict=True)
    ]
    found = [torch.ones(1 << 20)]
    backend = dispatch.backend_on(found[0].device)
    between()
    backend.scale((found[0], *NO_GRADIENTS[1:]), torch.tensor(3.0))
    for loss, values in zip(losses, several, strict=True):
        dispatch._backends.clear()
        found += torch.autograd.grad(loss, values[:1], torch.full_like(loss, 3.0))
    return found


def refusals(calls: list[Callable[[], Any]]) -> list[str]:
    """Return what calls raise."""
    found = []
    for call in calls:
        try:
            call()
        except BaseException as error:
            found.append(f"{type(error).__name__}: {error}")
        else:
            found.append("nothing")
    return found


def of_triton(name: str, folder: Path) -> dict[str, Any]:
    """Return what happens under a fault of Triton's."""
    is_of_kernels = name in OF_KERNELS
    fault = (OF_TRITON | OF_KERNELS)[name]
    calls = [*CALLS, compiled] if is_of_kernels else CALLS
    with chosen("eager"):
        expected = [call() for call in calls]
        of_backward = gradients(lambda: None)
    told: dict[str, Any] = {}
    with stand_in.gpu() if is_of_kernels else stand_in.tensors_on_gpu():
        if is_of_kernels:
            # (The fault comes after kernels that were compiled and loaded.)
            with chosen("auto") as told["in backward"]:
                found = gradients(lambda: fault(folder))
            torch.testing.assert_close(found, of_backward)
        else:
            fault(folder)
        told["first"] = []
        for call, right in zip(calls, expected, strict=True):
            with chosen("auto") as warned:
                # Whichever is the first, it warns, and no other does.
                torch.testing.assert_close([call(), call()], [right, right])
            told["first"].append(warned)
        with chosen("auto") as told["in threads"]:
            in_threads(8)
        with chosen("triton"):
            told["refusals"] = refusals([*calls, *calls])
    return told


def passing(name: str, folder: Path) -> dict[str, Any]:
    """Return what comes through, and what does the next time."""
    with stand_in.gpu(), chosen("auto") as warned:
        from triton.runtime import driver

        before = dict(vars(driver.active.utils))
        PASSING[name](folder)
        first = refusals([lambda: smooth_l1_loss(*operands(9))])
        vars(driver.active.utils).update(before)
        then = refusals([lambda: smooth_l1_loss(*operands(9))])
    return {"refusals": first + then, "warnings": warned}


def isolated(name: str) -> dict[str, Any]:
    """Return what happens under a fault, in a process of its own."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        process = os.fork()
        if not process:
            os.environ["TRITON_CACHE_DIR"] = str(folder / "cache")
            try:
                told = (passing if name in PASSING else of_triton)(name, folder)
            except BaseException:
                told = {"raised": traceback.format_exc()}
            (folder / "told").write_text(json.dumps(told))
            os._exit(0)
        os.waitpid(process, 0)
        found: dict[str, Any] = json.loads((folder / "told").read_text())
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    os.environ.update(stand_in.ENVIRONMENT)
    print(json.dumps({name: isolated(name) for name in (*OF_TRITON, *OF_KERNELS, *PASSING)}))
