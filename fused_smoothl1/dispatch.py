"""Which calls are plain, and which backend computes on a device."""

import os
import sys
import warnings
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from fused_smoothl1 import composition, eager
from fused_smoothl1.hooks import (
    is_legacy_batched,
    is_transformed,
    is_watched,
    traced_as_constant,
    untraced,
)
from fused_smoothl1.problem import Backend, NoKernelError, Problem

CHOICES = ("auto", "eager", "triton")
# The device types for which Triton generates code ("cuda" is also ROCm's name in PyTorch).
TRITON_DEVICES = ("cuda", "xpu")
# The oldest NVIDIA architecture that Triton supports.
MINIMUM_CAPABILITY = (7, 5)
# What a message about a missing or a broken Triton ends with.
INSTALL = "reinstall PyTorch, whose builds for GPUs on Linux bring the one that belongs to them"
# Of the fields of a problem.
PLAIN_TYPES = {Tensor, torch.nn.Parameter, type(None), float, int, bool, torch.dtype}


# Why a kernel could not be compiled, on devices where it turned out so.
_obstacles: dict[torch.device, str] = {}


@untraced
def backend_for(problem: Problem) -> Any:
    """Return the backend that computes this problem."""
    backend = backend_on(problem.input.device)
    # Without elements there is nothing to launch a kernel for.
    if backend is eager or not problem.input.numel():
        return _eager_for(problem)
    return backend


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
    try:
        backend: Backend = _triton_on(device)
        return backend
    except NoKernelError as obstacle:
        if choice == "triton":
            raise RuntimeError(f"FUSED_SMOOTHL1_BACKEND=triton, but {obstacle}") from obstacle
        _warn(
            f"fused_smoothl1 computes in eager PyTorch on {device}, because {obstacle}; "
            "FUSED_SMOOTHL1_BACKEND=eager does so without a warning"
        )
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


def _triton_on(device: torch.device) -> Any:
    """Return the kernel's backend, or raise why it cannot serve this device."""
    if device in _obstacles:
        raise NoKernelError(_obstacles[device])
    if device.type == "cuda" and torch.version.hip is None:
        capability = torch.cuda.get_device_capability(device)
        if capability < MINIMUM_CAPABILITY:
            raise NoKernelError(
                f"Triton needs compute capability 7.5, and {device} has {capability}"
            )
    if device.type == "xpu" and not torch.xpu.get_device_properties(device).has_fp64:
        raise NoKernelError(f"the kernel adds up in float64, which {device} does not have")
    # Imported here, because importing this package must not import Triton.
    try:
        from fused_smoothl1 import launch, launcher
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "triton":
            raise NoKernelError("Triton is not installed", INSTALL) from error
        # There may be another module of this name, or a package without its sources.
        raise NoKernelError("Triton cannot be imported", INSTALL, error) from error
    if device.type not in TRITON_DEVICES and not launch.INTERPRETED:
        raise NoKernelError(
            f"no kernel can be compiled for a tensor on {device}",
            "set TRITON_INTERPRET=1 before Triton is first imported to run the kernel in Triton's "
            "interpreter",
        )
    launcher.gpu_of(device)
    return _until_it_fails(launch, device)


def _until_it_fails(launch: Any, device: torch.device) -> Any:
    """Return the kernel's backend, which gives way to eager PyTorch once a kernel does not compile.

    That is known before anything is computed.
    """

    def guarded(name: str) -> Any:
        function = getattr(launch, name)

        @untraced
        def compute(first: Any, *others: Any, **options: Any) -> Any:
            if device not in _obstacles:
                try:
                    return function(first, *others, **options)
                except NoKernelError as obstacle:
                    _obstacles[device] = str(obstacle)
                    backend_on.cache_clear()
                    backend_on(device)  # Warns, or raises.
            # (Gradients that are to be scaled are no problem.)
            other = _eager_for(first) if isinstance(first, Problem) else eager
            return getattr(other, name)(first, *others, **options)

        return compute

    names = "forward", "backward", "scale", "recompute"
    return SimpleNamespace(**{name: guarded(name) for name in names})


def _eager_for(problem: Problem) -> Any:
    """Return what computes a problem in eager PyTorch; with a tensor as beta, the composition."""
    return eager if problem.beta is None else composition


def _warn(message: str) -> None:
    """Warn at the line that called into this package, be it through the function or the module."""
    level, frame = 1, sys._getframe()
    while frame.f_back and frame.f_globals["__name__"].startswith(("fused_smoothl1.", "torch.")):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, RuntimeWarning, stacklevel=level)
