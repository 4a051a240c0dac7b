"""Which calls are plain, and which backend computes on a device."""

import os
import sys
import threading
import warnings
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
from fused_smoothl1.problem import Backend, Gradients, Needs, NoKernelError, Problem

CHOICES = ("auto", "eager", "triton")
# The device types for which Triton generates code ("cuda" is also ROCm's name in PyTorch).
TRITON_DEVICES = ("cuda", "xpu")
# The oldest NVIDIA architecture that Triton supports.
MINIMUM_CAPABILITY = (7, 5)
# Of the fields of a problem.
PLAIN_TYPES = {Tensor, torch.nn.Parameter, type(None), float, int, bool, torch.dtype}
# What a message about a missing or a broken Triton ends with.
INSTALL = (
    "on Linux, PyTorch's builds for GPUs bring the Triton that belongs to them: reinstall PyTorch"
)

_backends: dict[torch.device, Backend] = {}
# Held while a backend is decided on, so that several threads import Triton, and warn, once.
_deciding = threading.RLock()


@untraced
def backend_for(input: Tensor) -> Backend:
    """Return the backend that computes the loss of this input."""
    backend = backend_on(input.device)
    # Without elements there is nothing to launch a kernel for.
    return backend if input.numel() else eager


def backend_on(device: torch.device) -> Backend:
    """Return the backend that computes on this device.

    It stays the same for the whole process, unless a kernel turns out not to compile.

    Raises:
        ValueError: if FUSED_SMOOTHL1_BACKEND has a value that is not allowed.
        RuntimeError: if it is ``triton`` and Triton cannot serve this device.
    """
    backend = _backends.get(device)
    if backend is None:
        with _deciding:
            backend = _backends.get(device) or _decide(device)
            _backends[device] = backend
    return backend


def _decide(device: torch.device) -> Backend:
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
    is_required = choice == "triton"
    try:
        return _UntilItFails(_triton_on(device), device, is_required)
    except NoKernelError as obstacle:
        return _instead_of_triton(device, obstacle, is_required)


def _instead_of_triton(device: torch.device, obstacle: NoKernelError, is_required: bool) -> Backend:
    """Return eager PyTorch, with a warning; raise where nothing but the kernel is wanted."""
    if is_required:
        raise RuntimeError(f"FUSED_SMOOTHL1_BACKEND=triton, but {obstacle}") from obstacle
    _warn(
        f"fused_smoothl1 computes in eager PyTorch on {device}, because {obstacle}; set "
        "FUSED_SMOOTHL1_BACKEND=eager to silence this"
    )
    return eager


@untraced
def is_plain(values: tuple[Any, ...]) -> bool:
    """Whether PyTorch executes this call as it stands, with nothing between it and the tensors.

    Whatever is in between must see operations that it knows, not a launch or a write into memory.
    """
    return (
        _is_executed_as_it_stands()
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


def _triton_on(device: torch.device) -> Backend:
    """Return the kernel's backend, or raise why it cannot serve this device."""
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
        # It may be another module of this name, or a package without its sources.
        file = getattr(sys.modules.get("triton"), "__file__", None)
        place = f" from {file}" if file else ""
        raise NoKernelError(f"Triton cannot be imported{place}", INSTALL, error) from error
    if device.type not in TRITON_DEVICES and not launch.INTERPRETED:
        raise NoKernelError(
            f"no kernel can be compiled for a tensor on {device}",
            "set TRITON_INTERPRET=1 before Triton is first imported to run the kernel in Triton's "
            "interpreter",
        )
    launcher.gpu_of(device)  # Raises without a driver that works.
    return launch


class _UntilItFails:
    """Triton's backend for a device, which gives way to eager PyTorch where no kernel compiles.

    That is known before anything is computed. (It is called for each loss: no `*arguments` here.)
    """

    def __init__(self, launch: Backend, device: torch.device, is_required: bool) -> None:
        self.launch, self.device, self.is_required = launch, device, is_required

    @untraced
    def forward(
        self, problem: Problem, needs: Needs, *, may_be_replayed: bool = False
    ) -> tuple[Tensor, Gradients]:
        try:
            return self.launch.forward(problem, needs, may_be_replayed=may_be_replayed)
        except NoKernelError as obstacle:
            self._give_up(obstacle)
        return eager.forward(problem, needs)

    @untraced
    def backward(self, problem: Problem, upstream: Tensor, needs: Needs) -> Gradients:
        try:
            return self.launch.backward(problem, upstream, needs)
        except NoKernelError as obstacle:
            self._give_up(obstacle)
        return eager.backward(problem, upstream, needs)

    @untraced
    def scale(self, gradients: Gradients, upstream: Tensor, has_masks: bool) -> Gradients | None:
        try:
            return self.launch.scale(gradients, upstream, has_masks)
        except NoKernelError as obstacle:
            self._give_up(obstacle)
        return eager.scale(gradients, upstream, has_masks)

    @untraced
    def recompute(
        self, problem: Problem, gradients: Gradients, upstream: Tensor, needs: Needs
    ) -> Gradients:
        try:
            return self.launch.recompute(problem, gradients, upstream, needs)
        except NoKernelError as obstacle:
            self._give_up(obstacle)
        return eager.backward(problem, upstream, needs)

    def _give_up(self, obstacle: NoKernelError) -> None:
        """Leave all other calls to eager PyTorch too."""
        with _deciding:
            if _backends.get(self.device) is not eager:
                backend = _instead_of_triton(self.device, obstacle, self.is_required)
                _backends[self.device] = backend


def _warn(message: str) -> None:
    """Warn at the line that called into this package, be it through the function or the module."""
    level, frame = 1, sys._getframe()
    # (What PyTorch generates has no name.)
    inner = "fused_smoothl1.", "torch."
    while frame.f_back and frame.f_globals.get("__name__", "torch.").startswith(inner):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, RuntimeWarning, stacklevel=level)
