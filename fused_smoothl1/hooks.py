"""What PyTorch has under private names only, each with the reason why it is needed.

All of them are in every version of PyTorch that `pyproject.toml` allows, as far as there are any
yet. Where one is missing, importing this package fails with its name, or the first call does where
a comment says so: a guess at what surrounds a call could be a wrong gradient.
"""

from collections.abc import Callable
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
from torch._C._dynamo.eval_frame import (
    _FrameAction,
    _FrameExecStrategy,
    set_code_exec_strategy,
)
from torch._C._functorch import is_legacy_batchedtensor
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling

# What F.smooth_l1_loss calls. That has no argument for where to put the result.
smooth_l1: Any = torch._C._nn.smooth_l1_loss
# Inside, operators are executed as if nothing required a gradient, whoever is to differentiate.
below_autograd: Any = torch._C._AutoDispatchBelowAutograd
# torch.vmap over autograd.grad, as it was before functorch: is_grads_batched=True.
is_legacy_batched: Callable[[Tensor], bool] = is_legacy_batchedtensor
# An upstream gradient of zeros may have no memory that a kernel could read.
has_no_memory: Callable[[Tensor], bool] = Tensor._is_zerotensor

# What tracers put in the place of numbers. (torch.compile shows numbers where it has symbols.)
SYMBOLS = (torch.SymFloat, torch.SymInt)
PRE_DISPATCH = DispatchKey.PreDispatch

Function = TypeVar("Function", bound=Callable[..., object])


def untraced(function: Function) -> Function:
    """Keep torch.compile out of a function, and of all that it calls, where the function is run.

    Where torch.compile has given up on a function, it goes on to look into each call that runs in
    it. (To disable it in the documented way would import all of it, and Triton with it.)
    """
    skip = _FrameAction.SKIP
    set_code_exec_strategy(function.__code__, _FrameExecStrategy(skip, skip))
    return function


def traced_as_constant(function: Function) -> Function:
    """Let torch.compile call a function while it traces, instead of tracing it.

    As torch.compiler.assume_constant_result does, which would import all of torch.compile. Where a
    version does not know the attribute, it traces the function, and says what it cannot trace.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def apply_of(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """Return `apply` of an autograd Function for calls around which no transform is active.

    Function.apply itself looks for functorch's transforms first, at each call and for each
    argument. This is its base's, in C++.
    """
    return super(torch.autograd.Function, function).apply  # type: ignore[misc, no-any-return]


def new_library(name: str) -> torch.library.Library:
    """Return a library that defines operators of this namespace, and nobody else does.

    Operators outlive the module that defined them: where that is imported anew, they would be
    defined twice.
    """
    namespace = getattr(torch.ops, name)
    if hasattr(namespace, "_library"):
        namespace._library._destroy()
    namespace._library = torch.library.Library(name, "DEF")
    return namespace._library  # type: ignore[no-any-return]


@traced_as_constant
def is_transformed() -> bool:
    """Whether something is at work that has to see the operations of which the loss is composed."""
    return (
        # torch.func: vmap, grad, jvp and all that is made of them. Their tensors look plain.
        _are_functorch_transforms_active()
        # torch.autograd.forward_ad: only operations know which tensors have a tangent. (Where the
        # level is missing, the first call raises.)
        or forward_ad._current_level >= 0
        # torch.jit.trace would take what a kernel writes for a constant.
        or _get_tracing_state() is not None
    )


def is_watched() -> bool:
    """Whether make_fx, FakeTensorMode or another mode sees every operation.

    Those that see it before autograd does have a stack of their own.
    """
    return _len_torch_dispatch_stack() > 0 or _dispatch_tls_is_dispatch_key_included(PRE_DISPATCH)


def is_recorded() -> bool:
    """Whether make_fx records what runs here, for itself rather than for torch.compile."""
    is_traced = _get_dispatch_mode(_TorchDispatchModeKey.PROXY) is not None
    is_compiled = _get_dispatch_mode(_TorchDispatchModeKey.FUNCTIONAL) is not None
    return (is_traced and not is_compiled) or _dispatch_tls_is_dispatch_key_included(PRE_DISPATCH)


def is_static(number: float | torch.SymFloat | torch.SymInt) -> bool:
    """Whether this is a number, not what a tracer has put in its place to serve all numbers."""
    if not is_dynamo_compiling() and not isinstance(number, SYMBOLS):
        return True
    # Imported here because it imports SymPy, which is loaded only where somebody traces.
    from torch.fx.experimental.symbolic_shapes import has_static_value

    return has_static_value(number)


def may_hold(condition: bool) -> bool:
    """Whether a condition holds, or might: a tracer does not know the numbers that data decide."""
    if not is_dynamo_compiling() and not isinstance(condition, torch.SymBool):
        return bool(condition)
    from torch.fx.experimental.symbolic_shapes import guard_or_true

    return guard_or_true(condition)
