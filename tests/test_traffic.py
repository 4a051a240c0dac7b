"""`python -m bench traffic` counts what PyTorch's operators and this library's kernel move."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import traffic
from bench.report import RESULTS, read
from bench.rivals import autograd_step, composition
from bench.traffic import NUMEL, Traffic, elements
from bench.workloads import Spec, build
from fused_smoothl1 import smooth_l1_loss
from tests.conftest import HAS_INTERPRETER, NO_INTERPRETER, on_interpreter
from tests.support import backend_set

ROWS = 50
N = 4 * ROWS
# Of x and y, which have N numbers, and of a row of 4: what each kernel reads and writes.
BY_HAND: dict[str, tuple[Callable[[Tensor, Tensor, Tensor], object], list[tuple[int, int]]]] = {
    "two operands": (lambda x, y, row: x + y, [(2 * N, N)]),
    "a broadcast operand": (lambda x, y, row: x * row.expand(ROWS, 4), [(N + 4, N)]),
    "a sum": (lambda x, y, row: x.sum(), [(N, 1)]),
    "in place": (lambda x, y, row: x.add_(y), [(2 * N, N)]),
    "filled": (lambda x, y, row: x.zero_(), [(0, N)]),
    "into another tensor": (lambda x, y, row: torch.add(x, row, out=y), [(N + 4, N)]),
    "a fill inside": (lambda x, y, row: torch.zeros_like(x), [(0, N)]),
    "a copy inside": (lambda x, y, row: x.double(), [(N, N)]),
    "views": (lambda x, y, row: x.detach().t()[1:].expand(2, 3, ROWS), []),
    "not written": (lambda x, y, row: torch.empty_like(x), []),
    "two kernels": (lambda x, y, row: (x * y).sum(), [(2 * N, N), (N, 1)]),
}


@pytest.mark.parametrize("case", BY_HAND)
def test_what_an_operator_moves(case: str) -> None:
    action, expected = BY_HAND[case]
    operands = torch.ones(ROWS, 4), torch.ones(ROWS, 4), torch.ones(4)
    with Traffic() as found:
        action(*operands)
    assert [(elements(k.reads), elements(k.writes)) for k in found.kernels] == expected


def test_composition() -> None:
    """What each of its kernels reads and writes, in N, written down by hand."""
    composed, fused, names = traffic.counted()
    found = {
        section: [
            (kernel.operator, *(elements(part) // NUMEL for part in (kernel.reads, kernel.writes)))
            for kernel in kernels
        ]
        for section, kernels in composed.sections.items()
    }
    product, last = ("mul", 2, 1), ("smooth_l1_loss_backward", 2, 1)
    assert found == {
        "forward": [("sub", 2, 1), product, ("smooth_l1_loss", 1, 1), product, ("mean", 1, 0)],
        "backward": [("div", 0, 1), product, ("zero_", 0, 1), last, product],
    }
    assert composed.total == "Eager PyTorch: 23 N in 10 kernels"
    assert composed.memory == "3 N of new memory"
    assert fused.total == "This library: 5 N in one kernel"
    assert fused.memory == "1 N of new memory"
    (gradient,) = composed.kernels[-1].writes
    assert names[gradient.untyped_storage().data_ptr()] == "gradient"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_are_what_a_gpu_was_given(dtype: torch.dtype) -> None:
    """But for one fill, of the counters by which the blocks of a large mean know the last one."""
    workload = build(Spec("dense", NUMEL, dtype), torch.device("cpu"))
    with Traffic() as found:
        autograd_step(composition, workload)()
    name = workload.spec.dtype_name
    launches = [
        row.launches
        for row in read(RESULTS / "nvidia-h100-80gb-hbm3.json").rows
        if (row.case, row.rival, row.dtype) == ("dense", "eager_composition", name)
    ]
    assert len(found.kernels) + 1 in launches


@on_interpreter
@pytest.mark.skipif(not HAS_INTERPRETER, reason=NO_INTERPRETER)
def test_this_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel reads four operands and writes the gradient; the one of backward moves nothing.

    (Small calls multiply in its place, up to a limit that is lowered here.)
    """
    from triton.runtime.interpreter import InterpreterBuilder

    from fused_smoothl1 import launch

    moved: dict[str, int] = {}

    def count(name: str, mask: int) -> None:
        method = getattr(InterpreterBuilder, name)

        def counting(self: Any, *arguments: Any, **options: Any) -> Any:
            moved[name] = moved.get(name, 0) + int(arguments[mask].data.sum())
            return method(self, *arguments, **options)

        monkeypatch.setattr(InterpreterBuilder, name, counting)

    count("create_masked_load", 1)
    count("create_masked_store", 2)
    monkeypatch.setattr(launch, "MULTIPLY_BELOW", 0)
    workload = build(Spec("dense", NUMEL), torch.device("cpu"))
    with backend_set("triton"):
        autograd_step(smooth_l1_loss, workload)()
    (kernel,) = traffic.counted()[1].kernels
    in_n = [elements(part) / NUMEL for part in (kernel.reads, kernel.writes)]
    assert [round(count / NUMEL, 2) for count in moved.values()] == in_n == [4, 1]
    assert workload.floor_bytes == kernel.moved * workload.input.element_size()


def test_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert traffic.main(["--out", str(tmp_path / "new")]) == 0
    assert (tmp_path / "new" / "traffic.png").stat().st_size > 10_000
    assert "23 N in 10 kernels" in capsys.readouterr().out
