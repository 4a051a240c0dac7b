"""The machine code of every kind of launch, compiled for every target without its GPU.

What costs speed without changing a result, or is right only by luck, shows in it: spilled
registers, narrow accesses, few programs a multiprocessor, a missing barrier.
"""

import json
from typing import Any

import pytest

from bench.stand_in import TARGETS
from tests import support
from tests.support import FLOATS, TRITON_VERSION, run_python

Kernels = dict[str, dict[str, Any]]  # on one target, by dtype, call and role

# A multiprocessor has 65536 registers: six programs of 128 threads keep their loads in flight.
# AMD's have several times as many.
MOST_REGISTERS = {"sm": 80, "gf": 128}
# Where each element divides in float64, which NVIDIA's GPUs do in a subroutine: four programs.
DIVIDES, MOST_WITH_DIVISION = "float64 dense, a beta each, all gradients: backward", 128
# With so many a multiprocessor holds the eight programs of 128 threads that are launched for it
# (gfx9 even with 128).
LAUNCHED_AT_ONCE = {"sm": 64, "gf": 96}
DATASHEETS = {"sm_80", "sm_89", "sm_90", "gfx942"}
TICKET = ["store", "barrier", "release", "ticket", "acquire", "past L1"]

pytestmark = [support.needs_triton, pytest.mark.parametrize("target", TARGETS)]


@pytest.fixture(scope="module")
def table() -> list[dict[str, Any]]:
    done = run_python("-m", "bench", "codegen", "--json")
    # 1 is what it returns where it finds something, which the tests then name.
    assert done.returncode in (0, 1), done.stderr
    told: list[dict[str, Any]] = json.loads(done.stdout)
    return told


@pytest.fixture
def kernels(target: str, table: list[dict[str, Any]]) -> Kernels:
    found = {f"{k['dtype']} {k['call']}": k for k in table if k["target"] == target}
    assert found, "the target is in the table"
    unknown = next(iter(found.values()))["unknown"]
    if unknown is not None:
        # A change in Triton that this stumbles over is no target that Triton gave up.
        assert target not in {"sm_80", "sm_90", "sm_100", "gfx942"}, unknown
        pytest.skip(f"waits for a Triton that knows this target: {unknown}")
    return found


def test_every_kind_of_launch(kernels: Kernels) -> None:
    assert {name.split(": ")[1] for name in kernels} == {
        "forward",
        "backward",
        "recompute",
        "scale",
    }
    accesses = [kernel["access"].split() for kernel in kernels.values() if kernel["access"]]
    *_, inside, outside, beta, upstream = map(set, zip(*accesses, strict=True))
    for kinds in (inside, outside):
        assert any(kind.endswith("-mask") for kind in kinds)
    for kinds in (beta, upstream):
        assert kinds == {"-", "scalar", "flat", "row", "vector", "strided"}


def test_registers_and_accesses(kernels: Kernels, target: str) -> None:
    """Nothing spills, and dense operands are accessed as wide in the hot loop as can be."""
    most = {**dict.fromkeys(kernels, MOST_REGISTERS[target[:2]]), DIVIDES: MOST_WITH_DIVISION}
    if TRITON_VERSION < (3, 6) and target.startswith("gfx"):
        # There a block of this one, which is set apart, looks like a loop.
        kernels.pop("float32 planes, channels_last target, pixel mask: forward")
    for name, kernel in kernels.items():
        assert (kernel["spills"], kernel["vectorized"]) == (0, True), kernel
        assert kernel["registers"] <= most[name], kernel


@pytest.mark.parametrize("dtype", FLOATS)
def test_dense_operands_of_odd_size(dtype: Any, kernels: Kernels) -> None:
    """The layout allows 128 bits here, whatever the size, and nothing else is accessed."""
    start = f"{str(dtype).removeprefix('torch.')} dense"
    dense = {name: kernel for name, kernel in kernels.items() if name.startswith(start)}
    assert dense
    for name, kernel in dense.items():
        assert set(kernel["access"].split()) <= {"flat", "scalar", "-"}, name
        assert {*kernel["loads"], *kernel["stores"]} == {"128"}, name


@pytest.mark.parametrize(
    "call", ["dense: forward", "dense, elementwise: forward", "dense, elementwise: backward"]
)
def test_a_beta_for_all_costs_nothing(call: str, kernels: Kernels, target: str) -> None:
    """A tensor with one value, beside a number: no more accesses in the loop, no fewer programs."""
    number = kernels[f"float32 {call}"]
    tensor = kernels[f"float32 {call.replace('dense', 'dense, beta for all')}"]
    assert (tensor["loads"], tensor["stores"]) == (number["loads"], number["stores"])
    assert tensor["instructions"] <= 1.05 * number["instructions"]
    assert tensor["registers"] <= max(number["registers"] + 2, LAUNCHED_AT_ONCE[target[:2]])


def test_memory_is_the_limit(kernels: Kernels, target: str) -> None:
    """While it runs at full speed, dense kernels leave half of the slots for instructions empty.

    The others leave a third of them, except where masks exclude nearly everything, which spares
    memory and not instructions.
    """
    for name, kernel in kernels.items():
        assert kernel["per_element"] > 0
        assert bool(kernel["issue_shares"]) == (target in DATASHEETS)
        for most, least in kernel["issue_shares"].values():
            assert 0 < most < (0.5 if " dense" in name else 0.65), name
            assert least == most or ("mask" in name and least > most), name


def test_ticket(kernels: Kernels) -> None:
    """The partial is stored, then the program waits, then releases it; who draws last reads it."""
    with_ticket = {name: kernel for name, kernel in kernels.items() if kernel["atomics"]}
    assert any(name.startswith("float16") for name in with_ticket)
    for name, kernel in with_ticket.items():
        (atomic,) = kernel["atomics"]
        assert "add" in atomic.lower(), name
        assert "f32" not in atomic.lower(), "no sum depends on the order of arrival"
        assert kernel["ticket"] == TICKET, name
