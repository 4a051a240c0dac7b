"""Which calls are plain, and which backend computes on a device."""

import os
import sys
import warnings
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from fused_smoothl1 import eager
from fused_smoothl1.hooks import (
    is_legacy_batched,
    is_transformed,
    is_watched,
    traced_as_constant,
    untraced,
)
from fused_smoothl1.problem import Backend

CHOICES = ("auto", "eager", "triton")
# The device types for which Triton generates code ("cuda" is also ROCm's name in PyTorch).
TRITON_DEVICES = ("cuda", "xpu")
# The oldest NVIDIA architecture that Triton supports.
MINIMUM_CAPABILITY = (7, 5)
# Of the fields of a problem.
PLAIN_TYPES = {Tensor, torch.nn.Parameter, type(None), float, int, bool, torch.dtype}


@untraced
def backend_for(input: Tensor) -> Backend:
    """Return the backend that computes the loss of this input."""
    backend = backend_on(input.device)
    # Without elements there is nothing to launch a kernel for.
    return backend if input.numel() else eager


@cache
def backend_on(device: torch.device) -> Backend:
    """Return the backend that computes on this device, the same one for the whole process.

    Raises:
        ValueError: if FUSED_SMOOTHL1_BACKEND has a value that is not allowed.
        RuntimeError: if it is ``triton`` and Triton cannot serve this device.
    """
    choice = os.environ.get("FUSED_SMOOTHL1_BACKEND", "auto")
    if choice not in CHOICES:
        raise ValueError(
            f"FUSED_SMOOTHL1_BACKEND must be one of {', '.join(CHOICES)}, got {choice!r}"
        )
    if (
        choice == "eager"
        or device.type == "meta"  # Nothing is computed there.
        or (choice == "auto" and device.type not in TRITON_DEVICES)
    ):
        return eager
    backend, obstacle = _triton_on(device)
    if backend is not None:
        return backend
    if choice == "triton":
        raise RuntimeError(f"FUSED_SMOOTHL1_BACKEND=triton, but {obstacle}")
    _warn(f"fused_smoothl1 computes in eager PyTorch on {device}, because {obstacle}")
    return eager


@untraced
def is_plain(values: tuple[Any, ...]) -> bool:
    """Whether PyTorch executes this call as it stands, with nothing between it and the tensors.

    Whatever is in between must see operations that it knows, not a launch or a write into memory.
    The first of the values is a tensor.
    """
    return (
        _is_executed_as_it_stands()
        # Tensors without data, of which only the operators' results are known.
        and not values[0].is_meta
        # DTensor, FakeTensor and other subclasses, and symbols in the place of numbers.
        and PLAIN_TYPES.issuperset(map(type, values))
    )


def is_plain_backward(upstream: Tensor) -> bool:
    """Whether PyTorch executes a backward pass as it stands, whatever its forward pass was."""
    return (
        # The caller wants to differentiate the result.
        not torch.is_grad_enabled()
        # torch.vmap over autograd.grad, forward-mode AD of a gradient, compiled autograd, and
        # is_grads_batched=True.
        and _is_executed_as_it_stands()
        and type(upstream) is Tensor
        and not is_legacy_batched(upstream)
    )


def _is_executed_as_it_stands() -> bool:
    return (
        # torch.compile and torch.export, which trace this very call.
        not is_dynamo_compiling() and not is_transformed() and not is_watched()
    )


@traced_as_constant
def is_eager(device: torch.device) -> bool:
    """Whether eager PyTorch computes on this device."""
    return backend_on(device) is eager


def _triton_on(device: torch.device) -> tuple[Backend | None, str]:
    """Return the kernel's backend, or None and the reason why it cannot serve this device."""
    if find_spec("triton") is None:
        return None, "Triton is not installed: pip install triton"
    if device.type == "cuda" and torch.version.hip is None:
        capability = torch.cuda.get_device_capability(device)
        if capability < MINIMUM_CAPABILITY:
            return None, f"Triton needs compute capability 7.5, and {device} has {capability}"
    if device.type == "xpu" and not torch.xpu.get_device_properties(device).has_fp64:
        return None, f"the kernel adds up in float64, which {device} does not have"
    # Imported here, because importing this package must not import Triton.
    try:
        from fused_smoothl1 import launch
    except ImportError as error:
        return None, f"Triton cannot be imported: {error}"
    if device.type not in TRITON_DEVICES and not launch.INTERPRETED:
        return None, (
            f"no kernel can be compiled for a tensor on {device}: set TRITON_INTERPRET=1 before "
            "Triton is first imported to run the kernel in Triton's interpreter"
        )
    return launch, ""


def _warn(message: str) -> None:
    """Warn at the line that called into this package, be it through the function or the module."""
    level, frame = 1, sys._getframe()
    while frame.f_back and frame.f_globals["__name__"].startswith(("fused_smoothl1.", "torch.nn.")):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, RuntimeWarning, stacklevel=level)
