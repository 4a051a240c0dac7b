"""Which device goes to which backend, decided without any of the hardware.

A device object needs no device, and what the dispatch asks about one (the architecture of a GPU,
whether Triton is there) is replaced.
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
from tests.conftest import HAS_TRITON
from tests.support import backend_set, gaussian

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="waits for a machine with Triton")


@pytest.fixture(autouse=True)
def _modern_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An NVIDIA GPU that Triton serves, and no backend chosen, unless the test says otherwise."""
    _replace_gpu(monkeypatch, (9, 0))
    if HAS_TRITON:
        _launch()  # Which keeps the function that it finds.
        monkeypatch.setattr("fused_smoothl1.launcher.gpu_of", lambda _: None)
    with backend_set(None):
        yield


def _replace_gpu(
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    hip: str | None = None,
    has_fp64: bool = True,
) -> None:
    properties = SimpleNamespace(has_fp64=has_fp64)
    monkeypatch.setattr(torch.xpu, "get_device_properties", lambda *_: properties)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(torch.version, "hip", hip)


def _without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(fused_smoothl1, "launch", raising=False)
    monkeypatch.delitem(sys.modules, "fused_smoothl1.launch", raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)


def _launch() -> Any:
    from fused_smoothl1 import launch

    return launch


def _silent(device: str) -> Any:
    """Return the backend of this device, with any warning an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return dispatch.backend_on(torch.device(device))


@needs_triton
@pytest.mark.parametrize("choice", ["auto", "triton"])
@pytest.mark.parametrize("device", ["cuda", "cuda:1", "xpu", "xpu:0"])
def test_kernel(device: str, choice: str) -> None:
    with backend_set(choice):
        assert _silent(device) is not eager


@needs_triton
def test_rocm(monkeypatch: pytest.MonkeyPatch) -> None:
    """ROCm calls its devices "cuda"; its architectures are numbered in another way."""
    _replace_gpu(monkeypatch, (0, 0), hip="6.4")
    assert _silent("cuda") is not eager


@needs_triton
def test_xpu_is_not_asked_for_a_capability_of_nvidia(monkeypatch: pytest.MonkeyPatch) -> None:
    _replace_gpu(monkeypatch, (0, 0))
    assert _silent("xpu") is not eager


@pytest.mark.parametrize(
    "device", ["cpu", "mps", "hpu", "xla", "mtia", "privateuseone", "meta", "vulkan"]
)
def test_eager(device: str) -> None:
    assert _silent(device) is eager


@pytest.mark.parametrize("device", ["cuda", "xpu", "mps", "cpu"])
def test_eager_by_choice(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _replace_gpu(monkeypatch, (6, 1))
    _without_triton(monkeypatch)
    with backend_set("eager"):
        assert _silent(device) is eager


@needs_triton
@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (8, 9), (9, 0), (10, 0), (12, 0)])
def test_new_enough(capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    _replace_gpu(monkeypatch, capability)
    assert _silent("cuda") is not eager


@pytest.mark.parametrize("capability", [(3, 7), (6, 1), (7, 0), (7, 2)])
def test_too_old(capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Under auto the work is done, with one warning that says why; under triton it is refused."""
    _replace_gpu(monkeypatch, capability)
    device = torch.device("cuda", 0)
    with pytest.warns(RuntimeWarning, match=r"eager.*cuda:0.*7\.5") as caught:
        backends = [dispatch.backend_on(device) for _ in range(3)]
    assert backends == [eager] * 3
    assert len(caught) == 1
    assert str(capability) in str(caught[0].message)
    with backend_set("triton"):
        for _ in range(2):
            with pytest.raises(RuntimeError, match=r"FUSED_SMOOTHL1_BACKEND=triton.*7\.5"):
                dispatch.backend_on(device)


@needs_triton
def test_no_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some of Intel's GPUs have none, and the kernel adds up in it."""
    _replace_gpu(monkeypatch, (9, 0), has_fp64=False)
    with pytest.warns(RuntimeWarning, match=r"eager.*float64.*xpu:0"):
        assert dispatch.backend_on(torch.device("xpu", 0)) is eager
    assert _silent("cuda") is not eager


@needs_triton
def test_each_gpu_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine may hold an old GPU beside a new one."""
    capabilities = {0: (6, 1), 1: (8, 6)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda d: capabilities[d.index])
    devices = [torch.device("cuda", index) for index in (0, 1, 0, 1)]
    with pytest.warns(RuntimeWarning, match="cuda:0") as caught:
        backends = [dispatch.backend_on(device) for device in devices]
    assert [backend is eager for backend in backends] == [True, False] * 2
    assert len(caught) == 1


@pytest.mark.parametrize("device", ["cuda:0", "xpu:0"])
def test_no_triton(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _without_triton(monkeypatch)
    with pytest.warns(RuntimeWarning, match=r"eager.*reinstall") as caught:
        backends = [dispatch.backend_on(torch.device(device)) for _ in range(3)]
    assert backends == [eager] * 3
    assert len(caught) == 1
    assert device in str(caught[0].message)
    match = r"FUSED_SMOOTHL1_BACKEND=triton.*install"
    with backend_set("triton"), pytest.raises(RuntimeError, match=match):
        dispatch.backend_on(torch.device(device))


@pytest.mark.parametrize("loss", [smooth_l1_loss, SmoothL1Loss()])
def test_warning_points_at_the_call(
    loss: Any, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    """The line to look at is the user's, not one of this package nor of torch.nn's modules."""
    _without_triton(monkeypatch)
    monkeypatch.setattr(dispatch, "TRITON_DEVICES", ("cuda", "cpu"))
    input = gaussian(6, 4, seed=1, device=device)
    with pytest.warns(RuntimeWarning, match="fused_smoothl1") as caught:
        losses = [loss(input, torch.zeros_like(input)) for _ in range(2)]
    assert torch.equal(*losses)
    assert len(caught) == 1
    assert caught[0].filename == __file__


def test_fallback_computes(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """The call that warns gives the loss and the gradient that eager PyTorch gives."""
    _without_triton(monkeypatch)
    input = gaussian(6, 4, seed=1, device=device, requires_grad=True)
    target = torch.zeros_like(input)
    with monkeypatch.context() as patch:
        patch.setattr(dispatch, "TRITON_DEVICES", ("cuda", "cpu"))
        with pytest.warns(RuntimeWarning, match="eager"):
            loss = smooth_l1_loss(input, target)
        (gradient,) = torch.autograd.grad(loss, input)
    with backend_set("eager"):
        expected = smooth_l1_loss(input, target)
    torch.testing.assert_close(loss, expected, rtol=0, atol=0)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, input)[0], rtol=0, atol=0)


def test_no_kernel_for_a_device_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked for by name on a device that Triton does not know: refused, with the way there."""
    if HAS_TRITON:
        monkeypatch.setattr(_launch(), "INTERPRETED", False)
    match = "TRITON_INTERPRET=1" if HAS_TRITON else "install"
    for device in ("mps", "cpu"):
        with backend_set("triton"), pytest.raises(RuntimeError, match=match):
            dispatch.backend_on(torch.device(device))
    with backend_set("triton"):  # Where nothing is computed, nothing has to be compiled.
        assert dispatch.backend_on(torch.device("meta")) is eager
