"""The benchmark's rivals are right, and strong; what is wrong is found.

torch.compile is left out here: what it would compile runs as it is.
"""

from collections.abc import Callable
from dataclasses import replace
from math import nan
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bench import check, measure, rivals
from bench.rivals import FUSED, RIVALS
from bench.workloads import Spec, Workload, build, rotation, specs
from tests import oracle

# Whole hidden states for `drafter`, whole samples for `tensor_beta`, and more than a tile of any.
NUMEL = 2**17
MASKS = ("row_mask", "element_mask", "drafter")
CASES = ("dense", "kernelbench", "none", "broadcast", "no_weights", "tensor_beta", *MASKS)


def numel_of(case: str) -> int:
    return 360**2 if case == "kernelbench" else NUMEL


def _workload(case: str, device: str, dtype: torch.dtype = torch.float32) -> Workload:
    return build(Spec(case, numel_of(case), dtype), torch.device(device))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("block", [2**14, 2**30], ids=["in_blocks", "whole"])
def test_right_answer(case: str, block: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What rivals are checked against is the oracle's answer, for each dtype of operands."""
    monkeypatch.setattr(check, "BLOCK_ELEMENTS", block)
    for dtype in (torch.float32, torch.float16):
        workload = _workload(case, device, dtype)
        truth = check.expected(workload)
        answer = oracle.smooth_l1(
            workload.input,
            workload.target,
            workload.inside_weights,
            workload.outside_weights,
            **workload.options,
            upstream=workload.loss_scale if workload.upstream is None else workload.upstream,
        )
        pairs = [(truth.loss, answer.loss)]
        assert (truth.gradient is not None) == workload.backward
        if truth.gradient is not None:
            pairs.append((truth.gradient, answer.input))
        for found, wanted in pairs:
            np.testing.assert_allclose(found.cpu().numpy(), wanted, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("case", CASES)
def test_every_rival_is_right(case: str, device: str, uncompiled: None) -> None:
    dtypes = [torch.float32, torch.bfloat16, torch.float16]
    if device == "cpu" and torch.__version__ < "2.10":
        dtypes.remove(torch.float16)  # PyTorch's own loss has no backward for it there.
    for dtype in dtypes:
        workload = _workload(case, device, dtype)
        truth = check.expected(workload)
        those = [rival for rival in RIVALS if rival.is_rival_of(workload)]
        assert {"eager_composition", "compile", FUSED} <= {rival.name for rival in those}
        for rival in those:
            for copy in (workload, workload.copy()):
                assert check.problem(workload, truth, *rival.step(copy)()) is None, rival.name


def test_the_drafters_rival_is_its_own(
    device: str, uncompiled: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eager or compiled, it is what such training code writes."""

    def asked(*arguments: Any, **options: Any) -> Tensor:
        raise NotImplementedError

    monkeypatch.setattr(rivals, "composition_for_drafter", asked)
    workload = _workload("drafter", device)
    for rival in RIVALS:
        if rival.name in ("eager_composition", "compile", "compile_grad_and_value"):
            step = rival.step(workload)
            with pytest.raises(NotImplementedError):
                step()


class _Dtypes(TorchDispatchMode):
    """Collects the types of what operations are given."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found |= {value.dtype for value in args if isinstance(value, Tensor)}
        return func(*args, **(kwargs or {}))


def test_eager_rivals_multiply_by_floats(device: str, uncompiled: None) -> None:
    """A mask is converted before the clock starts; what is compiled gets it as it is."""
    workload = _workload("row_mask", device)
    for rival in RIVALS:
        if rival.name in ("eager_composition", "compile", "compile_grad_and_value"):
            step = rival.step(workload)
            with _Dtypes() as seen:
                step()
            assert (torch.bool in seen.found) == rival.compiles, rival.name


def test_flag_gems_is_a_rival_of_what_it_can_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is installed: a loss without weights, on a GPU."""
    (flag_gems,) = (rival for rival in RIVALS if rival.name == "flag_gems")

    class Cuda:
        is_cuda = True

    def is_rival(case: str, installed: bool, on_gpu: bool = True) -> bool:
        workload = _workload(case, "cpu")
        if on_gpu:
            workload = replace(workload, input=Cuda())  # type: ignore[arg-type]
        monkeypatch.setattr(rivals, "find_spec", lambda name: object() if installed else None)
        return flag_gems.is_rival_of(workload)

    for case in CASES:
        assert is_rival(case, installed=True) == (case in ("no_weights", "none", "kernelbench"))
    assert not is_rival("no_weights", installed=False)
    assert not is_rival("no_weights", installed=True, on_gpu=False)


@pytest.mark.parametrize("case", ["no_weights", "none", "kernelbench"])
def test_flag_gems_is_differentiated(
    case: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its operators are called as PyTorch's own would be, which stand in for them here."""
    backward = torch.ops.aten.smooth_l1_loss_backward.default
    operators = (torch.nn.functional.smooth_l1_loss, backward)
    monkeypatch.setattr(rivals, "_flag_gems_operators", lambda: operators)
    (flag_gems,) = (rival for rival in RIVALS if rival.name == "flag_gems")
    workload = _workload(case, device)
    answer = flag_gems.step(workload)()
    assert check.problem(workload, check.expected(workload), *answer) is None


DEFECTS: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]]] = {
    "loss": lambda loss, gradient: (loss * (1 + 1e-4), gradient),
    "NaN loss": lambda loss, gradient: (loss * nan, gradient),
    "shape of the loss": lambda loss, gradient: (loss[None], gradient),
    "one row": lambda loss, gradient: (loss, gradient.index_fill(0, _first(gradient), 7.0)),
    "roundings": lambda loss, gradient: (loss, gradient * (1 + 1e-5)),
    "one NaN": lambda loss, gradient: (loss, gradient.index_fill(0, _first(gradient), nan)),
    "no gradient": lambda loss, gradient: (loss, None),
    "shape of the gradient": lambda loss, gradient: (loss, gradient[None]),
    "dtype": lambda loss, gradient: (loss, gradient.double()),
}


def _first(tensor: Tensor) -> Tensor:
    return torch.zeros(1, dtype=torch.int64, device=tensor.device)


@pytest.mark.parametrize("case", ["dense", "none"])
@pytest.mark.parametrize("defect", DEFECTS)
def test_what_is_wrong_is_found(defect: str, case: str, device: str) -> None:
    workload = _workload(case, device)
    truth = check.expected(workload)
    loss, gradient = RIVALS[-1].step(workload)()
    assert gradient is not None
    assert check.problem(workload, truth, loss, gradient) is None
    assert check.problem(workload, truth, *DEFECTS[defect](loss, gradient)) is not None


@pytest.mark.parametrize("case", CASES)
def test_copies_lie_in_other_memory(case: str) -> None:
    """Together they are as large as asked for: what a step reads, no cache holds any more."""
    workload = _workload(case, "cpu")
    wanted = 5 * workload.needed_bytes
    copies = rotation(workload, cache_bytes=wanted // 2, most=10)
    assert len(copies) == 5
    assert len(rotation(workload, cache_bytes=wanted, most=3)) == 3
    fields = ("input", "target", "inside_weights", "outside_weights", "beta", "upstream")
    for field in fields:
        tensors = [getattr(copy, field) for copy in copies if getattr(copy, field) is not None]
        assert len({tensor.data_ptr() for tensor in tensors}) == len(tensors)
        assert all(torch.equal(tensor, tensors[0]) for tensor in tensors)


@pytest.mark.parametrize(
    ("case", "reads_and_writes"),
    [("dense", 5), ("no_weights", 3), ("kernelbench", 2), ("none", 7)],
)
def test_floor_of_dense_operands(case: str, reads_and_writes: int) -> None:
    assert _workload(case, "cpu").floor_bytes == reads_and_writes * numel_of(case) * 4


@pytest.mark.parametrize("case", MASKS)
def test_floor_under_a_mask(case: str) -> None:
    """What a mask leaves out of input and target is not loaded; the gradient is whole."""
    workload = _workload(case, "cpu")
    mask = workload.outside_weights if case == "drafter" else workload.inside_weights
    assert mask is not None
    assert workload.normalizer is not None
    selected = int(mask.expand_as(workload.input).sum())
    small = mask.numel() + workload.normalizer.element_size()
    assert workload.floor_bytes == (2 * selected + NUMEL) * 4 + small


def test_the_most_telling_comes_first() -> None:
    """On a GPU a run may be stopped at any time."""
    listed = specs(torch.device("cuda"), quick=False)
    assert len(set(listed)) == len(listed)
    first = [str(spec) for spec in listed[:9]]
    assert first == [
        "dense 67,108,864 float32",
        "dense 67,108,864 bfloat16",
        "kernelbench 1,073,741,824 float32",
        "drafter 67,108,864 bfloat16",
        "row_mask 67,108,864 float32",
        "rpn 86,184 float32",
        "dense 10,752 float32",
        "rpn_graph 86,184 float32",
        "dense_graph 10,752 float32",
    ]


def test_every_case_of_the_cpu_has_every_size() -> None:
    """The goals name each of them (bench/RESULTS.md)."""
    listed = specs(torch.device("cpu"), quick=False)
    assert len(set(listed)) == len(listed)
    for case in ("dense", "broadcast", "row_mask", "element_mask", "no_weights", "none"):
        sizes = [spec.numel for spec in listed if spec.case == case]
        assert sizes == [10_752, 86_184, 2**20, 2**22, 2**24]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="waits for a CUDA GPU")
def test_replay_of_a_graph() -> None:
    """A replay computes anew from what the operands hold then, into the same tensors."""
    device = torch.device("cuda")
    workload = _workload("dense", "cuda")
    steps = [RIVALS[-1].step(each) for each in (workload, workload.copy())]
    replay = measure.replayed(steps, device)
    del steps  # What they hold is read all the same, so that nobody else may get its memory.
    others = []
    for scale in (1.0, 0.5):
        with torch.no_grad():
            workload.input.mul_(scale)
        others += [torch.full((), nan, device=device) for _ in range(100)]
        assert check.problem(workload, check.expected(workload), *replay()) is None
