"""The interpreter that the tests run in refuses what a GPU would not survive."""

from typing import Any

import pytest
import torch

from tests import support

pytestmark = [support.needs_no_gpu, support.needs_interpreter]


def _copy(first: int = 0, step: int = 1, *, run: int = 1, multiple: int = 1, room: int = 8) -> Any:
    """Copy eight of the 8 * step values 0, 1, 2 … into a tensor of its own."""
    from tests.kernels import copy_kernel

    # (What is written past its end is still in the allocation.)
    found = torch.full((8,), -1, dtype=torch.int32)[:room]
    copy_kernel[(1,)](torch.arange(8 * step, dtype=torch.int32), found, first, step, run, multiple)
    return found.tolist()


@pytest.mark.parametrize(
    ("step", "run", "multiple"), [(1, 1, 1), (3, 1, 1), (1, 2, 2), (1, 4, 4), (1, 8, 8), (1, 4, 2)]
)
def test_what_is_right(step: int, run: int, multiple: int) -> None:
    """Within bounds, with hints that are true."""
    assert _copy(step=step, run=run, multiple=multiple) == [step * i for i in range(8)]


@pytest.mark.parametrize(("first", "step"), [(-1, 1), (1, 1), (3, 3), (-1, 3), (10**6, 1)])
def test_load_outside(first: int, step: int) -> None:
    with pytest.raises(Exception, match="a load outside"):
        _copy(first, step)


def test_store_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also into what is only read."""
    with pytest.raises(Exception, match="a store outside"):
        _copy(room=7)
    monkeypatch.setattr("tests.interpreter.READ_ONLY", ("found_ptr",))
    with pytest.raises(Exception, match="a store outside"):
        _copy()


@pytest.mark.parametrize(("step", "run", "multiple"), [(2, 2, 1), (3, 8, 1), (1, 4, 8), (1, 2, 4)])
def test_false_hints(step: int, run: int, multiple: int) -> None:
    with pytest.raises(Exception, match="not contiguous" if step > 1 else "not a multiple"):
        _copy(step=step, run=run, multiple=multiple)
