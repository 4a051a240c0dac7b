"""The benchmark's rivals are right and strong; what is wrong is found; and bytes are counted.

torch.compile is left out here: what it would compile runs as it is.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from math import nan
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bench import check, rivals, traffic
from bench.report import RESULTS, read
from bench.rivals import FUSED, RIVALS, autograd_step, composition
from bench.traffic import Traffic, elements
from bench.workloads import Spec, build, rotation
from fused_smoothl1 import smooth_l1_loss
from tests import oracle, support
from tests.support import DEVICE, FLOATS, HAS_GPU

NUMEL = 2**17  # whole hidden states for `drafter`, and more than a tile of any type
UNWEIGHTED = ("no_weights", "none", "kernelbench")
MASKED = ("row_mask", "element_mask", "drafter")
CASES = ("dense", "broadcast", "tensor_beta", *UNWEIGHTED, *MASKED)
RIVAL = {rival.name: rival for rival in RIVALS}
# Before 2.10 PyTorch's own loss has no backward for float16 on a CPU.
DTYPES = FLOATS[1:] if HAS_GPU or torch.__version__ >= "2.10" else (torch.float32, torch.bfloat16)


def workload(case: str, dtype: torch.dtype = torch.float32, device: str = DEVICE) -> Any:
    return build(Spec(case, NUMEL, dtype), torch.device(device))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_every_rival_is_right(
    case: str, dtype: torch.dtype, uncompiled: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So is what they are checked against, made in blocks or at once: it is the oracle's answer.

    They are on the copies too, which lie in other memory: so no cache holds what a step reads.
    """
    own = workload(case, dtype)
    upstream = own.loss_scale if own.upstream is None else own.upstream
    answer = oracle.smooth_l1(own.input, *own.operands, **own.options, upstream=upstream)
    for block in (2**14, 2**30):
        monkeypatch.setattr(check, "BLOCK_ELEMENTS", block)
        truth = check.expected(own)
        for found, right in zip(truth, (answer.loss, answer.input), strict=True):
            if found is not None:
                np.testing.assert_allclose(oracle.as_float64(found), right, rtol=1e-12, atol=1e-15)
    assert (truth.gradient is not None) == own.backward
    copies = rotation(own, cache_bytes=own.needed_bytes, most=9)  # twice the cache in all
    addresses = {tensor.data_ptr() for copy in copies for tensor in copy._tensors().values()}
    assert len(addresses) == 2 * len(own._tensors())
    those = [rival for rival in RIVALS if rival.is_rival_of(own)]
    assert {"eager_composition", "compile", FUSED} <= {rival.name for rival in those}
    for rival in those:
        for copy in copies:
            assert check.problem(own, truth, *rival.step(copy)()) is None, rival.name


@pytest.mark.parametrize("name", ["eager_composition", "compile", "compile_grad_and_value"])
def test_compositions(name: str, uncompiled: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mask is cast before the timing unless compiled; `drafter` has a composition of its own."""
    step = RIVAL[name].step(workload("row_mask"))
    with Traffic() as found:
        step()
    read = {tensor.dtype for kernel in found.kernels for tensor in kernel.reads}
    assert (torch.bool in read) == RIVAL[name].compiles
    monkeypatch.setattr(rivals, "composition_for_drafter", lambda input, *_, **__: 7 * input.sum())
    _, gradient = RIVAL[name].step(workload("drafter"))()
    assert gradient is not None
    assert gradient.eq(7).all()


def test_flag_gems(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is installed, on a GPU, it is a rival without weights; here PyTorch stands in."""
    forward, backward = torch.nn.functional.smooth_l1_loss, torch.ops.aten.smooth_l1_loss_backward
    monkeypatch.setattr(rivals, "_flag_gems_operators", lambda: (forward, backward.default))
    monkeypatch.setattr(rivals, "find_spec", lambda name: name == "flag_gems")
    flag_gems = RIVAL["flag_gems"]
    for case in CASES:
        own = workload(case)
        on_gpu: Any = replace(own, input=SimpleNamespace(is_cuda=True))
        assert flag_gems.is_rival_of(on_gpu) == (case in UNWEIGHTED)
        if case in UNWEIGHTED:
            assert check.problem(own, check.expected(own), *flag_gems.step(own)()) is None


DEFECTS: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]]] = {
    "loss": lambda loss, gradient: (loss * (1 + 1e-4), gradient),
    "NaN loss": lambda loss, gradient: (loss * nan, gradient),
    "shape of the loss": lambda loss, gradient: (loss[None], gradient),
    "one row": lambda loss, gradient: (loss, torch.cat([gradient[:1] + 7, gradient[1:]])),
    "roundings": lambda loss, gradient: (loss, gradient * (1 + 1e-5)),
    "one NaN": lambda loss, gradient: (loss, torch.cat([gradient[:1] * nan, gradient[1:]])),
    "no gradient": lambda loss, gradient: (loss, None),
    "shape of the gradient": lambda loss, gradient: (loss, gradient[None]),
    "dtype": lambda loss, gradient: (loss, gradient.double()),
}


@pytest.mark.parametrize("case", ["dense", "none"])
@pytest.mark.parametrize("defect", DEFECTS)
def test_what_is_wrong_is_found(defect: str, case: str) -> None:
    own = workload(case)
    answer: Any = RIVAL[FUSED].step(own)()
    assert check.problem(own, check.expected(own), *DEFECTS[defect](*answer))


def test_floor() -> None:
    """A loss of every element needs input and target twice; what a mask excludes is not read."""
    for case, numbers in {"dense": 5, "no_weights": 3, "kernelbench": 2, "none": 7}.items():
        own = workload(case)
        assert own.floor_bytes == 4 * numbers * own.input.numel()
    for case in MASKED:
        own = workload(case)
        mask = own.outside_weights if case == "drafter" else own.inside_weights
        selected = int(mask.expand_as(own.input).sum())
        small = mask.numel() + own.normalizer.element_size()
        assert own.floor_bytes == 4 * (2 * selected + NUMEL) + small


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
}


@pytest.mark.parametrize("case", BY_HAND)
def test_what_an_operator_moves(case: str) -> None:
    action, expected = BY_HAND[case]
    operands = torch.ones(N // 4, 4), torch.ones(N // 4, 4), torch.ones(4)
    with Traffic() as found:
        action(*operands)
    assert [(elements(k.reads), elements(k.writes)) for k in found.kernels] == expected


def test_picture_of_the_traffic(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It has the README's figures, whose kernels are those that a GPU was given.

    (But for one fill, of the counters by which the blocks of a large mean know the last one.)
    """
    assert traffic.main(["--out", str(tmp_path / "new")]) == 0
    assert (tmp_path / "new" / "traffic.png").stat().st_size > 10_000
    told = capsys.readouterr().out
    assert "Eager PyTorch: 23 N in 10 kernels, 3 N of new memory" in told
    assert "This library: 5 N in one kernel, 1 N of new memory" in told
    step = autograd_step(composition, workload("dense", device="cpu"))
    with Traffic() as found:
        step()
    rows = read(RESULTS / "nvidia-h100-80gb-hbm3.json").rows
    own = [row for row in rows if (row.case, row.rival) == ("dense", "eager_composition")]
    assert len(found.kernels) + 1 in {row.launches for row in own if row.dtype == "float32"}


@support.on_kernel
@support.needs_no_gpu
def test_this_library_reads_each_operand_once() -> None:
    """It writes the gradient, and that is all that moves; backward reads one number."""
    from tests.interpreter import events

    own = workload("dense")
    smooth_l1_loss(own.input, *own.operands, **own.options)
    times = Counter(f"{kind} {argument}" for kind, argument in events)
    blocks = times["store gradients[0]"]
    moved = sorted(event for event, count in times.items() for _ in range(round(count / blocks)))
    assert moved == [*(f"load operands[{i}]" for i in range(4)), "store gradients[0]"]
