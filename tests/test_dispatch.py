"""Which backend computes on which device; and that the package works without Triton.

A device object needs no device: what the dispatch asks about one is replaced. What depends on the
state of a fresh interpreter (what is imported, what can be) runs in one.
"""

import importlib.resources
import sys
import warnings
from collections.abc import Iterator
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import fused_smoothl1
from fused_smoothl1 import SmoothL1Loss, dispatch, eager, smooth_l1_loss
from tests import support
from tests.support import (
    HAS_GPU,
    HAS_TRITON,
    Loss,
    assert_equal,
    backend_set,
    boxes,
    results,
    run_python,
)

NEW = (7, 5), (8, 0), (8, 9), (9, 0), (10, 0), (12, 0)
OLD = (3, 7), (6, 1), (7, 0), (7, 2)
OTHERS = "mps", "hpu", "xla", "mtia", "privateuseone", "vulkan"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """What every GPU says of itself: one that Triton serves, unless the test changes it."""
    gpu = SimpleNamespace(capability=(9, 0), has_fp64=True, hip=None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: gpu.capability)
    monkeypatch.setattr(torch.xpu, "get_device_properties", lambda *_: gpu)
    monkeypatch.setattr(torch, "version", gpu)
    if HAS_TRITON:
        from fused_smoothl1 import launch  # noqa: F401 (It keeps the function that it finds.)

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
@pytest.mark.parametrize("choice", ["auto", "triton", None])
@pytest.mark.parametrize(
    ("device", "facts"),
    [
        *(("cuda", {"capability": c}) for c in NEW),
        ("cuda:1", {"hip": "6.4", "capability": (0, 0)}),  # ROCm calls its devices "cuda" too.
        ("cuda", {"has_fp64": False}),  # which only Intel's GPUs are asked for
        ("xpu:0", {"capability": (0, 0)}),  # which only NVIDIA's are asked for
        ("xpu", {}),
    ],
    ids=str,
)
def test_kernel(
    device: str, facts: dict[str, Any], choice: str | None, gpu: SimpleNamespace
) -> None:
    vars(gpu).update(facts)
    with backend_set(choice):
        assert _backend(device) is not eager


@pytest.mark.parametrize(
    ("choice", "device"),
    [
        *product(["auto", None], ["cpu", "meta", *OTHERS]),
        *product(["eager"], ["cuda", "xpu", "mps", "cpu"]),
    ],
)
def test_eager(choice: str | None, device: str, gpu: SimpleNamespace, no_triton: None) -> None:
    """Where nobody expects the kernel, nothing is said of what there is not for it."""
    gpu.capability, gpu.has_fp64 = (6, 1), False
    with backend_set(choice):
        assert _backend(device) is eager


@pytest.mark.parametrize(
    ("device", "facts", "reason"),
    [
        *(("cuda:0", {"capability": (m, n)}, rf"7\.5, .* \({m}, {n}\)") for m, n in OLD),
        ("xpu:0", {"has_fp64": False}, "float64"),  # Some of Intel's GPUs have none.
        ("cuda:0", {"triton": None}, "Triton is not installed: .* reinstall"),
        ("xpu:0", {"triton": None}, "Triton is not installed: .* reinstall"),
    ],
    ids=str,
)
def test_gpu_without_kernel(
    device: str, facts: dict[str, Any], reason: str, gpu: SimpleNamespace, request: Any
) -> None:
    """Under auto the work is done, with one warning that says why; under triton it is refused."""
    vars(gpu).update(facts)
    if "triton" in facts:
        request.getfixturevalue("no_triton")
    where = torch.device(device)
    with pytest.warns(RuntimeWarning, match=f"eager PyTorch on {device}, .*{reason}") as caught:
        assert [dispatch.backend_on(where) for _ in range(3)] == [eager] * 3
    assert len(caught) == 1
    with backend_set("triton"):
        for _ in range(2):
            with pytest.raises(RuntimeError, match=f"FUSED_SMOOTHL1_BACKEND=triton, .*{reason}"):
                dispatch.backend_on(where)


@support.needs_triton
def test_each_gpu_for_itself(gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine may hold an old GPU beside a new one."""
    capabilities = (6, 1), (8, 6)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda d: capabilities[d.index])
    with pytest.warns(RuntimeWarning, match="cuda:0"):
        assert dispatch.backend_on(torch.device("cuda:0")) is eager
    assert _backend("cuda:1") is not eager
    assert _backend("cuda:0") is eager


def test_triton_on_a_device_that_it_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is refused, with the way there; where nothing is computed, nothing has to be compiled."""
    if HAS_TRITON:
        monkeypatch.setattr("fused_smoothl1.launch.INTERPRETED", False)
    way_there = "TRITON_INTERPRET=1" if HAS_TRITON else "install"
    with backend_set("triton"):
        for device in ("mps", "cpu"):
            with pytest.raises(RuntimeError, match=f"{device}.*{way_there}"):
                dispatch.backend_on(torch.device(device))
        assert _backend("meta") is eager


@pytest.mark.parametrize("loss", [smooth_l1_loss, SmoothL1Loss()])
def test_fallback(loss: Loss, no_triton: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The results are those of eager PyTorch, and the warning names the line of the caller."""
    monkeypatch.setattr(dispatch, "TRITON_DEVICES", ("cuda", "cpu"))
    operands = boxes(6)
    with backend_set("eager"):
        expected = results(loss, operands)
    with backend_set("auto"), pytest.warns(RuntimeWarning, match="fused_smoothl1") as caught:
        found = [results(lambda *given: loss(*given), operands) for _ in range(2)]
    assert_equal(found, [expected] * 2)
    assert [warning.filename for warning in caught] == [__file__]


@pytest.mark.parametrize("value", ["Triton", "cuda", "", "1", "eager "])
def test_unknown_backend(value: str) -> None:
    with backend_set(value):
        for size in (0, 4, 4):
            with pytest.raises(ValueError, match="FUSED_SMOOTHL1_BACKEND") as caught:
                smooth_l1_loss(*boxes(size))
            for word in ("auto", "eager", "triton", repr(value)):
                assert word in str(caught.value)


@support.on_kernel
def test_environment_is_read_at_the_first_call(
    launches: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which takes it off the path of every other call: a look-up costs more than a check."""
    for number, choice in enumerate(("triton", "eager", "auto"), start=1):
        monkeypatch.setenv("FUSED_SMOOTHL1_BACKEND", choice)
        smooth_l1_loss(*boxes(6))
        assert len(launches) == number


@support.on_kernel
def test_auto_follows_the_device(launches: list[str]) -> None:
    with backend_set("auto"):
        smooth_l1_loss(*boxes(6))
        assert len(launches) == HAS_GPU
        smooth_l1_loss(*(operand.cpu() for operand in boxes(6)))
        assert len(launches) == HAS_GPU


@support.on_kernel
def test_backward_takes_the_backend_of_its_forward(launches: list[str]) -> None:
    loss = smooth_l1_loss(*boxes(6), reduction="none")
    with backend_set("eager"):
        loss.sum().backward()
    assert len(launches) == 2


def test_public_face() -> None:
    """Whoever reads help() finds each decision of the contract."""
    assert (
        {"smooth_l1_loss", "SmoothL1Loss"} <= set(fused_smoothl1.__all__) <= {*dir(fused_smoothl1)}
    )
    assert fused_smoothl1.__version__[0].isdigit()
    assert importlib.resources.files("fused_smoothl1").joinpath("py.typed").is_file()
    assert SmoothL1Loss.__doc__
    words = "sigma beta batchmean normalizer mask bool uint8 NaN empty float16 float32 ValueError"
    for word in [*words.split(), "TypeError", "FUSED_SMOOTHL1_BACKEND"]:
        assert word in (smooth_l1_loss.__doc__ or ""), f"the docstring does not speak of {word}"


IMPORTS = """
import os, sys, torch
before, modules, threads = dict(os.environ), set(sys.modules), torch.get_num_threads()
import fused_smoothl1
new = {name.split(".")[0] for name in set(sys.modules) - modules}
assert not new & {"numpy", "triton", "hypothesis", "sklearn"}, new
assert dict(os.environ) == before
assert torch.get_num_threads() == threads
assert torch.get_default_dtype() == torch.float32
# A notebook may import it again; the operators are defined anew then.
for name in [name for name in sys.modules if name.startswith("fused_smoothl1")]:
    del sys.modules[name]
from fused_smoothl1 import functional
for name in ("forward", "backward"):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fused_smoothl1::{name}", "Autograd")
# Triton is not for the CPU, though its interpreter is on, for the debugging of another kernel.
input = torch.randn(6, 4, requires_grad=True)
functional.smooth_l1_loss(input, torch.zeros(6, 4), sigma=3.0).backward()
assert "triton" in modules or "triton" not in sys.modules
assert "fused_smoothl1.kernel" not in sys.modules
# To import DTensor takes a second. Where it is in use, the kernel's operator needs the rules.
functional.is_eager = lambda device: device.type == "cpu"
functional._load_sharding(torch.device("cuda"))
assert not {"torch.distributed.tensor", "fused_smoothl1.sharding"} & set(sys.modules)
import torch.distributed.tensor
functional._load_sharding(torch.device("cpu"))
assert "fused_smoothl1.sharding" not in sys.modules
functional._load_sharding(torch.device("cuda"))
assert "fused_smoothl1.sharding" in sys.modules
"""


def test_nothing_is_imported_before_it_is_needed() -> None:
    done = run_python("-c", IMPORTS, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr
