"""The machine code of every kind of launch, compiled for every target without its GPU.

What costs speed without changing a result, or is right only by luck, shows in it: spilled
registers, narrow accesses, few programs a multiprocessor, a missing barrier.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.crosscompile import TARGETS
from tests.conftest import HAS_TRITON

Row = dict[str, Any]

ROOT = Path(__file__).parents[1]
# A multiprocessor has 65536 registers: six programs of 128 threads keep their loads in flight.
# AMD's have several times as many.
MOST_REGISTERS = {"sm": 80, "gfx": 128}
TICKET = ["store", "barrier", "release", "ticket", "acquire", "past L1"]

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed on this machine")


@pytest.fixture(scope="module")
def table() -> list[Row]:
    """Compile everything, in processes of their own: this one may have Triton's interpreter."""
    command = [sys.executable, "-m", "bench", "codegen", "--json"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    # 1 is what it returns where it finds something, which the tests then name.
    assert done.returncode in (0, 1), done.stderr
    assert done.stdout, done.stderr
    rows: list[Row] = json.loads(done.stdout)
    return rows


@pytest.fixture(params=TARGETS)
def rows(request: pytest.FixtureRequest, table: list[Row]) -> list[Row]:
    """Return the variants on one target."""
    found = [row for row in table if row["target"] == request.param]
    assert found, "the target is in the table"
    if found[0]["unknown"] is not None:
        pytest.skip(f"the installed Triton does not know it: {found[0]['unknown']}")
    return found


def test_current_targets_are_known(table: list[Row]) -> None:
    """A change in Triton that this stumbles over is not mistaken for a target that it gave up."""
    unknown = {row["target"]: row["unknown"] for row in table if row["unknown"] is not None}
    assert not unknown.keys() & {"sm_80", "sm_90", "sm_100", "gfx942"}, unknown


def test_every_kind_of_launch(rows: list[Row]) -> None:
    roles = {row["variant"].rpartition(": ")[2] for row in rows}
    assert roles == {"forward", "backward", "refresh", "rescale"}
    kinds = {kind for row in rows for kind in row["access"].split()}
    assert kinds >= {"scalar", "flat", "row", "vector", "strided"}


def test_no_spill(rows: list[Row]) -> None:
    assert {_name(row): row["spills"] for row in rows if row["spills"]} == {}


def test_full_width(rows: list[Row]) -> None:
    """Every access of a dense operand in the hot loop is as wide as the layout allows."""
    columns = ("loads", "full_loads", "stores", "full_stores")
    narrow = {_name(r): [r[column] for column in columns] for r in rows if not r["vectorized"]}
    assert narrow == {}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_dense_operands_of_odd_size(dtype: str, rows: list[Row]) -> None:
    """The layout allows 128 bits here, whatever the size, and nothing else is accessed."""
    dense = [r for r in rows if r["dtype"] == dtype and r["variant"].startswith("dense")]
    assert dense
    for row in dense:
        assert set(row["access"].split()) <= {"flat", "scalar", "-"}, _name(row)
        assert {*row["loads"], *row["stores"]} == {"128"}, _name(row)


def test_occupancy(rows: list[Row]) -> None:
    vendor = "sm" if rows[0]["target"].startswith("sm") else "gfx"
    most = MOST_REGISTERS[vendor]
    assert {_name(r): r["registers"] for r in rows if r["registers"] > most} == {}


def test_ticket(rows: list[Row]) -> None:
    """The partial is stored, then the program waits, then releases it; who draws last reads it."""
    with_ticket = [row for row in rows if row["atomics"]]
    assert any(row["dtype"] == "float16" for row in with_ticket)
    for row in with_ticket:
        assert len(row["atomics"]) == 1, _name(row)
        assert "add" in row["atomics"][0].lower(), _name(row)
        assert "f32" not in row["atomics"][0].lower(), "no sum depends on the order of arrival"
        assert row["ticket"] == TICKET, _name(row)


def _name(row: Row) -> str:
    return f"{row['dtype']} {row['variant']}"
