"""`python -m fused_smoothl1`: what it prints, and that its exit status can be trusted."""

import platform
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

import fused_smoothl1
from fused_smoothl1 import dispatch
from fused_smoothl1.__main__ import CASES, ROUNDINGS, main
from fused_smoothl1.problem import NoKernelError
from tests.support import (
    HAS_GPU,
    HAS_INTERPRETER,
    HAS_TRITON,
    NO_INTERPRETER,
    backend_set,
    needs_no_gpu,
    needs_triton,
    run_python,
)

IMPORTS = "import sys; from importlib.machinery import ModuleSpec; import importlib.util as util; "
RUN = "from fused_smoothl1.__main__ import main; sys.exit(main())"
right = fused_smoothl1.smooth_l1_loss
# Each makes the loss wrong in a way of its own, and the rest of it stays right.
DEFECTS: dict[str, Callable[..., Any]] = {
    "another sigma": lambda *args, sigma, **kw: right(*args, sigma=1.01 * sigma, **kw),
    "another reduction": lambda *args, reduction, **kw: right(*args, reduction="sum", **kw),
    "NaN": lambda *args, **kw: right(*args, **kw) * float("nan"),
    "an exception": lambda *args, **kw: 1 / 0,
    "weights swapped": lambda a, b, c, d, **kw: right(a, b, d, c, **kw),
    "no gradient of target": lambda a, b, *rest, **kw: right(a, b.detach(), *rest, **kw),
}


def _line(output: str, what: str) -> str:
    found = re.search(rf"^{what}: +(.+)$", output, re.MULTILINE)
    assert found, f"no line {what!r} in:\n{output}"
    return found[1]


def _selfcheck(*arguments: str, fails: bool = False, **environment: str) -> str:
    """Return what it prints, or a few lines around it, in a process without this run's settings."""
    done = run_python(*(arguments or ("-m", "fused_smoothl1")), gpu=True, **environment)
    assert done.returncode == fails, done.stdout + done.stderr
    return done.stdout


def test_report() -> None:
    report = _selfcheck()
    assert "FAIL" not in report
    assert _line(report, "python").startswith(platform.python_version())
    assert _line(report, "torch") == torch.__version__
    assert _line(report, "fused_smoothl1") == fused_smoothl1.__version__
    assert (_line(report, "triton") == "not installed") != HAS_TRITON
    agreement = (
        rf"{len(CASES)} of {len(CASES)} cases agree .*: largest error (.+) eps, allowed (.+)"
    )
    found = re.fullmatch(agreement, _line(report, "agreement"))
    assert found
    assert 0.1 < float(found[1]) <= float(found[2]) == ROUNDINGS
    backend = "Triton kernel" if HAS_GPU else "eager PyTorch, because this is cpu"
    assert _line(report, "backend").startswith(backend)


@pytest.mark.parametrize(
    ("module", "told"),
    # (PyTorch looks for the specification on a GPU.)
    [
        ("None", "not installed"),
        ("util.module_from_spec(ModuleSpec('triton', None))", "broken"),
    ],
)
def test_works_without_triton(module: str, told: str) -> None:
    report = _selfcheck("-c", f"{IMPORTS} sys.modules['triton'] = {module}; {RUN}")
    assert _line(report, "triton").startswith(told)
    assert _line(report, "backend").startswith("eager PyTorch")


@needs_triton
def test_tells_that_no_kernel_compiles(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def launch(*_: Any) -> None:
        raise NoKernelError("Triton cannot compile here")

    monkeypatch.setattr("fused_smoothl1.launcher.Code.launch", launch)
    monkeypatch.setattr(dispatch, "TRITON_DEVICES", ("cuda", "cpu"))
    with backend_set("auto"):
        assert main() == 0
    told = _line(capsys.readouterr().out, "backend")
    assert re.match("eager PyTorch: .*Triton cannot compile here", told)


@pytest.mark.skipif(not (HAS_INTERPRETER or (HAS_TRITON and HAS_GPU)), reason=NO_INTERPRETER)
def test_checks_the_kernel() -> None:
    chosen = {"FUSED_SMOOTHL1_BACKEND": "triton", "TRITON_INTERPRET": "01"[not HAS_GPU]}
    told = _line(_selfcheck(**chosen), "backend")
    assert told == "Triton kernel, because FUSED_SMOOTHL1_BACKEND=triton"


@pytest.mark.parametrize(
    ("choice", "told"),
    [
        ("cuda", "FUSED_SMOOTHL1_BACKEND must be one of"),
        pytest.param("triton", "TRITON_INTERPRET=1", marks=[needs_triton, needs_no_gpu]),
    ],
)
def test_fails_where_there_is_no_backend(choice: str, told: str) -> None:
    report = _selfcheck(fails=True, FUSED_SMOOTHL1_BACKEND=choice)
    assert told in _line(report, "backend")


@pytest.mark.parametrize(("factor", "said"), [(1 + 2**-11, "4.1e+03"), (torch.nan, "nan")])
def test_tells_the_largest_error(
    factor: float, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of all cases, in eps, however the others do: here one of them is off by 4096."""

    def wrong_once(*args: Any, reduction: Any, **kw: Any) -> Any:
        loss = right(*args, reduction=reduction, **kw)
        is_it = reduction == "batchmean" and args[2].dtype == torch.bool
        return loss * factor if is_it else loss

    monkeypatch.setattr(fused_smoothl1, "smooth_l1_loss", wrong_once)
    assert main() == 1
    agreement = _line(capsys.readouterr().out, "agreement")
    assert agreement.startswith(f"{len(CASES) - 1} of {len(CASES)} cases agree")
    assert agreement.endswith(f": largest error {said} eps, allowed {ROUNDINGS}")


@pytest.mark.parametrize("defect", DEFECTS)
def test_fails_where_the_loss_is_wrong(
    defect: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fused_smoothl1, "smooth_l1_loss", DEFECTS[defect])
    assert main() == 1
    report = capsys.readouterr().out
    assert "FAIL" in report
    assert "agreement" in report, "the report broke off"
