"""How often the host waits for the device in a step."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


def host_waits(step: Callable[[], object], device: torch.device) -> int:
    """Return how often the host waits in a step.

    PyTorch tells where there is CUDA. Elsewhere those operations count whose result's size or value
    the host needs before it can go on: they would wait if there were something to wait for.
    """
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)
    waits = _Waits()
    with waits:
        step()
    return waits.count


class _Waits(TorchDispatchMode):
    """Counts the operations that need to know what a tensor holds."""

    NEEDING = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        needs = any(tag in func.tags for tag in self.NEEDING)
        if func is torch.ops.aten.index.Tensor:  # It needs to only where an index is a mask.
            masks = (torch.bool, torch.uint8)
            needs = any(index is not None and index.dtype in masks for index in args[1])
        self.count += needs
        return func(*args, **(kwargs or {}))
