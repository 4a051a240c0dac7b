"""GPUs that are not there: what the launcher asks PyTorch and Triton about them, and of them.

Tensors "on" such a GPU are PyTorch's own fake tensors, of any size, and a kernel's launch is
written down instead. So what the launcher decides for a GPU can be seen without one.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch._subclasses import fake_tensor

MULTIPROCESSORS = 10


class Launch(NamedTuple):
    """A launch that was asked for, on the device and the stream that were current."""

    programs: int
    arguments: dict[str, Any]
    options: dict[str, Any]
    device: int
    stream: int

    @property
    def workspace(self) -> tuple[int, int]:
        """Which partial sums and which ticket it was given."""
        return id(self.arguments["partials_ptr"]), id(self.arguments["ticket_ptr"])


class FakeGpu(threading.local):
    """PyTorch's module of a kind of device; each thread has a current device and stream of its own.

    The stream is a number, the same on all devices.
    """

    current = stream = 0
    capturing = False

    def __init__(self, launches: list[Launch], entered: list[int]) -> None:
        self.launches = launches
        self.entered = entered
        """Devices that were made the current one."""

    def current_device(self) -> int:
        return self.current

    @contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        before, self.current = self.current, device.index
        self.entered.append(device.index)
        yield
        self.current = before

    def current_stream(self, device: torch.device) -> Any:
        return SimpleNamespace(stream_id=self.stream, device_index=device.index)

    def set_stream(self, stream: Any) -> None:
        self.stream = stream.stream_id

    def is_current_stream_capturing(self) -> bool:
        return self.capturing

    def get_device_properties(self, device: torch.device) -> Any:
        name = "max_compute_units" if device.type == "xpu" else "multi_processor_count"
        return SimpleNamespace(**{name: MULTIPROCESSORS})

    def launch(self, code: Any, programs: int, stream: int, *arguments: Any) -> None:
        """Stand in for the launch of a kernel."""
        tensors, _, others = arguments
        named = dict(zip(code.kernel.arg_names, (*code.grouped(tensors), *others), strict=True))
        self.launches.append(Launch(programs, named, code.options, self.current, stream))


@contextmanager
def fake_gpu(warp_size: int = 32) -> Iterator[FakeGpu]:
    """Let the launcher see as many GPUs as it asks for, and make all new tensors fake ones."""
    from fused_smoothl1 import launch, launcher

    gpu, mode = FakeGpu([], []), fake_tensor.FakeTensorMode()
    new_workspace = launch._new_workspace

    def new_fake_workspace(device: torch.device, programs: int) -> launch.Workspace:
        with mode:  # Also in the thread that has been started for it.
            return new_workspace(device, programs)

    def forget() -> None:
        for function in (launcher.gpu_of, launch._scalar, launch._kept_workspace):
            function.cache_clear()

    active = SimpleNamespace(
        get_current_target=lambda: SimpleNamespace(warp_size=warp_size, backend="cuda"),
        get_current_stream=lambda device: gpu.stream,
    )
    triton = SimpleNamespace(runtime=SimpleNamespace(driver=SimpleNamespace(active=active)))
    with pytest.MonkeyPatch.context() as patch, mode:
        patch.setattr(torch, "get_device_module", lambda _: gpu)
        # On a machine with a GPU, fake tensors start the device up that they are said to be on.
        patch.setattr(fake_tensor, "init_gpu_context", lambda _: None)
        patch.setattr(fake_tensor.FakeTensor, "data_ptr", lambda self: 4096, raising=False)
        patch.setattr(launcher, "triton", triton)
        patch.setattr(launcher, "knobs", SimpleNamespace(runtime=SimpleNamespace(interpret=False)))
        patch.setattr(launch, "_new_workspace", new_fake_workspace)
        patch.setattr(launcher.Code, "launch", lambda *arguments: gpu.launch(*arguments))
        forget()
        yield gpu
    forget()
