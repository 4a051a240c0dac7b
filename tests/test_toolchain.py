"""Whatever is wrong with Triton, training goes on in eager PyTorch, with one warning that says why.

Where the kernel was asked for, there is one error instead. `tests/faults.py` makes the faults.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import HAS_TRITON
from tests.faults import OF_KERNELS, OF_TRITON, PASSING

ROOT = Path(__file__).parents[1]
# What a message names: the cause, and the way out.
NAMED = {
    "missing": ("Triton is not installed", "reinstall PyTorch"),
    "stub": ("cannot be imported", "not a package", "reinstall"),
    "mock": ("cannot be imported", "reinstall"),
    "OSError": ("cannot be imported", "OSError: libtriton.so", "reinstall"),
    "RuntimeError": ("cannot be imported", "RuntimeError: built for", "reinstall"),
    "AttributeError": ("cannot be imported", "AttributeError: module has", "reinstall"),
    "no sources": ("cannot be imported", "Python file", "reinstall"),
    "foreign": ("cannot use cpu", "active drivers", "the driver's library"),
    "no libcuda": ("cannot use cpu", "libcuda", "the driver's library"),
    "no cache folder": ("cannot use cpu", "/dev/null/nowhere", "TRITON_CACHE_DIR"),
    "no C compiler": ("cannot use cpu", "Failed to find C compiler", "(CC)"),
    "ptxas": (
        "kernel for cpu",
        "PTXASError",
        "ptxas fatal",
        "version of Triton that knows the GPU",
    ),
    "load": ("kernel for cpu", "image is invalid", "version of Triton that knows the GPU"),
    "threads": ("kernel for cpu", "OutOfResources", "threads"),
}
# What comes through of those that are none of Triton's, and what comes of a second call.
THROUGH = {
    "memory": ["RuntimeError: Triton Error [CUDA]: out of memory", "nothing"],
    "capture": ["RuntimeError: not permitted when capturing", "nothing"],
    "interrupt": ["KeyboardInterrupt: interrupted", "nothing"],
    "launch": ["RuntimeError: unspecified launch failure"] * 2,
}
CALLS = 6

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="waits for a machine with Triton")


@pytest.fixture(scope="module")
def found() -> dict[str, dict[str, Any]]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("TRITON_", "FUSED_"))}
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults"],
        cwd=ROOT,
        env={**kept, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    # (Triton prints what ptxas says.)
    told: dict[str, dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return told


def _check_warning(fault: str, warnings: list[str]) -> None:
    (warning,) = warnings
    assert warning.startswith("RuntimeWarning: fused_smoothl1 computes in eager PyTorch on cpu")
    for word in (*NAMED[fault], "FUSED_SMOOTHL1_BACKEND=eager"):
        assert word in warning


@pytest.mark.parametrize("fault", [*OF_TRITON, *OF_KERNELS])
def test_training_goes_on(fault: str, found: dict[str, dict[str, Any]]) -> None:
    """With the numbers of eager PyTorch, whichever call is the first, and in several threads."""
    told = found[fault]
    assert "raised" not in told, told["raised"]
    assert len(told["first"]) >= CALLS
    for warnings in (*told["first"], told["in threads"]):
        _check_warning(fault, warnings)


@pytest.mark.parametrize("fault", OF_KERNELS)
def test_backward_pass_goes_on(fault: str, found: dict[str, dict[str, Any]]) -> None:
    """Where the forward pass had its kernel, but the backward pass has none."""
    told = found[fault]["in backward"]
    assert len(told) == 3
    for warning in told:
        _check_warning(fault, [warning])


@pytest.mark.parametrize("fault", [*OF_TRITON, *OF_KERNELS])
def test_refused_where_the_kernel_was_asked_for(
    fault: str, found: dict[str, dict[str, Any]]
) -> None:
    """At each call."""
    told = found[fault]["refusals"]
    assert len(told) >= 2 * CALLS
    for refusal in told:
        assert "RuntimeError: FUSED_SMOOTHL1_BACKEND=triton, but" in refusal
        for word in NAMED[fault]:
            assert word in refusal


@pytest.mark.parametrize("fault", PASSING)
def test_what_is_no_fault_of_triton_comes_through(
    fault: str, found: dict[str, dict[str, Any]]
) -> None:
    """And the kernel is taken again."""
    assert found[fault] == {"refusals": THROUGH[fault], "warnings": []}
