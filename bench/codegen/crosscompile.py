"""Compile what the launcher would launch, for a GPU that is not there.

A call is specialized and compiled as a launch would be, by the launcher's and Triton's own code: a
driver that only knows its target stands in for the GPU's, and what would be launched is compiled
instead.
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

# Triton's backend, architecture, and threads in a warp.
TARGETS: dict[str, tuple[str, int | str, int]] = {
    "sm_75": ("cuda", 75, 32),
    "sm_80": ("cuda", 80, 32),
    "sm_86": ("cuda", 86, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "sm_120": ("cuda", 120, 32),
    "gfx90a": ("hip", "gfx90a", 64),
    "gfx942": ("hip", "gfx942", 64),
    "gfx1100": ("hip", "gfx1100", 32),
}


Launch = tuple[dict[str, Any], Any]  # its arguments, and what was compiled instead


class UnknownTargetError(Exception):
    """The installed Triton can compile nothing for a target."""


def launches(call: Callable[[], object], target: str) -> list[Launch]:
    """Make the call as if its tensors lay on a GPU of this target; return its launches.

    The environment must ask for the Triton backend, and for no interpreter. The process keeps the
    stand-in driver: it is for workers.
    """
    import torch
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    from fused_smoothl1 import dispatch, launch

    # Triton keeps what it compiled by device: another one for every target.
    driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: GPUTarget(*TARGETS[target]),
            get_current_device=lambda: list(TARGETS).index(target),
            get_current_stream=lambda device: 0,
            get_active_torch_device=lambda: torch.device("cpu"),
        )
    )
    recorded: list[Launch] = []
    kernels = {
        name: _Recorder(value, recorded)
        for name, value in vars(launch).items()
        if isinstance(value, triton.JITFunction)
    }
    for function in vars(launch).values():
        # What the launcher remembers of a device or a plan may be of another target.
        getattr(function, "cache_clear", lambda: None)()
    # The dispatcher would let tensors of the CPU through to an interpreted kernel only.
    serves = mock.patch.object(dispatch, "_triton_on", return_value=(launch, ""))
    with mock.patch.dict(vars(launch), kernels), serves:
        try:
            call()
        except Exception:
            _check_that_target_is_known()
            raise
    return recorded


def _check_that_target_is_known() -> None:
    import triton

    @triton.jit
    def nothing() -> None:
        pass

    try:
        nothing.warmup(grid=(1,), enable_fp_fusion=False)
    except Exception as error:
        raise UnknownTargetError(f"{type(error).__name__}: {error}".splitlines()[0]) from error


@dataclass
class _Recorder:
    """Stands in for a kernel: compiles what would be launched."""

    kernel: Any
    recorded: list[Launch]

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def compile(*arguments: Any, **options: Any) -> None:
            compiled = self.kernel.warmup(*arguments, grid=grid, **options)
            names = self.kernel.arg_names
            self.recorded.append((dict(zip(names, arguments, strict=True)), compiled))

        return compile
