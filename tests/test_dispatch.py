"""Which backend computes on which device; and that the package works without Triton.

A device object needs no device: what the dispatch asks about one is replaced. What depends on the
state of a fresh interpreter (what is imported, what can be) runs in one.
"""

import sys
import warnings
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import fused_smoothl1
from fused_smoothl1 import SmoothL1Loss, dispatch, eager, smooth_l1_loss
from tests import support
from tests.support import HAS_GPU, HAS_TRITON, Loss, backend_set, boxes

WITHOUT_KERNEL = "cpu", "meta", "mps", "hpu", "xla", "mtia", "privateuseone", "vulkan"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """What every GPU says of itself: one that Triton serves, unless the test changes it."""
    gpu = SimpleNamespace(capability=(9, 0), has_fp64=True, hip=None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: gpu.capability)
    monkeypatch.setattr(torch.xpu, "get_device_properties", lambda *_: gpu)
    monkeypatch.setattr(torch, "version", gpu)
    if HAS_TRITON:
        from fused_smoothl1 import launch  # noqa: F401 (First: it keeps the gpu_of that it finds.)

        monkeypatch.setattr("fused_smoothl1.launcher.gpu_of", lambda _: None)
    with backend_set(None):
        yield gpu


@pytest.fixture
def no_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(fused_smoothl1, "launch", raising=False)
    monkeypatch.delitem(sys.modules, "fused_smoothl1.launch", raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)


def _backend(device: str) -> Any:
    """Return the backend of this device, with any warning an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return dispatch.backend_on(torch.device(device))


@support.needs_triton
@pytest.mark.parametrize(
    ("device", "facts"),
    [
        ("cuda", {"capability": (7, 5)}),
        ("cuda", {"capability": (12, 0)}),
        ("cuda:1", {"hip": "6.4", "capability": (0, 0)}),  # ROCm calls its devices "cuda" too.
        ("cuda", {"has_fp64": False}),  # which only Intel's GPUs are asked for
        ("xpu:0", {"capability": (0, 0)}),  # which only NVIDIA's are asked for
    ],
    ids=str,
)
def test_kernel(device: str, facts: dict[str, Any], gpu: SimpleNamespace) -> None:
    vars(gpu).update(facts)
    for choice in ("auto", "triton", None):
        with backend_set(choice):
            assert _backend(device) is not eager


@pytest.mark.parametrize("choice", ["auto", "eager", None])
def test_eager(choice: str | None, gpu: SimpleNamespace, no_triton: None) -> None:
    """Where no kernel is expected, there is no warning, whatever is missing for it."""
    gpu.capability, gpu.has_fp64 = (6, 1), False
    with backend_set(choice):
        for device in (*WITHOUT_KERNEL, *(("cuda", "xpu") if choice == "eager" else ())):
            assert _backend(device) is eager
    with backend_set("triton"):  # Nothing is computed, so nothing has to be compiled.
        assert _backend("meta") is eager


@support.needs_triton
@pytest.mark.parametrize(
    ("device", "facts", "reason"),
    [
        ("cuda:0", {"capability": (7, 2)}, r"7\.5, .* \(7, 2\)"),
        ("cuda:0", {"capability": (3, 7)}, r"7\.5, .* \(3, 7\)"),
        ("xpu:0", {"has_fp64": False}, "float64"),  # Some of Intel's GPUs have none.
    ],
    ids=str,
)
def test_gpu_without_kernel(
    device: str, facts: dict[str, Any], reason: str, gpu: SimpleNamespace
) -> None:
    """Under auto the work is done, with one warning that says why; under triton it is refused.

    (Where Triton is at fault, test_toolchain.py.) A machine may hold such a GPU beside a new one.
    """
    served, old = vars(gpu).copy(), torch.device(device)
    vars(gpu).update(facts)
    with pytest.warns(RuntimeWarning, match=f"eager PyTorch on {device}, .*{reason}") as caught:
        assert [dispatch.backend_on(old) for _ in range(3)] == [eager] * 3
    assert len(caught) == 1
    with backend_set("triton"):
        for _ in range(2):
            with pytest.raises(RuntimeError, match=f"FUSED_SMOOTHL1_BACKEND=triton, .*{reason}"):
                dispatch.backend_on(old)
    with pytest.warns(RuntimeWarning):
        assert dispatch.backend_on(old) is eager
    vars(gpu).update(served)
    assert _backend(f"{old.type}:1") is not eager
    assert _backend(device) is eager


@pytest.mark.parametrize("loss", [smooth_l1_loss, SmoothL1Loss()])
def test_warning(loss: Loss, no_triton: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is given once, and names the caller's file."""
    monkeypatch.setattr(dispatch, "TRITON_DEVICES", ("cuda", "cpu"))
    with backend_set("auto"), pytest.warns(RuntimeWarning, match="fused_smoothl1") as caught:
        losses = [loss(*boxes(6)) for _ in range(2)]
    assert all(found > 0 for found in losses)
    assert [warning.filename for warning in caught] == [__file__]


@pytest.mark.parametrize("value", ["Triton", "cuda", "", "eager "])
def test_unknown_backend(value: str) -> None:
    with backend_set(value):
        for size in (0, 4, 4):
            with pytest.raises(ValueError, match="FUSED_SMOOTHL1_BACKEND") as caught:
                smooth_l1_loss(*boxes(size))
            for word in ("auto", "eager", "triton", repr(value)):
                assert word in str(caught.value)


@support.on_kernel
def test_choice_of_a_call(launches: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment is read at the first call, as a look-up costs more than a check.

    A backward pass takes the backend of its forward pass, and without a choice the device decides.
    """
    loss = smooth_l1_loss(*boxes(6), reduction="none")
    for choice in ("eager", "auto"):
        monkeypatch.setenv("FUSED_SMOOTHL1_BACKEND", choice)
        smooth_l1_loss(*boxes(6))
    with backend_set("eager"):
        loss.sum().backward()
    assert len(launches) == 4
    with backend_set("auto"):
        smooth_l1_loss(*boxes(6))
        smooth_l1_loss(*(operand.cpu() for operand in boxes(6)))
    assert len(launches) == 4 + HAS_GPU


IMPORTS = """
import os, sys, torch
before, modules, threads = dict(os.environ), set(sys.modules), torch.get_num_threads()
import fused_smoothl1
new = {name.split(".")[0] for name in set(sys.modules) - modules}
assert not new & {"numpy", "triton", "hypothesis", "sklearn"}, new
assert dict(os.environ) == before
assert torch.get_num_threads() == threads
# A notebook may import it again; the operators are defined anew then.
for name in [name for name in sys.modules if name.startswith("fused_smoothl1")]:
    del sys.modules[name]
from fused_smoothl1 import functional
for name in ("forward", "backward"):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fused_smoothl1::{name}", "Autograd")
# Triton is not for the CPU, though its interpreter is on, for the debugging of another kernel.
functional.smooth_l1_loss(torch.ones(6, requires_grad=True), torch.zeros(6)).backward()
assert "triton" in modules or "triton" not in sys.modules
assert "fused_smoothl1.kernel" not in sys.modules
# To import DTensor takes a second. Where it is in use, the kernel's operators need their rules.
functional.is_eager = lambda device: device.type == "cpu"
functional._load_sharding(torch.device("cuda"))
assert "torch.distributed.tensor" not in sys.modules
import torch.distributed.tensor
for device in ("cpu", "cuda"):
    functional._load_sharding(torch.device(device))
    assert ("fused_smoothl1.sharding" in sys.modules) == (device == "cuda")
"""


def test_import_has_no_side_effects() -> None:
    support.run_python("-c", IMPORTS, TRITON_INTERPRET="1")
