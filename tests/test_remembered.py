"""A compiled kernel is launched again without Triton, and only where Triton would launch the same.

`tests/remembered.py` compares, in a process of its own, in which Triton does not interpret.
"""

import pytest

from tests import support
from tests.support import run_python


@support.needs_triton
@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_remembered(target: str) -> None:
    # What it compiles for AMD depends on the size of a storage then, in Triton 3.5 too.
    done = run_python("-m", "tests.remembered", target, AMDGCN_USE_BUFFER_OPS="1")
    assert done.returncode == 0, done.stderr
