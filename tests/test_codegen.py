"""The machine code of every kind of launch, compiled for every target without its GPU.

What costs speed without changing a result, or is right only by luck, shows in it: spilled
registers, narrow accesses, few programs a multiprocessor, a missing barrier.
"""

import json
import re
from typing import Any

import pytest

from bench.stand_in import TARGETS
from tests import support
from tests.support import TRITON_VERSION, run_python

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

pytestmark = [support.needs_triton, pytest.mark.parametrize("target", TARGETS)]


@pytest.fixture(scope="module")
def table() -> list[dict[str, Any]]:
    # 1 is what it ends with where it finds something, which the tests then name.
    told = run_python("-m", "bench", "codegen", "--json", status=[0, 1])
    return list(json.loads(told))


@pytest.fixture
def kernels(target: str, table: list[dict[str, Any]]) -> Kernels:
    found = {f"{k['dtype']} {k['call']}": k for k in table if k["target"] == target}
    unknown = next(iter(found.values()))["unknown"]
    if unknown is not None:
        # A change in Triton that this stumbles over is no target that Triton gave up.
        assert target not in {"sm_80", "sm_90", "sm_100", "gfx942"}, unknown
        pytest.skip(f"waits for a Triton that knows this target: {unknown}")
    return found


def test_every_kind_of_launch(kernels: Kernels) -> None:
    roles = {name.split(": ")[1] for name in kernels}
    assert roles == {"forward", "backward", "recompute", "scale"}
    accesses = [kernel["access"].split() for kernel in kernels.values() if kernel["access"]]
    *_, inside, outside, beta, upstream = map(set, zip(*accesses, strict=True))
    assert all({kind for kind in kinds if kind.endswith("-mask")} for kinds in (inside, outside))
    assert beta == upstream == {"-", "scalar", "flat", "row", "vector", "strided"}


def test_nothing_is_in_the_way_of_memory(kernels: Kernels, target: str) -> None:
    """Nothing spills, and dense operands are accessed as wide in the hot loop as can be.

    While memory runs at full speed, dense kernels leave half of the slots for instructions empty,
    and the others a third of them.
    """
    most = {**dict.fromkeys(kernels, MOST_REGISTERS[target[:2]]), DIVIDES: MOST_WITH_DIVISION}
    if TRITON_VERSION < (3, 6) and target.startswith("gfx"):
        # There a block of this one, which is set apart, looks like a loop.
        kernels.pop("float32 planes, channels_last target, pixel mask: forward")
    for name, kernel in kernels.items():
        assert (kernel["spills"], kernel["vectorized"]) == (0, True), kernel
        assert kernel["registers"] <= most[name], kernel
        # With input and target of one type, 128 bits are possible, be the size odd, and no others.
        if re.match(r"\w+ dense", name):
            assert {*kernel["loads"], *kernel["stores"]} == {"128"}, kernel
        assert bool(kernel["issue_shares"]) == (target in DATASHEETS)
        for share, _ in kernel["issue_shares"].values():
            assert 0 < share < (0.5 if " dense" in name else 0.65), kernel


def test_a_beta_for_all_costs_nothing(kernels: Kernels, target: str) -> None:
    """A tensor with one value, beside a number: no more accesses in the loop, no fewer programs."""
    for call in (": forward", ", elementwise: forward", ", elementwise: backward"):
        number = kernels[f"float32 dense{call}"]
        tensor = kernels[f"float32 dense, beta for all{call}"]
        assert (tensor["loads"], tensor["stores"]) == (number["loads"], number["stores"])
        assert tensor["instructions"] <= 1.05 * number["instructions"]
        assert tensor["registers"] <= max(number["registers"] + 2, LAUNCHED_AT_ONCE[target[:2]])


def test_ticket(kernels: Kernels) -> None:
    """The partial is stored, then the program waits, then releases it; who draws last reads it."""
    with_ticket = {name: kernel for name, kernel in kernels.items() if kernel["atomics"]}
    assert any(name.startswith("float16") for name in with_ticket)
    for name, kernel in with_ticket.items():
        (atomic,) = kernel["atomics"]
        assert re.search("(?i)add", atomic), name
        assert not re.search("(?i)f32", atomic), "no sum depends on the order of arrival"
        assert kernel["ticket"] == ["store", "barrier", "release", "ticket", "acquire", "past L1"]
