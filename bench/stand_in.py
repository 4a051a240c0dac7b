"""A GPU that is not there: Triton compiles for it, and what would be launched goes nowhere.

Triton's own code runs, and the launcher's, up to the driver. The environment must ask for the
Triton backend and for no interpreter.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

# Triton's backend, architecture, and threads in a warp.
TARGETS: dict[str, tuple[str, int | str, int]] = {
    "sm_75": ("cuda", 75, 32),
    "sm_80": ("cuda", 80, 32),
    "sm_89": ("cuda", 89, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "sm_120": ("cuda", 120, 32),
    "gfx90a": ("hip", "gfx90a", 64),
    "gfx942": ("hip", "gfx942", 64),
    "gfx1100": ("hip", "gfx1100", 32),
}
ENVIRONMENT = {"FUSED_SMOOTHL1_BACKEND": "triton", "TRITON_INTERPRET": "0"}


class _Launcher:
    """What Triton calls to launch a compiled kernel, of any source and metadata."""

    def __init__(self, *_: Any) -> None:
        pass

    def __call__(self, *_: Any) -> None:
        pass


@contextmanager
def gpu(target: str = "sm_90") -> Iterator[Any]:
    """Let tensors of the CPU count as tensors on this GPU; yield the module of the launcher.

    The process keeps the driver: it is for processes of their own.
    """
    import torch
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    from fused_smoothl1 import launch, launcher

    # Triton keeps what it compiled by device: another one for every target.
    number = list(TARGETS).index(target)
    properties = {"max_shared_mem": 2**17, "multiprocessor_count": 132}
    utils = SimpleNamespace(
        get_device_properties=lambda device: properties,
        load_binary=lambda *_: (1, 1, 0, 0, 1024),  # of handles and limits no use is made
        unload_module=lambda module: None,
    )
    driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: GPUTarget(*TARGETS[target]),
            get_current_device=lambda: number,
            get_current_stream=lambda device: 0,
            get_active_torch_device=lambda: torch.device("cpu"),
            launcher_cls=_Launcher,
            utils=utils,
        )
    )
    for function in (*vars(launch).values(), *vars(launcher).values()):
        # What is remembered of a device may be of another target.
        getattr(function, "cache_clear", lambda: None)()
    with tensors_on_gpu():
        yield launch


@contextmanager
def tensors_on_gpu() -> Iterator[None]:
    """Let tensors of the CPU count as tensors on a GPU, whatever Triton makes of it."""
    from fused_smoothl1 import dispatch

    dispatch._backends.clear()
    with mock.patch.object(dispatch, "TRITON_DEVICES", (*dispatch.TRITON_DEVICES, "cpu")):
        yield
    dispatch._backends.clear()
