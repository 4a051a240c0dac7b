"""The private names of PyTorch that this package needs, each with the reason.

All of them exist in every version of PyTorch that the package is tested with. A missing one fails
by name, on import or where a function here uses it, unless a comment says otherwise. There is no
fallback: a wrong guess about what surrounds a call could mean a wrong gradient.
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
from torch._C._dynamo.eval_frame import _FrameAction, _FrameExecStrategy, set_code_exec_strategy
from torch._C._functorch import is_legacy_batchedtensor
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling

# What F.smooth_l1_loss calls. Only this one has an argument `out`.
torch_smooth_l1: Any = torch._C._nn.smooth_l1_loss
# A context in which operators run below autograd: their results need no gradient.
below_autograd: Any = torch._C._AutoDispatchBelowAutograd
# For is_grads_batched=True PyTorch still has the vmap from before functorch.
is_legacy_batched: Callable[[Tensor], bool] = is_legacy_batchedtensor
# An upstream gradient of zeros may have no memory for a kernel to read.
has_no_memory: Callable[[Tensor], bool] = Tensor._is_zerotensor

# What tracers use in the place of numbers. (Code that torch.compile traces sees plain numbers.)
SYMBOLS = (torch.SymFloat, torch.SymInt)
PRE_DISPATCH = DispatchKey.PreDispatch

Function = TypeVar("Function", bound=Callable[..., object])


def untraced(function: Function) -> Function:
    """Keep torch.compile out of a function and all that it calls, where the function is run.

    Where torch.compile gives up on a caller, it still tries to compile each function that the
    caller runs. (torch.compiler.disable would import all of torch.compile, and Triton with it.)
    """
    skip = _FrameAction.SKIP
    set_code_exec_strategy(function.__code__, _FrameExecStrategy(skip, skip))
    return function


def traced_as_constant(function: Function) -> Function:
    """Let torch.compile call a function while it traces, instead of tracing it.

    torch.compiler.assume_constant_result does the same, but imports all of torch.compile. A version
    that does not know the attribute would trace the function, and name what it cannot trace.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def apply_of(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """Return `apply` of an autograd Function for calls without any transform around them.

    Function.apply itself looks for functorch's transforms first, at each call and for each
    argument. This is the method of its base class, in C++.
    """
    return super(torch.autograd.Function, function).apply  # type: ignore[misc, no-any-return]


def new_library(name: str) -> torch.library.Library:
    """Return the only library that defines operators in this namespace.

    Operators outlive the module that defined them. If it is imported again, they would be defined
    twice.
    """
    namespace = getattr(torch.ops, name)
    if hasattr(namespace, "_library"):
        namespace._library._destroy()
    namespace._library = torch.library.Library(name, "DEF")
    return namespace._library  # type: ignore[no-any-return]


@traced_as_constant
def is_transformed() -> bool:
    """Whether a transform is active, which must see the operations that the loss is composed of."""
    return (
        # torch.func: vmap, grad, jvp and all that is made of them. Their tensors look plain.
        _are_functorch_transforms_active()
        # torch.autograd.forward_ad: only operations know which tensors have a tangent. (Where the
        # level is missing, the first call raises.)
        or forward_ad._current_level >= 0
        # torch.jit.trace would record what a kernel writes as a constant.
        or _get_tracing_state() is not None
    )


def is_watched() -> bool:
    """Whether make_fx, FakeTensorMode or another mode sees every operation.

    Modes that act before autograd have a stack of their own.
    """
    return _len_torch_dispatch_stack() > 0 or _dispatch_tls_is_dispatch_key_included(PRE_DISPATCH)


def is_in_make_fx() -> bool:
    """Whether make_fx records what runs here, for itself rather than for torch.compile."""
    is_traced = _get_dispatch_mode(_TorchDispatchModeKey.PROXY) is not None
    is_compiled = _get_dispatch_mode(_TorchDispatchModeKey.FUNCTIONAL) is not None
    return (is_traced and not is_compiled) or _dispatch_tls_is_dispatch_key_included(PRE_DISPATCH)


def is_static(number: float | torch.SymFloat | torch.SymInt) -> bool:
    """Whether this is a number, and not a symbol that a tracer uses for any number."""
    if not is_dynamo_compiling() and not isinstance(number, SYMBOLS):
        return True
    # Imported here because it imports SymPy, which is loaded only where somebody traces.
    from torch.fx.experimental.symbolic_shapes import has_static_value

    return has_static_value(number)


def may_hold(condition: bool) -> bool:
    """Whether a condition holds or may hold: a tracer does not know numbers that depend on data."""
    if not is_dynamo_compiling() and not isinstance(condition, torch.SymBool):
        return bool(condition)
    from torch.fx.experimental.symbolic_shapes import guard_or_true

    return guard_or_true(condition)
