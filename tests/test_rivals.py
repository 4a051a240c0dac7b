"""The benchmark's rivals are right, and strong; what is wrong is found.

torch.compile is left out here: what it would compile runs as it is.
"""

from collections.abc import Callable
from dataclasses import replace
from math import nan
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bench import check, measure, rivals
from bench.rivals import FUSED, RIVALS
from bench.traffic import Traffic
from bench.workloads import Spec, build, rotation, specs
from tests import oracle, support
from tests.support import DEVICE, FLOATS, HAS_GPU, as_float64

# Whole hidden states for `drafter`, whole samples for `tensor_beta`, and more than a tile of any.
NUMEL = 2**17
MASKS = ("row_mask", "element_mask", "drafter")
OF_FLAG_GEMS = ("no_weights", "none", "kernelbench")
CASES = ("dense", "broadcast", "tensor_beta", *OF_FLAG_GEMS, *MASKS)
RIVAL = {rival.name: rival for rival in RIVALS}
# Before 2.10 PyTorch's own loss has no backward for float16 on a CPU.
DTYPES = FLOATS[1:] if HAS_GPU or torch.__version__ >= "2.10" else (torch.float32, torch.bfloat16)


def numel_of(case: str) -> int:
    return 360**2 if case == "kernelbench" else NUMEL


def _workload(case: str, dtype: torch.dtype = torch.float32) -> Any:
    return build(Spec(case, numel_of(case), dtype), torch.device(DEVICE))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_every_rival_is_right(
    case: str, dtype: torch.dtype, uncompiled: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So is what they are checked against, made in blocks or at once: it is the oracle's answer."""
    own = _workload(case, dtype)
    upstream = own.loss_scale if own.upstream is None else own.upstream
    answer = oracle.smooth_l1(own.input, *own.operands, **own.options, upstream=upstream)
    for block in (2**14, 2**30):
        monkeypatch.setattr(check, "BLOCK_ELEMENTS", block)
        truth = check.expected(own)
        np.testing.assert_allclose(as_float64(truth.loss), answer.loss, rtol=1e-12, atol=1e-15)
        assert (truth.gradient is not None) == own.backward
        if truth.gradient is not None:
            gradient = as_float64(truth.gradient)
            np.testing.assert_allclose(gradient, answer.input, rtol=1e-12, atol=1e-15)
    those = [rival for rival in RIVALS if rival.is_rival_of(own)]
    assert {"eager_composition", "compile", FUSED} <= {rival.name for rival in those}
    for rival in those:
        for copy in (own, own.copy()):
            assert check.problem(own, truth, *rival.step(copy)()) is None, rival.name


@pytest.mark.parametrize("name", ["eager_composition", "compile", "compile_grad_and_value"])
def test_compositions(name: str, uncompiled: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mask is a float before the clock starts, but where it is compiled; drafters have theirs."""
    step = RIVAL[name].step(_workload("row_mask"))
    with Traffic() as found:
        step()
    read = {tensor.dtype for kernel in found.kernels for tensor in kernel.reads}
    assert (torch.bool in read) == RIVAL[name].compiles
    monkeypatch.setattr(rivals, "composition_for_drafter", lambda input, *_, **__: 7 * input.sum())
    _, gradient = RIVAL[name].step(_workload("drafter"))()
    assert gradient is not None
    assert gradient.eq(7).all()


def test_flag_gems_is_a_rival_of_what_it_can_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is installed, on a GPU: its operators are called as PyTorch's would be.

    These stand in for them here.
    """
    backward = torch.ops.aten.smooth_l1_loss_backward.default
    operators = (torch.nn.functional.smooth_l1_loss, backward)
    monkeypatch.setattr(rivals, "_flag_gems_operators", lambda: operators)
    for case in CASES:
        workload, rival = _workload(case), RIVAL["flag_gems"]
        for installed, is_cuda in ((True, True), (True, False), (False, True)):
            there: Any = replace(workload, input=SimpleNamespace(is_cuda=is_cuda))
            monkeypatch.setattr(rivals, "find_spec", lambda _, found=installed: found or None)
            is_rival = installed and is_cuda and case in OF_FLAG_GEMS
            assert rival.is_rival_of(there) == is_rival
        if case in OF_FLAG_GEMS:
            truth = check.expected(workload)
            assert check.problem(workload, truth, *rival.step(workload)()) is None


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
    workload = _workload(case)
    answer: Any = RIVAL[FUSED].step(workload)()
    for found, is_wrong in ((answer, False), (DEFECTS[defect](*answer), True)):
        assert bool(check.problem(workload, check.expected(workload), *found)) == is_wrong


@pytest.mark.parametrize("case", CASES)
def test_copies_lie_in_other_memory(case: str) -> None:
    """Together they are as large as asked for: what a step reads, no cache holds any more."""
    workload = _workload(case)
    wanted = 5 * workload.needed_bytes
    assert len(rotation(workload, cache_bytes=wanted, most=3)) == 3
    copies = rotation(workload, cache_bytes=wanted // 2, most=10)
    for own in zip(*(copy._tensors().values() for copy in copies), strict=True):
        assert len({tensor.data_ptr() for tensor in own}) == 5
        assert all(torch.equal(tensor, own[0]) for tensor in own)


def test_floor() -> None:
    """A loss of every element needs input and target twice; what a mask excludes is not read."""
    for case, numbers in {"dense": 5, "no_weights": 3, "kernelbench": 2, "none": 7}.items():
        assert _workload(case).floor_bytes == 4 * numbers * numel_of(case)
    for case in MASKS:
        own = _workload(case)
        mask = own.outside_weights if case == "drafter" else own.inside_weights
        selected = int(mask.expand_as(own.input).sum())
        small = mask.numel() + own.normalizer.element_size()
        assert own.floor_bytes == 4 * (2 * selected + NUMEL) + small


def test_workloads() -> None:
    """On a GPU the most telling comes first; on a CPU most have every size that the goals name."""
    on_gpu, on_cpu = (specs(torch.device(kind), quick=False) for kind in ("cuda", "cpu"))
    assert (len({*on_gpu}), len({*on_cpu})) == (len(on_gpu), len(on_cpu))
    first = "dense dense kernelbench drafter row_mask rpn dense rpn_graph dense_graph"
    assert " ".join(spec.name for spec in on_gpu[:9]) == first
    for case in ("dense", "broadcast", "row_mask", "element_mask", "no_weights", "none"):
        sizes = [spec.numel for spec in on_cpu if spec.case == case]
        assert sizes == [10_752, 86_184, 2**20, 2**22, 2**24]


@support.needs_gpu
def test_replay_of_a_graph() -> None:
    """A replay computes anew from what the operands hold then, into the same tensors."""
    workload = _workload("dense")
    steps = [RIVAL[FUSED].step(each) for each in (workload, workload.copy())]
    replay = measure.replayed(steps, torch.device(DEVICE))
    del steps  # What they hold is read all the same, so that nobody else may get its memory.
    others = []
    for scale in (1.0, 0.5):
        workload.input.data.mul_(scale)
        others += [torch.full((), nan, device=DEVICE) for _ in range(100)]
        assert check.problem(workload, check.expected(workload), *replay()) is None
