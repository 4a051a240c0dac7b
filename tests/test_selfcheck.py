"""`python -m fused_smoothl1`: what it prints, and that its exit status can be trusted."""

import os
import platform
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

import fused_smoothl1
from fused_smoothl1 import dispatch
from fused_smoothl1.__main__ import CASES, ROUNDINGS, main
from fused_smoothl1.problem import NoKernelError
from tests import support
from tests.support import HAS_GPU, HAS_TRITON, ROOT, run_python

ALL = len(CASES)
right = fused_smoothl1.smooth_l1_loss


def _lines(report: str) -> dict[str, str]:
    return dict(re.findall(r"^(\w+): +(.+)$", report, re.MULTILINE))


def _selfcheck(status: int = 0, **environment: Any) -> dict[str, str]:
    """Return what it says of each thing in a process without this run's settings."""
    return _lines(run_python("-m", "fused_smoothl1", status=[status], gpu=True, **environment))


@pytest.mark.parametrize(
    ("another_triton", "told"),
    [
        (None, r"\d" if HAS_TRITON else "not installed"),
        ("raise ModuleNotFoundError('', name='triton')", "not installed"),
        ("", "broken"),
    ],
)
def test_report(another_triton: str | None, told: str, tmp_path: Path) -> None:
    """It works without Triton: another module of this name may be found first."""
    if another_triton is not None:
        (tmp_path / "triton.py").write_text(another_triton)
    found = _selfcheck(PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
    assert found["python"].startswith(platform.python_version())
    assert found["torch"] == torch.__version__
    assert found["fused_smoothl1"] == fused_smoothl1.__version__
    assert re.match(told, found["triton"])
    backend = "eager PyTorch, because this is cpu"
    if HAS_GPU:
        backend = "Triton kernel" if another_triton is None else "eager PyTorch: "
    assert found["backend"].startswith(backend)
    agreement = rf"{ALL} of {ALL} cases agree .*: largest error (.+) eps, allowed {ROUNDINGS}"
    largest = re.fullmatch(agreement, found["agreement"])
    assert largest
    assert 0.1 < float(largest[1]) <= ROUNDINGS
    assert "FAIL" not in found


@pytest.mark.skipif(not (HAS_GPU or support.HAS_INTERPRETER), reason=support.NO_INTERPRETER)
def test_backend_by_choice() -> None:
    told = _selfcheck(1, FUSED_SMOOTHL1_BACKEND="cuda")["backend"]
    assert told.startswith("none: FUSED_SMOOTHL1_BACKEND must be one of")
    choice: Any = {"FUSED_SMOOTHL1_BACKEND": "triton"}
    if not HAS_GPU:
        assert re.match("none: .*INTERPRET=1", _selfcheck(1, **choice)["backend"])
    told = _selfcheck(**choice, TRITON_INTERPRET="0" if HAS_GPU else "1")["backend"]
    assert re.fullmatch("Triton kernel, .* FUSED_SMOOTHL1_BACKEND=triton", told)


@support.needs_triton
def test_no_kernel_compiles(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    refuse = Mock(side_effect=NoKernelError("Triton cannot compile here"))
    monkeypatch.setattr("fused_smoothl1.launcher.Code.launch", refuse)
    monkeypatch.setattr(dispatch, "TRITON_DEVICES", ("cuda", "cpu"))
    with support.backend_set("auto"):
        assert main() == 0
    told = _lines(capsys.readouterr().out)["backend"]
    assert re.match("eager PyTorch: .*Triton cannot compile here", told)


def _nan_in_one_case(
    input: Tensor, target: Tensor, inside: Tensor, *rest: Any, **kw: Any
) -> Tensor:
    is_it = input.dtype == torch.float64 and inside.dtype == torch.bool
    return right(input, target, inside, *rest, **kw) * (torch.nan if is_it else 1)


# Each is wrong in one way only; and how many cases agree (eight are sums).
DEFECTS: dict[str, tuple[Callable[..., Any], str]] = {
    "sigma": (lambda *args, sigma, **kw: right(*args, sigma=1.001 * sigma, **kw), "0 of"),
    "reduction": (lambda *args, reduction, **kw: right(*args, reduction="sum", **kw), "8 of"),
    "an exception": (lambda *args, **kw: 1 / 0, "0 of"),
    "no gradient of target": (lambda a, b, *rest, **kw: right(a, b.detach(), *rest, **kw), "0 of"),
    "NaN": (_nan_in_one_case, f"{ALL - 1} of .*: largest error nan eps"),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_fails_where_the_loss_is_wrong(
    defect: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    loss, agreement = DEFECTS[defect]
    monkeypatch.setattr(fused_smoothl1, "smooth_l1_loss", loss)
    assert main() == 1
    told = _lines(capsys.readouterr().out)
    assert "FAIL" in told
    assert re.match(agreement, told["agreement"])
