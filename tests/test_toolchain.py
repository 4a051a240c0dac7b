"""Whatever is wrong with Triton, training goes on in eager PyTorch, with one warning that says why.

Where the kernel was asked for, there is one error instead, at each call. `python -m
tests.test_toolchain` brings each fault about in a process of its own, in which tensors of the CPU
count as tensors on a GPU, and prints as JSON what is not as it must be; the tests read that.
"""

import json
import os
import re
import sys
import tempfile
import threading
import traceback
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain, repeat
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from bench import stand_in
from fused_smoothl1 import dispatch, ops, smooth_l1_loss
from fused_smoothl1.problem import NO_GRADIENTS, NO_NEEDS, make_problem
from tests import support
from tests.composed import composed
from tests.support import Loss, backend_set, call, results, run_python

Fault = Callable[[Path], Any]  # is brought about in an empty folder
Step = Callable[[], Any]


def modules_are(value: Any) -> Fault:
    names = "triton", "triton.language", "triton.runtime"
    return lambda _: sys.modules.update(dict.fromkeys(names, value))


def import_runs(code: str) -> Fault:
    """Let another module of Triton's name be found first."""

    def arise(folder: Path) -> None:
        (folder / "triton.py").write_text(code)
        sys.path.insert(0, str(folder))

    return arise


def nvidia(**environment: str) -> Fault:
    """Let Triton start its own driver for NVIDIA's GPUs, in such an environment."""

    def arise(folder: Path) -> None:
        torch.cuda.is_available = lambda: True
        for name in ("CC", "LD_LIBRARY_PATH"):
            os.environ.pop(name, None)
        usual = {"TRITON_LIBCUDA_PATH": "/", "TRITON_CACHE_DIR": str(folder)}
        os.environ.update(usual | environment)
        # Where the library is, `ldconfig` would say so.
        mock.patch("subprocess.check_output", return_value=b"").start()

    return arise


def ptxas(folder: Path) -> None:
    program = folder / "ptxas"
    version = 'case "$*" in *--version*) echo "release 12.8, V12.8.93"; exit ;; esac'
    program.write_text(f"#!/bin/sh\n{version}\necho 'ptxas fatal: no sm_90' >&2; exit 255\n")
    program.chmod(0o755)
    for name in ("TRITON_PTXAS_PATH", "TRITON_PTXAS_BLACKWELL_PATH"):
        os.environ[name] = str(program)


def load_by(**result: Any) -> Fault:
    """Let the driver load kernels with this result."""

    def arise(_: Path) -> None:
        from triton.runtime import driver

        driver.active.utils.load_binary = mock.Mock(**result)

    return arise


NO_MODULE = "Triton cannot be imported.*{}.*: on Linux, .* reinstall PyTorch"
NO_DRIVER = r"Triton cannot use cpu \(.*{}.*the driver's library.*\(CC\).*TRITON_CACHE_DIR"
NO_KERNEL = r"Triton cannot compile or load a kernel for cpu \(.*{}.*of Triton that knows the GPU"
NOWHERE = "/dev/null/nowhere"
INVALID = RuntimeError("Triton Error [CUDA]: device kernel image is invalid")

# Each with the cause and the way out, as a message names them.
BROKEN: dict[str, tuple[Fault, str]] = {
    "missing": (modules_are(None), "Triton is not installed: on Linux, .* reinstall PyTorch"),
    "mock": (modules_are(mock.MagicMock()), NO_MODULE.format("")),
    "stub": (import_runs(""), NO_MODULE.format("triton.py .*not a package")),
    "broken": (import_runs("raise OSError('no file')"), NO_MODULE.format("OSError: no file")),
    "no sources": (
        lambda _: mock.patch("inspect.getsourcelines", side_effect=OSError).start(),
        NO_MODULE.format("Python file"),
    ),
    # Triton knows no such GPU as this, which is not there.
    "foreign": (lambda _: None, NO_DRIVER.format("active drivers")),
    "no libcuda": (nvidia(TRITON_LIBCUDA_PATH=""), NO_DRIVER.format("libcuda")),
    "no cache folder": (nvidia(TRITON_CACHE_DIR=NOWHERE), NO_DRIVER.format(NOWHERE)),
    "no C compiler": (nvidia(PATH=NOWHERE), NO_DRIVER.format("Failed to find C compiler")),
    "ptxas": (ptxas, NO_KERNEL.format("PTXASError.*ptxas fatal")),
    "load": (load_by(side_effect=INVALID), NO_KERNEL.format("image is invalid")),
    # Of which there are fewer than the kernel needs; Triton says it only once.
    "threads": (load_by(return_value=(1, 1, 0, 0, 64)), NO_KERNEL.format("OutOfResources.*thr")),
}
# What is no fault of Triton's comes through, when the driver loads or launches a kernel.
PASSING: dict[str, tuple[str, BaseException]] = {
    "memory": ("load", RuntimeError("Triton Error [CUDA]: out of memory")),
    "capture": ("load", RuntimeError("not permitted when capturing")),
    "interrupt": ("load", KeyboardInterrupt("interrupted")),
    "launch": ("launch", RuntimeError("unspecified launch failure")),
}


def step(name: str, function: Loss = smooth_l1_loss) -> list[Tensor]:
    operands, options = call(name, 9)
    return results(function, operands, 3.0, **options)


def gradients(name: str) -> list[Tensor]:
    """Return the gradients alone: the loss may come from the stand-in, which computes nothing."""
    return step(name)[1:]


def compiled() -> list[Tensor]:
    """Compute in a compiled graph, whose generated code has no `__name__` to warn at."""
    torch._dynamo.reset()
    graph = torch.compile(smooth_l1_loss, backend="aot_eager", fullgraph=True)
    return step("float32 row and column weights, all gradients", graph)


def scaled() -> Any:
    """Multiply a gradient by what arrives."""
    backend, gradient = dispatch.backend_on(torch.device("cpu")), torch.ones(1 << 20)
    return backend.scale((gradient, *NO_GRADIENTS[1:]), torch.tensor(3.0), has_masks=False)


def operators() -> None:
    """Call the operators as a compiled graph does, with a transition point that is a tensor.

    Such a graph relies on the strides that it was told when it was compiled.
    """
    (target, input, mask), _ = call("float32 planes, channels_last target, pixel mask")
    problem = make_problem(input, target.detach(), mask, beta=torch.tensor(0.5), reduce=False)
    losses, *_ = ops.FORWARD(*problem, *NO_NEEDS)
    gradient, *_ = ops.BACKWARD(torch.ones_like(losses), *problem, True, *NO_NEEDS[1:])
    assert losses.stride() == gradient.stride() == input.stride()
    operands = [input.requires_grad_(), target.detach(), mask]
    assert_close([losses, gradient], results(composed, operands, beta=0.5, reduction="none"))


def in_threads() -> list[Any]:
    # (Of a kind that was called before: Python 3.11 fails to parse in several threads at once.)
    (operands, options), start = call("float32 dense", 9), threading.Barrier(8)

    def work(_: int) -> list[Tensor]:
        start.wait()
        return results(smooth_l1_loss, operands, **options)

    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(work, range(8)))


# Their kernels differ, and those of their backward passes.
STEPS: list[Step] = [
    partial(step, "float32 dense"),
    partial(step, "float32 dense, elementwise"),
    partial(step, "float32 row mask, int64 normalizer"),
    partial(step, "float32 slice of columns, no gradient"),
    in_threads,
    operators,
]
LATE = "float64 dense, all gradients", "bfloat16 row mask, float32 normalizer"
STEPS_OF_KERNELS: list[Step] = [*(partial(gradients, name) for name in LATE), scaled, compiled]


def training_goes_on(name: str, folder: Path) -> None:
    """In eager PyTorch, with one warning; where the kernel was asked for, each call is refused."""
    arise, why = BROKEN[name]
    of_kernels = why.startswith("Triton cannot compile")
    steps = STEPS + STEPS_OF_KERNELS if of_kernels else STEPS

    def result(step: Step) -> Any:
        torch.manual_seed(0)
        return step()

    with backend_set("eager"):
        expected = [result(step) for step in steps]
    with stand_in.gpu() if of_kernels else stand_in.tensors_on_gpu():
        if of_kernels:
            # The fault may come after the kernel of a forward pass was loaded.
            with backend_set("triton"):
                for late in LATE:
                    operands, options = call(late, 9)
                    smooth_l1_loss(*operands, **options)
        arise(folder)
        told = f"^fused_smoothl1 computes in eager .* on cpu, because {why}.*; set FUSED_.*=eager"
        for step, right in zip(steps, expected, strict=True):
            # Whichever is the first, it warns, and no other does.
            with backend_set("auto"), pytest.warns(RuntimeWarning, match=told) as caught:
                assert_close([result(step), result(step)], [right, right], equal_nan=True)
            assert ["fused_smoothl1" in str(one.message) for one in caught].count(True) == 1
            with backend_set("triton"):
                for _ in range(2):
                    with pytest.raises(RuntimeError, match=f"FUSED_.*=triton, but {why}"):
                        result(step)


def comes_through(name: str, folder: Path) -> None:
    """It raises; then the kernel is used again, and loaded only if it was not."""
    failing, error = PASSING[name]
    # Of what loading returns, the second is the kernel, and the last the number of threads.
    load, launch = mock.Mock(return_value=(1, "loaded", 0, 0, 1024)), mock.Mock()
    {"load": load, "launch": launch}[failing].side_effect = chain([error], repeat(mock.DEFAULT))
    with stand_in.gpu(), backend_set("auto"), warnings.catch_warnings():
        from triton.runtime import driver

        warnings.filterwarnings("error", "fused_smoothl1")  # Triton has some of its own.
        driver.active.utils.load_binary, driver.active.launcher_cls = load, lambda *_: launch
        with pytest.raises(type(error), match=re.escape(str(error))):
            step("float32 dense")
        for _ in range(2):
            step("float32 dense")
    assert load.call_count == (2 if failing == "load" else 1)
    assert {launched.args[4] for launched in launch.call_args_list} == {"loaded"}


def found_under(name: str) -> str:
    """Return what is not as it must be under a fault."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = f"{folder}/cache"
        try:
            check = comes_through if name in PASSING else training_goes_on
            check(name, Path(folder))
        except BaseException:
            return traceback.format_exc()
    return ""


FAULTS = [*BROKEN, *PASSING]


@pytest.fixture(scope="module")
def complaints() -> dict[str, str]:
    # (Triton prints what ptxas says before.)
    *_, told = run_python("-m", "tests.test_toolchain").splitlines()
    return dict(json.loads(told))


@support.needs_triton
@pytest.mark.parametrize("fault", FAULTS)
def test_fault(fault: str, complaints: dict[str, str]) -> None:
    assert not complaints[fault], complaints[fault]


if __name__ == "__main__":
    torch.set_num_threads(1)
    os.environ.update(stand_in.ENVIRONMENT)
    with get_context("fork").Pool(1, maxtasksperchild=1) as pool:
        told = pool.map(found_under, FAULTS, chunksize=1)
    print(json.dumps(dict(zip(FAULTS, told, strict=True))))
