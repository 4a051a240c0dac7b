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

from bench.stand_in import TARGETS
from tests.conftest import HAS_TRITON, version

Kernel = dict[str, Any]

ROOT = Path(__file__).parents[1]
# A multiprocessor has 65536 registers: six programs of 128 threads keep their loads in flight.
# AMD's have several times as many.
MOST_REGISTERS = {"sm": 80, "gfx": 128}
# Where each element divides in float64, which NVIDIA's GPUs do in a subroutine: four programs.
DIVIDES = "float64 dense, a beta each, all gradients: backward"
MOST_WITH_DIVISION = 128
# With so many a multiprocessor holds the eight programs of 128 threads that are launched for it
# (gfx9 even with 128).
LAUNCHED_AT_ONCE = {"sm": 64, "gfx": 96}
# Those whose datasheets are in the table.
GPUS = {"sm_80", "sm_89", "sm_90", "gfx942"}
TICKET = ["store", "barrier", "release", "ticket", "acquire", "past L1"]

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed on this machine")


@pytest.fixture(scope="module")
def table() -> list[Kernel]:
    """Compile everything, in processes of their own: this one may have Triton's interpreter."""
    command = [sys.executable, "-m", "bench", "codegen", "--json"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    # 1 is what it returns where it finds something, which the tests then name.
    assert done.returncode in (0, 1), done.stderr
    assert done.stdout, done.stderr
    kernels: list[Kernel] = json.loads(done.stdout)
    return kernels


@pytest.fixture(params=TARGETS)
def kernels(request: pytest.FixtureRequest, table: list[Kernel]) -> list[Kernel]:
    """Return the kernels on one target."""
    found = [kernel for kernel in table if kernel["target"] == request.param]
    assert found, "the target is in the table"
    if found[0]["unknown"] is not None:
        pytest.skip(f"the installed Triton does not know it: {found[0]['unknown']}")
    return found


def test_current_targets_are_known(table: list[Kernel]) -> None:
    """A change in Triton that this stumbles over is not mistaken for a target that it gave up."""
    unknown = {k["target"]: k["unknown"] for k in table if k["unknown"] is not None}
    assert not unknown.keys() & {"sm_80", "sm_90", "sm_100", "gfx942"}, unknown


def test_every_kind_of_launch(kernels: list[Kernel]) -> None:
    roles = {kernel["call"].rpartition(": ")[2] for kernel in kernels}
    assert roles == {"forward", "backward", "recompute", "scale"}
    accesses = [kernel["access"].split() for kernel in kernels if kernel["access"]]
    for position in (2, 3):  # the inside and the outside weights
        assert any(kinds[position].endswith("-mask") for kinds in accesses)
    for position in (4, 5):  # beta and the upstream gradient
        kinds = {own[position] for own in accesses}
        assert kinds == {"-", "scalar", "flat", "row", "vector", "strided"}


def test_no_spill(kernels: list[Kernel]) -> None:
    assert {_name(kernel): kernel["spills"] for kernel in kernels if kernel["spills"]} == {}


def test_full_width(kernels: list[Kernel]) -> None:
    """Every access of a dense operand in the hot loop is as wide as the layout allows."""
    columns = ("loads", "full_loads", "stores", "full_stores")
    narrow = {_name(k): [k[column] for column in columns] for k in kernels if not k["vectorized"]}
    if version("triton") < (3, 6) and kernels[0]["target"].startswith("gfx"):
        # There a block of this one, which is set apart, looks like a loop.
        narrow.pop("float32 planes, channels_last target, pixel mask: forward", None)
    assert narrow == {}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_dense_operands_of_odd_size(dtype: str, kernels: list[Kernel]) -> None:
    """The layout allows 128 bits here, whatever the size, and nothing else is accessed."""
    dense = [k for k in kernels if k["dtype"] == dtype and k["call"].startswith("dense")]
    assert dense
    for kernel in dense:
        assert set(kernel["access"].split()) <= {"flat", "scalar", "-"}, _name(kernel)
        assert {*kernel["loads"], *kernel["stores"]} == {"128"}, _name(kernel)


def test_occupancy(kernels: list[Kernel]) -> None:
    most = dict.fromkeys(map(_name, kernels), MOST_REGISTERS[_vendor(kernels)])
    most[DIVIDES] = MOST_WITH_DIVISION
    many = {_name(k): k["registers"] for k in kernels if k["registers"] > most[_name(k)]}
    assert many == {}


def test_a_beta_for_all_costs_nothing(kernels: list[Kernel]) -> None:
    """A tensor with one value, beside a number: no more accesses in the loop, no fewer programs."""
    named = {_name(kernel): kernel for kernel in kernels}
    for call in ("dense", "dense, elementwise"):
        for role in ("forward", "backward"):
            number = named.get(f"float32 {call}: {role}")
            if number is None:  # The backward pass of a sum scales what the forward pass computed.
                assert (call, role) == ("dense", "backward")
                continue
            tensor = named[f"float32 {call.replace('dense', 'dense, beta for all')}: {role}"]
            for column in ("loads", "stores"):
                assert tensor[column] == number[column]
            assert tensor["instructions"] <= 1.05 * number["instructions"]
            enough = LAUNCHED_AT_ONCE[_vendor(kernels)]
            assert tensor["registers"] <= max(number["registers"] + 2, enough)


def test_memory_is_the_limit(kernels: list[Kernel]) -> None:
    """While it runs at full speed, dense kernels leave half of the slots for instructions empty.

    The others leave a third of them, except where masks exclude nearly everything, which spares
    memory and not instructions.
    """
    shares = {(_name(k), gpu): pair for k in kernels for gpu, pair in k["issue_shares"].items()}
    for (name, gpu), (most, least) in shares.items():
        assert 0 < most < (0.5 if " dense" in name else 0.65), (name, gpu)
        assert least >= most
        assert least == most or "mask" in name
    assert bool(shares) == (kernels[0]["target"] in GPUS)
    assert all(kernel["per_element"] > 0 for kernel in kernels)


def test_ticket(kernels: list[Kernel]) -> None:
    """The partial is stored, then the program waits, then releases it; who draws last reads it."""
    with_ticket = [kernel for kernel in kernels if kernel["atomics"]]
    assert any(kernel["dtype"] == "float16" for kernel in with_ticket)
    for kernel in with_ticket:
        assert len(kernel["atomics"]) == 1, _name(kernel)
        assert "add" in kernel["atomics"][0].lower(), _name(kernel)
        assert "f32" not in kernel["atomics"][0].lower(), "no sum depends on the order of arrival"
        assert kernel["ticket"] == TICKET, _name(kernel)


def _vendor(kernels: list[Kernel]) -> str:
    return "sm" if kernels[0]["target"].startswith("sm") else "gfx"


def _name(kernel: Kernel) -> str:
    return f"{kernel['dtype']} {kernel['call']}"
