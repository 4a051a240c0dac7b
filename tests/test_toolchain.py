"""Whatever is wrong with Triton, training goes on in eager PyTorch, with one warning that says why.

Where the kernel was asked for, there is one error instead, at each call. `tests/faults.py` makes
the faults, and compares.
"""

import json

import pytest

from tests import support
from tests.faults import FAULTS
from tests.support import run_python


@pytest.fixture(scope="module")
def found() -> dict[str, str]:
    done = run_python("-m", "tests.faults")
    assert done.returncode == 0, done.stderr
    told: dict[str, str] = json.loads(
        done.stdout.splitlines()[-1]
    )  # Triton prints what ptxas says.
    return told


@support.needs_triton
@pytest.mark.parametrize("fault", FAULTS)
def test_fault(fault: str, found: dict[str, str]) -> None:
    assert not found[fault], found[fault]
