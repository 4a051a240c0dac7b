"""A compiled kernel is launched again without Triton, and only where Triton would launch the same.

`tests/remembered.py` makes the calls, in a process of its own, in which Triton does not interpret.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import HAS_TRITON

ROOT = Path(__file__).parents[1]
TARGETS = ["sm_90", "gfx942"]

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="waits for a machine with Triton")


@pytest.fixture(scope="module", params=TARGETS)
def found(request: pytest.FixtureRequest) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.remembered", request.param]
    # What it compiles for AMD depends on the size of a storage then, in Triton 3.5 too.
    buffers = {"AMDGCN_USE_BUFFER_OPS": "1"}
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **buffers}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told: dict[str, Any] = json.loads(done.stdout)
    return told


def test_the_same_as_triton(found: dict[str, Any]) -> None:
    """The code, the number of programs and every argument, whatever came before."""
    assert found["kinds"] > 100
    for name in ("first", "again"):
        assert found[name]["wrong"] == []
        assert found[name]["launches"] > 300


def test_triton_is_asked_once_for_each_kind(found: dict[str, Any]) -> None:
    assert found["first"]["by_triton"] == found["kinds"]
    assert found["again"]["by_triton"] == 0


def test_no_compilation_that_changes_nothing(found: dict[str, Any]) -> None:
    """The outermost size is not read, so it is not compiled in."""
    assert found["rows"][1:] == [0] * 5
    assert found["feature_maps"] <= 9


def test_hooks_see_each_launch(found: dict[str, Any]) -> None:
    """Those of profilers, and of a kernel."""
    hooks = "launch_enter_hook", "launch_exit_hook", "pre_run_hook"
    assert found["told"] == [hook for hook in hooks for _ in range(2)]


def test_debugging_compiles_anew(found: dict[str, Any]) -> None:
    assert found["debug"] == [2, 0]


def test_triton_is_asked_where_it_would_compile_otherwise(found: dict[str, Any]) -> None:
    asked = found["asked"]
    assert asked.pop("nothing") == 0
    assert asked == dict.fromkeys(asked, 2)
    assert len(asked) == 3


def test_ordinary_launch(found: dict[str, Any]) -> None:
    """Where a version of Triton has not all that is needed, it is asked for each launch."""
    for told in found["ordinary"]:
        assert told == {
            "launches": found["first"]["launches"],
            "by_triton": told["launches"],
            "wrong": [],
        }
