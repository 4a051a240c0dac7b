"""Which backend computes a call. This is the only place that chooses."""

import os
import sys
import warnings
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._C import (
    DispatchKey,
    _are_functorch_transforms_active,
    _dispatch_tls_is_dispatch_key_included,
    _get_dispatch_mode,
    _get_tracing_state,
    _len_torch_dispatch_stack,
    _TorchDispatchModeKey,
)
from torch._C._functorch import is_legacy_batchedtensor
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling

from fused_smoothl1 import eager
from fused_smoothl1.contract import Backend

CHOICES = ("auto", "eager", "triton")
# The device types for which Triton generates code ("cuda" is also ROCm's name in PyTorch).
TRITON_DEVICES = ("cuda", "xpu")
# The oldest NVIDIA architecture that Triton supports.
MINIMUM_CAPABILITY = (7, 5)
PLAIN_TYPES = frozenset((Tensor, torch.nn.Parameter, float, int))
PRE_DISPATCH = DispatchKey.PreDispatch

Function = TypeVar("Function", bound=Callable[..., object])


def untraced(function: Function) -> Function:
    """Keep torch.compile out of a function, and of all that it calls, where the function is run.

    Where torch.compile has given up on a function, it goes on to look into each call that runs in
    it. (To disable it in the documented way would import all of it, and Triton with it.)
    """
    hooks = torch._C._dynamo.eval_frame
    skip = hooks._FrameAction.SKIP
    hooks.set_code_exec_strategy(function.__code__, hooks._FrameExecStrategy(skip, skip))
    return function


untraced(eager.forward)


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
    if choice == "eager" or (choice == "auto" and device.type not in TRITON_DEVICES):
        return eager
    backend, obstacle = _triton_on(device)
    if backend is not None:
        return backend
    if choice == "triton":
        raise RuntimeError(f"FUSED_SMOOTHL1_BACKEND=triton, but {obstacle}")
    _warn(f"fused_smoothl1 computes in eager PyTorch on {device}, because {obstacle}")
    return eager


@untraced
def is_plain(operands: tuple[Any, ...]) -> bool:
    """Whether PyTorch executes this call as it stands, with nothing between it and the tensors.

    What is between must see operations that it knows, not a kernel launch or a write into memory.
    """
    return (
        # torch.compile and torch.export, which trace this very call.
        not is_dynamo_compiling()
        and not is_transformed()
        # make_fx, FakeTensorMode, and others that see every operation; those that see it before
        # autograd does have a stack of their own.
        and _len_torch_dispatch_stack() == 0
        and not _dispatch_tls_is_dispatch_key_included(PRE_DISPATCH)
        # Tensors without data, of which only the operators' results are known.
        and not operands[0].is_meta
        # DTensor, FakeTensor and other subclasses; symbols in the place of weights and divisors.
        and PLAIN_TYPES.issuperset(map(type, operands))
    )


def is_plain_backward(upstream: Tensor) -> bool:
    """Whether PyTorch executes a backward pass as it stands, whatever its forward pass was."""
    return (
        # The caller wants to differentiate the result.
        not torch.is_grad_enabled()
        # torch.vmap over autograd.grad, forward-mode AD of a gradient, compiled autograd …
        and is_plain((upstream,))
        # … and is_grads_batched=True, which is vmap as it was before functorch.
        and not is_legacy_batchedtensor(upstream)
    )


def is_transformed() -> bool:
    """Whether something is at work that has to see the operations of which the loss is composed."""
    return (
        # torch.func: vmap, grad, jvp and all that is made of them. Their tensors look plain.
        _are_functorch_transforms_active()
        # torch.autograd.forward_ad: which tensors have a tangent is known to operations only.
        or forward_ad._current_level >= 0
        # torch.jit.trace would take what a kernel writes for a constant.
        or _get_tracing_state() is not None
    )


def is_recorded() -> bool:
    """Whether make_fx records what runs here, for itself rather than for torch.compile."""
    is_traced = _get_dispatch_mode(_TorchDispatchModeKey.PROXY) is not None
    is_compiled = _get_dispatch_mode(_TorchDispatchModeKey.FUNCTIONAL) is not None
    return (is_traced and not is_compiled) or _dispatch_tls_is_dispatch_key_included(PRE_DISPATCH)


def is_eager(device: torch.device) -> bool:
    """Whether eager PyTorch computes on this device."""
    return backend_on(device) is eager


# What torch.compiler.assume_constant_result does: torch.compile asks these while it traces instead
# of tracing them. To call it here would import all of torch.compile, and Triton with it.
is_transformed._dynamo_marked_constant = True  # type: ignore[attr-defined]
is_eager._dynamo_marked_constant = True  # type: ignore[attr-defined]


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
    # Imported here because it imports Triton, which importing this package must not need.
    try:
        from fused_smoothl1 import launch
    except ImportError as error:
        return None, f"Triton cannot be imported: {error}"
    if device.type not in TRITON_DEVICES and not launch.INTERPRETED:
        return None, (
            f"no kernel can be compiled for a tensor on {device}: set TRITON_INTERPRET=1 before "
            "Triton is first imported to run the kernel in Triton's interpreter"
        )
    untraced(launch.forward)
    return launch, ""


def _warn(message: str) -> None:
    """Warn at the line that called into this package, be it through the function or the module."""
    level, frame = 1, sys._getframe()
    while frame.f_back and frame.f_globals["__name__"].startswith(("fused_smoothl1.", "torch.nn.")):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, RuntimeWarning, stacklevel=level)
