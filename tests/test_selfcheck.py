"""`python -m fused_smoothl1`: what it prints, and that its exit status can be trusted."""

import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fused_smoothl1
from fused_smoothl1 import dispatch
from fused_smoothl1.__main__ import CASES, ROUNDINGS, main
from fused_smoothl1.problem import NoKernelError
from tests.conftest import HAS_INTERPRETER, HAS_TRITON, NO_INTERPRETER
from tests.support import backend_set

ROOT = Path(__file__).parent.parent
IMPORTS = (
    "import sys; from importlib.machinery import ModuleSpec;"
    "from importlib.util import module_from_spec"
)
SPEC = "ModuleSpec('triton', None)"  # PyTorch looks for it on a GPU.
RUN = "import sys; from fused_smoothl1.__main__ import main; sys.exit(main())"
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


def _selfcheck(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run it, or a few lines around it, in a fresh interpreter without this run's settings."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("TRITON_", "FUSED_"))}
    return subprocess.run(
        [sys.executable, *(arguments or ("-m", "fused_smoothl1"))],
        cwd=ROOT,
        env=kept | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def _line(output: str, what: str) -> str:
    found = re.search(rf"^{what}: +(.+)$", output, re.MULTILINE)
    assert found, f"no line {what!r} in:\n{output}"
    return found[1]


def test_report() -> None:
    result = _selfcheck()
    assert result.returncode == 0, result.stdout + result.stderr
    assert _line(result.stdout, "python").startswith(platform.python_version())
    assert _line(result.stdout, "torch") == torch.__version__
    assert _line(result.stdout, "fused_smoothl1") == fused_smoothl1.__version__
    assert (_line(result.stdout, "triton") == "not installed") != HAS_TRITON
    agreement = _line(result.stdout, "agreement")
    assert agreement.startswith(f"{len(CASES)} of {len(CASES)} cases agree")
    found = re.search(rf": largest error ([\d.]+) eps, allowed {ROUNDINGS}$", agreement)
    assert found, agreement
    assert 0.1 < float(found[1]) <= ROUNDINGS
    assert "FAIL" not in result.stdout
    if not torch.cuda.is_available():
        assert _line(result.stdout, "backend").startswith("eager PyTorch, because this is cpu")


@pytest.mark.parametrize(
    ("module", "told"), [("None", "not installed"), (f"module_from_spec({SPEC})", "broken")]
)
def test_works_without_triton(module: str, told: str) -> None:
    result = _selfcheck("-c", f"{IMPORTS}; sys.modules['triton'] = {module}; {RUN}")
    assert result.returncode == 0, result.stdout + result.stderr
    assert _line(result.stdout, "triton").startswith(told)
    assert _line(result.stdout, "backend").startswith("eager PyTorch")


@pytest.mark.skipif(not HAS_TRITON, reason="waits for a machine with Triton")
def test_tells_that_no_kernel_compiles(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], device: str
) -> None:
    from fused_smoothl1 import launcher

    def launch(*_: Any) -> None:
        raise NoKernelError("Triton cannot compile here")

    monkeypatch.setattr(launcher.Code, "launch", launch)
    monkeypatch.setattr(dispatch, "TRITON_DEVICES", ("cuda", "cpu"))
    with backend_set("auto"):
        assert main() == 0
    line = _line(capsys.readouterr().out, "backend")
    assert line.startswith("eager PyTorch: ")
    assert "Triton cannot compile here" in line


@pytest.mark.skipif(
    not (HAS_INTERPRETER or (HAS_TRITON and torch.cuda.is_available())), reason=NO_INTERPRETER
)
def test_checks_the_kernel() -> None:
    interpreted = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    result = _selfcheck(FUSED_SMOOTHL1_BACKEND="triton", **interpreted)
    assert result.returncode == 0, result.stdout + result.stderr
    backend = _line(result.stdout, "backend")
    assert backend == "Triton kernel, because FUSED_SMOOTHL1_BACKEND=triton"


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


def test_fails_where_there_is_no_backend() -> None:
    result = _selfcheck(FUSED_SMOOTHL1_BACKEND="cuda")
    assert result.returncode == 1
    assert "FUSED_SMOOTHL1_BACKEND" in _line(result.stdout, "backend")
