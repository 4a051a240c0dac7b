"""`python -m bench traffic` counts what PyTorch's operators and this library's kernel move."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bench import traffic
from bench.report import RESULTS, read
from bench.rivals import autograd_step, composition
from bench.traffic import NUMEL, Traffic, elements
from bench.workloads import Spec, build
from fused_smoothl1 import smooth_l1_loss
from tests import support

CPU = torch.device("cpu")
N = 200
# Of x and y, which have N numbers, and of a row of 4: what each kernel reads and writes.
BY_HAND: dict[str, tuple[Callable[[Tensor, Tensor, Tensor], object], list[tuple[int, int]]]] = {
    "two operands": (lambda x, y, row: x + y, [(2 * N, N)]),
    "a broadcast operand": (lambda x, y, row: x * row.expand_as(x), [(N + 4, N)]),
    "a sum": (lambda x, y, row: x.sum(), [(N, 1)]),
    "in place": (lambda x, y, row: x.add_(y), [(2 * N, N)]),
    "filled": (lambda x, y, row: x.zero_(), [(0, N)]),
    "into another tensor": (lambda x, y, row: torch.add(x, row, out=y), [(N + 4, N)]),
    "a fill inside": (lambda x, y, row: torch.zeros_like(x), [(0, N)]),
    "a copy inside": (lambda x, y, row: x.double(), [(N, N)]),
    "views": (lambda x, y, row: x.detach().t()[1:].expand(2, 3, -1), []),
    "not written": (lambda x, y, row: torch.empty_like(x), []),
    "two kernels": (lambda x, y, row: (x * y).sum(), [(2 * N, N), (N, 1)]),
}


@pytest.mark.parametrize("case", BY_HAND)
def test_what_an_operator_moves(case: str) -> None:
    action, expected = BY_HAND[case]
    operands = torch.ones(N // 4, 4), torch.ones(N // 4, 4), torch.ones(4)
    with Traffic() as found:
        action(*operands)
    assert [(elements(k.reads), elements(k.writes)) for k in found.kernels] == expected


def test_composition() -> None:
    """What each of its kernels reads and writes, in N, written down by hand."""
    composed, fused, names = traffic.counted()
    found = [
        (kernel.operator, elements(kernel.reads) // NUMEL, elements(kernel.writes) // NUMEL)
        for kernel in composed.kernels
    ]
    product, last = ("mul", 2, 1), ("smooth_l1_loss_backward", 2, 1)
    forward = [("sub", 2, 1), product, ("smooth_l1_loss", 1, 1), product, ("mean", 1, 0)]
    assert found == [*forward, ("div", 0, 1), product, ("zero_", 0, 1), last, product]
    assert len(composed.sections["forward"]) == len(forward)
    assert (composed.total, fused.total) == (
        *("Eager PyTorch: 23 N in 10 kernels", "This library: 5 N in one kernel"),
    )
    assert (composed.memory, fused.memory) == ("3 N of new memory", "1 N of new memory")
    assert names[composed.kernels[-1].writes[0].untyped_storage().data_ptr()] == "gradient"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_are_what_a_gpu_was_given(dtype: torch.dtype) -> None:
    """But for one fill, of the counters by which the blocks of a large mean know the last one."""
    workload = build(Spec("dense", NUMEL, dtype), CPU)
    with Traffic() as found:
        autograd_step(composition, workload)()
    own = ("dense", "eager_composition", workload.spec.dtype_name)
    rows = read(RESULTS / "nvidia-h100-80gb-hbm3.json").rows
    launches = [row.launches for row in rows if (row.case, row.rival, row.dtype) == own]
    assert len(found.kernels) + 1 in launches


@support.on_kernel
@support.needs_no_gpu
def test_this_library() -> None:
    """The kernel reads four operands and writes the gradient; what backward reads is one number."""
    from tests.interpreter import events

    workload = build(Spec("dense", NUMEL), CPU)
    weights = workload.inside_weights, workload.outside_weights
    smooth_l1_loss(workload.input, workload.target, *weights, **workload.options)
    times = Counter(f"{kind} {argument}" for kind, argument in events)
    blocks = times["store gradients[0]"]
    moved = sorted(event for event, count in times.items() for _ in range(round(count / blocks)))
    assert moved == [*(f"load operands[{i}]" for i in range(4)), "store gradients[0]"]
    (kernel,) = traffic.counted()[1].kernels
    assert (len(kernel.reads), len(kernel.writes)) == (4, 1)
    assert workload.floor_bytes == 4 * kernel.moved


def test_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert traffic.main(["--out", str(tmp_path / "new")]) == 0
    assert (tmp_path / "new" / "traffic.png").stat().st_size > 10_000
    assert "23 N in 10 kernels" in capsys.readouterr().out
