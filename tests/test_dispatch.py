"""Which backend computes, and that the package needs no Triton to be imported or to work.

What depends on the state of a fresh interpreter (what is imported, what can be) runs in one.
"""

import importlib.resources
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fused_smoothl1
from fused_smoothl1 import smooth_l1_loss
from tests.conftest import HAS_INTERPRETER, HAS_TRITON, NO_INTERPRETER
from tests.support import backend_set, gaussian

ROOT = Path(__file__).parent.parent
NO_TRITON = "import sys; sys.modules['triton'] = None\n"
USE = """
import torch
from fused_smoothl1 import smooth_l1_loss
a = torch.randn(6, 4, requires_grad=True)
loss = smooth_l1_loss(a, torch.zeros(6, 4), sigma=3.0)
loss.backward()
assert a.grad is not None and a.grad.count_nonzero() == 24
"""
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="waits for a machine with Triton")


def _python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter that sees no GPU and none of this run's settings."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("TRITON_", "FUSED_"))}
    kept |= {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": "", **environment}
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=kept,
        capture_output=True,
        text=True,
        check=False,
    )


def _succeeds(code: str, **environment: str) -> None:
    result = _python(code, **environment)
    assert result.returncode == 0, result.stderr


def _both(device: str) -> tuple[torch.Tensor, torch.Tensor]:
    return gaussian(6, 4, seed=1, device=device), gaussian(6, 4, seed=2, device=device)


def test_public_face() -> None:
    assert set(fused_smoothl1.__all__) >= {"smooth_l1_loss", "SmoothL1Loss"}
    assert fused_smoothl1.__version__[0].isdigit()
    assert importlib.resources.files("fused_smoothl1").joinpath("py.typed").is_file()
    for name in fused_smoothl1.__all__:
        assert getattr(fused_smoothl1, name) is not None


def test_docstring_states_the_decisions() -> None:
    """Whoever reads help() finds each decision of the contract."""
    text = smooth_l1_loss.__doc__ or ""
    words = ["sigma", "beta", "batchmean", "normalizer", "mask", "bool", "uint8", "NaN", "empty"]
    words += ["float16", "float32", "ValueError", "TypeError", "FUSED_SMOOTHL1_BACKEND"]
    for word in words:
        assert word in text, f"the docstring does not speak of {word}"
    assert fused_smoothl1.SmoothL1Loss.__doc__


def test_import_has_no_side_effects() -> None:
    """And can be repeated, which a notebook may do; the operators are defined anew then."""
    _succeeds(
        """
import os, sys, torch
before, modules, threads = dict(os.environ), set(sys.modules), torch.get_num_threads()
had_triton = "triton" in sys.modules
import fused_smoothl1
assert had_triton or "triton" not in sys.modules
new = {m.split(".")[0] for m in set(sys.modules) - modules}
assert not new & {"numpy", "triton", "hypothesis", "sklearn"}, new
assert dict(os.environ) == before
assert torch.get_num_threads() == threads
assert torch.get_default_dtype() == torch.float32
for module in [m for m in sys.modules if m.startswith("fused_smoothl1")]:
    del sys.modules[module]
import fused_smoothl1
for name in ("forward", "backward"):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fused_smoothl1::{name}", "Autograd")
"""
    )


def test_use_on_the_cpu_does_not_import_triton() -> None:
    _succeeds(
        "import sys, torch; had = 'triton' in sys.modules\n"
        + USE
        + "assert had or 'triton' not in sys.modules"
    )


def test_rules_of_dtensor_are_registered_where_it_is_in_use() -> None:
    """To import it takes a second, which nobody else should wait for."""
    _succeeds(
        """
import sys, torch
from fused_smoothl1 import functional
functional.is_eager = lambda device: device.type == "cpu"
functional._load_sharding(torch.device("cuda"))
assert not {"torch.distributed.tensor", "fused_smoothl1.sharding"} & set(sys.modules)
import torch.distributed.tensor
functional._load_sharding(torch.device("cpu"))
assert "fused_smoothl1.sharding" not in sys.modules
functional._load_sharding(torch.device("cuda"))
assert "fused_smoothl1.sharding" in sys.modules
"""
    )


@pytest.mark.parametrize("choice", ["auto", "eager"])
def test_works_where_triton_cannot_be_imported(choice: str) -> None:
    _succeeds(NO_TRITON + USE, FUSED_SMOOTHL1_BACKEND=choice)


def test_triton_without_triton_says_so() -> None:
    result = _python(NO_TRITON + USE, FUSED_SMOOTHL1_BACKEND="triton")
    assert result.returncode != 0
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("RuntimeError")
    assert "FUSED_SMOOTHL1_BACKEND" in last
    assert "install" in last


@needs_triton
def test_triton_on_the_cpu_without_the_interpreter_says_how() -> None:
    result = _python(USE, FUSED_SMOOTHL1_BACKEND="triton")
    assert result.returncode != 0
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("RuntimeError")
    assert "TRITON_INTERPRET=1" in last
    assert "cpu" in last


@pytest.mark.skipif(not HAS_INTERPRETER, reason=NO_INTERPRETER)
def test_triton_on_the_cpu_with_the_interpreter() -> None:
    _succeeds(USE, FUSED_SMOOTHL1_BACKEND="triton", TRITON_INTERPRET="1")


@needs_triton
def test_auto_on_the_cpu_under_the_interpreter_is_eager() -> None:
    """TRITON_INTERPRET is somebody's debugging of another kernel; ours stays fast."""
    code = "import sys\n" + USE + "assert 'fused_smoothl1.kernel' not in sys.modules"
    _succeeds(code, TRITON_INTERPRET="1")


@pytest.mark.parametrize("value", ["Triton", "cuda", "", "1", "eager "])
@pytest.mark.parametrize("size", [0, 4])
def test_unknown_backend(size: int, value: str, device: str) -> None:
    input = torch.zeros(size, device=device)
    with backend_set(value):
        for _ in range(2):
            with pytest.raises(ValueError, match="FUSED_SMOOTHL1_BACKEND") as caught:
                smooth_l1_loss(input, input)
            for word in ("auto", "eager", "triton", repr(value)):
                assert word in str(caught.value)


def test_environment_is_read_at_the_first_call(
    device: str, launches: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which takes it off the path of every other call: a look-up costs more than a check."""
    input, target = _both(device)
    for choice, expected in (("triton", 1), ("eager", 2), ("auto", 3)):
        monkeypatch.setenv("FUSED_SMOOTHL1_BACKEND", choice)
        smooth_l1_loss(input, target)
        assert len(launches) == expected


@pytest.mark.parametrize("choice", ["auto", None])
def test_auto_follows_the_device(choice: str | None, device: str, launches: list[str]) -> None:
    with backend_set(choice):
        smooth_l1_loss(*_both(device))
        assert len(launches) == (1 if device == "cuda" else 0)
        launches.clear()
        smooth_l1_loss(*_both("cpu"))
        assert launches == []


def test_backward_takes_the_backend_of_its_forward(device: str, launches: list[str]) -> None:
    input, target = _both(device)
    loss = smooth_l1_loss(input.requires_grad_(), target, reduction="none")
    with backend_set("eager"):
        loss.backward(torch.ones_like(loss))
    assert len(launches) == 2
