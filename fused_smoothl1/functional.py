"""The function: its signature, its documentation, and the checks of its arguments."""

import itertools
import math
import sys
from importlib import import_module
from numbers import Real
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.overrides import handle_torch_function, has_torch_function

from fused_smoothl1 import eager, ops
from fused_smoothl1.autograd import apply
from fused_smoothl1.dispatch import backend_for, is_eager, is_plain
from fused_smoothl1.hooks import SYMBOLS, is_static, may_hold, traced_as_constant
from fused_smoothl1.problem import (
    FLOAT_DTYPES,
    LARGEST,
    MASK_DTYPES,
    NO_NEEDS,
    OPERANDS,
    make_problem,
    nan_unless,
)

Reduction = Literal["none", "sum", "mean", "batchmean"]
REDUCTIONS = get_args(Reduction)
INTEGER_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8)
WEIGHT_DTYPES = FLOAT_DTYPES + INTEGER_DTYPES + MASK_DTYPES

# What outside weights, sigma, beta and normalizer may be.
TensorOrNumber = Tensor | float


def smooth_l1_loss(
    input: Tensor,
    target: Tensor,
    inside_weights: Tensor | None = None,
    outside_weights: TensorOrNumber | None = None,
    *,
    sigma: TensorOrNumber | None = None,
    beta: TensorOrNumber | None = None,
    reduction: Reduction = "mean",
    normalizer: TensorOrNumber | None = None,
) -> Tensor:
    r"""Weighted Smooth L1 loss, the box regression of Faster R-CNN, in one pass over the operands.

    .. math::

        x &= \text{inside} \cdot (\text{input} - \text{target}) \\
        f(x) &= \begin{cases}
            0.5\, x^2 / \beta & \text{if } |x| < \beta \\
            |x| - 0.5\, \beta & \text{otherwise}
        \end{cases} \\
        \text{loss} &= \text{outside} \cdot f(x)\text{, then reduced}

    with :math:`\beta = 1 / \sigma^2`. As ``beta`` tends to 0 this becomes the L1 loss; ``beta``
    times this loss is the Huber loss with ``delta = beta``.

    On a GPU one Triton kernel computes the loss, and in the same pass the gradient where it can;
    nothing waits for the GPU, and the same call gives the same bits at every run. Elsewhere eager
    PyTorch gives the same result, to rounding; on a GPU that Triton cannot serve, or where Triton
    is missing or broken, too, with one ``RuntimeWarning``. Numbers are not compiled into the
    kernel: new values cost nothing, except one recompilation by ``torch.compile`` at the second.
    New values in a tensor do not even cause that.

    Args:
        input: the predictions: any shape and any strides; float64, float32, float16 or bfloat16.
        target: the regression targets: the input's shape, on its device; any of these dtypes.
        inside_weights: multiply the difference before the loss. A tensor of any real dtype that
            broadcasts to the input's shape: ``weights[:, None]`` has one weight per row. They
            follow IEEE rules: 0 times NaN is NaN. ``bool`` and ``uint8`` tensors are masks instead
            (other integers are not: write ``weights.bool()``): nonzero selects, and an element that
            is not selected, even NaN or inf, has exactly 0 loss and 0 gradient. A number raises,
            because other libraries have beta in this place.
        outside_weights: multiply the loss; otherwise like ``inside_weights``, or a number. An
            element takes part if every mask given selects it.
        sigma: in (0, inf]; ``beta`` is ``1 / sigma ** 2``. A number, or a tensor as for ``beta``,
            which is then computed from it by a few small operations.
        beta: in [0, inf): where the quadratic part ends, in the unit of the weighted difference.
            0 is L1, with gradient 0 at 0. A number, or a tensor of any float dtype that broadcasts
            to the input's shape, on its device: one value for all (0-d), or one for each sample,
            channel or element. The host never waits for them. An element for which the tensor holds
            a value that is not allowed has NaN as its loss and gradients; such a number raises.
            With neither ``sigma`` nor ``beta``, 1.
        reduction: ``"none"``: the loss of every element. ``"sum"``. ``"mean"``: the sum divided by
            the number of elements, selected or not. ``"batchmean"``: the sum divided by
            ``input.shape[0]``, as in the Caffe layer (by 1 for a 0-d input, as in ``F.kl_div``).
        normalizer: with ``"sum"`` only: what the sum is divided by. A finite number above 0, or a
            tensor without dimensions, on the input's device, which the host never reads: the number
            of positives, all-reduced over the ranks if you like. It gets no gradient. Where a
            tensor is 0, the result is that of a division: NaN, or inf.

    Returns:
        The loss. Reduced, it has no dimensions and is float32, or float64 if any operand is.
        With ``"none"`` it has the input's shape and memory format, and the dtype to which the float
        operands promote, those without dimensions too; under autocast, float32 at least. Reduced,
        an empty input gives 0, connected to the graph.

    Gradients:
        For input, target, both weights and ``beta`` or ``sigma``, where they require one: in their
        own dtype and shape, of any order. That of ``beta`` is outside times
        :math:`-0.5\, (x / \beta)^2` if :math:`|x| < \beta`, else outside times -0.5: a larger beta
        never raises the loss, so train it only with a term that holds it back. Arithmetic and
        sums are in float32 (float64 if any operand is float64), and float16 gradients are rounded
        once, after the upstream gradient has been multiplied in, so that a gradient scaler works as
        it should. If an operand is modified in place after the forward pass, a backward pass that
        needs it again raises, as everywhere in PyTorch; one that does not is right.

    Raises:
        TypeError: if input or target is no tensor or has another dtype; if inside weights are no
            tensor, or outside weights, ``sigma``, ``beta`` or ``normalizer`` neither a real number
            nor a tensor, or of another dtype than is allowed.
        ValueError: if shapes, devices or values do not fit, ``reduction`` is unknown, or both
            ``sigma`` and ``beta``, or ``normalizer`` without ``"sum"``, are given.
        RuntimeError: if ``FUSED_SMOOTHL1_BACKEND=triton`` asks for what cannot be had; it says why.

    The environment variable ``FUSED_SMOOTHL1_BACKEND`` is for debugging: ``auto`` (the default) as
    described, ``eager`` never the kernel, ``triton`` never anything else; on CPU tensors the latter
    needs ``TRITON_INTERPRET=1``. It is read at the first call on a device.

    Source: Girshick, "Fast R-CNN" (2015), and the layer ``smooth_L1_loss_layer.cu`` of
    py-faster-rcnn's Caffe, which added sigma and both weights.

    Example:
        >>> pred = torch.randn(128, 4, requires_grad=True)
        >>> is_foreground = torch.rand(128, 1) < 0.25
        >>> loss = smooth_l1_loss(
        ...     pred, torch.randn(128, 4), is_foreground, sigma=3.0,
        ...     reduction="sum", normalizer=is_foreground.sum().clamp(min=1),
        ... )
        >>> loss.backward()
    """
    arguments = (input, target, inside_weights, outside_weights, sigma, beta, normalizer)
    # Like PyTorch's own functions: torch.fx records this call, and a subclass may override it.
    if has_torch_function(arguments):
        options: Any = {"sigma": sigma, "beta": beta, "reduction": reduction}
        options["normalizer"] = normalizer
        return handle_torch_function(smooth_l1_loss, arguments, *arguments[:4], **options)
    _check_tensor("input", input, FLOAT_DTYPES)
    _check_tensor("target", target, FLOAT_DTYPES, input)
    if not _has_shape(target, input.shape):
        way_out = ": pass target.reshape_as(input)" if _differ_by_ones(target, input) else ""
        raise ValueError(
            f"target must have input's shape, got target of shape {tuple(target.shape)} "
            f"and input of shape {tuple(input.shape)}{way_out}"
        )
    inside, _ = _weights("inside_weights", inside_weights, input)
    outside, outside_number = _weights("outside_weights", outside_weights, input, or_number=True)
    transition, sigma_number, beta_number = _checked_transition(sigma, beta, input)
    divisor, divisor_number = _divisor(reduction, normalizer, input)
    problem = make_problem(
        input,
        target,
        inside,
        outside,
        transition,
        divisor,
        outside_number,
        beta_number,
        divisor_number,
        reduction != "none",
    )
    if problem.loss_dtype is not problem.compute_dtype and _is_autocast(input.device.type):
        problem = problem._replace(loss_dtype=problem.compute_dtype)
    if transition is not None and sigma is not None:
        problem = problem._replace(beta=_beta_of(transition, problem.compute_dtype))
    if not is_plain(problem):
        _load_sharding(input.device)
        return ops.loss(problem, sigma_number)
    backend = backend_for(input)
    if backend is eager and (native := eager.native_loss(problem)) is not None:
        return native
    loss: Tensor
    if torch.is_grad_enabled():
        loss = apply(*problem[:OPERANDS], problem, backend)
    else:
        loss, _ = backend.forward(problem, NO_NEEDS)
    return loss


def _is_autocast(device_type: str) -> bool:
    # (Where there is none, as for "meta", asking whether it is enabled raises.)
    return _has_autocast(device_type) and torch.is_autocast_enabled(device_type)


@traced_as_constant
def _has_autocast(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type)


@traced_as_constant
def _load_sharding(device: torch.device) -> None:
    """Tell DTensor how to shard the operators, if both may be in use: importing it takes long."""
    if "torch.distributed.tensor" in sys.modules and not is_eager(device):
        import_module("fused_smoothl1.sharding")


def check_options(
    sigma: TensorOrNumber | None, beta: TensorOrNumber | None, reduction: Reduction
) -> None:
    """Raise what `smooth_l1_loss` would raise for these options, whatever the input is."""
    _checked_transition(sigma, beta)
    _check_reduction(reduction)


def _check_tensor(
    name: str, value: object, dtypes: tuple[torch.dtype, ...], input: Tensor | None = None
) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{name} must be a torch.Tensor, got {_kind(value)}: torch.as_tensor makes one"
        )
    if value.dtype not in dtypes:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(
            f"{name} must have one of the dtypes {allowed}, got {value.dtype}"
            + (f": pass {name}.float()" if value.dtype in INTEGER_DTYPES + MASK_DTYPES else "")
        )
    if value.is_nested:
        raise TypeError(
            f"{name} must be dense, got a nested tensor: "
            f"pass torch.nested.to_padded_tensor({name}, 0.0)"
        )
    if value.layout != torch.strided:
        raise TypeError(f"{name} must be dense, got {value.layout}: pass {name}.to_dense()")
    if input is not None and value.device != input.device:
        raise ValueError(
            f"{name} must be on input's device, got {name} on {value.device} "
            f"and input on {input.device}"
        )


def _weights(
    name: str, weights: Any, input: Tensor, *, or_number: bool = False
) -> tuple[Tensor | None, float]:
    """Return the weights: a tensor and 1, or None and a number, where that is allowed."""
    if weights is None:
        return None, 1.0
    if isinstance(weights, Tensor):
        _check_tensor(name, weights, WEIGHT_DTYPES, input)
        _check_broadcasts(name, weights, input)
        return weights, 1.0
    # (All is decided in this frame, because torch.compile takes NumPy's numbers for arrays until it
    # gives up on the frame that raises.)
    is_number = isinstance(weights, (Real, *SYMBOLS)) and not isinstance(weights, bool)
    if is_number and or_number:
        return None, _number(name, weights)
    got, hint = _kind(weights), ""
    # In other libraries other arguments have this place.
    if is_number:
        _number(name, weights)  # One that no float can hold raises.
        # (torch.compile cannot show a symbol.)
        got = "NUMBER" if is_dynamo_compiling() else f"{weights}"
        hint = f": for the transition point pass beta={got}"
    elif isinstance(weights, bool):
        got = f"{weights}"
        hint = ": a mask is a bool tensor; for size_average or reduce pass reduction"
    elif isinstance(weights, str):
        got, hint = f"'{weights}'", ": reduction goes by name"
    elif hasattr(weights, "__len__"):
        hint = ": torch.as_tensor makes one"
    allowed = "a real number or a torch.Tensor" if or_number else "a torch.Tensor"
    raise TypeError(f"{name} must be {allowed}, got {got}{hint}")


def _check_broadcasts(name: str, value: Tensor, input: Tensor) -> None:
    if not _broadcasts(value.shape, input.shape):
        # (Within the message, because torch.compile adds no text to one that holds symbols.)
        way_out = _way_out(name, value.shape, input.shape)
        raise ValueError(
            f"{name} must broadcast to input's shape {tuple(input.shape)}, "
            f"got shape {tuple(value.shape)}{way_out}"
        )


def _way_out(name: str, shape: torch.Size, to: torch.Size) -> str:
    """Say which indexing lets a shape broadcast to another, if there is only one that does."""
    if not _are_known(*shape, *to):
        return ""
    ways: dict[tuple[int, ...], str] = {}  # by the axes that the sizes beyond 1 come to lie on
    for axes in itertools.combinations(range(len(to)), len(shape)):
        pairs = list(zip(axes, shape, strict=True))
        if all(size in (1, to[axis]) for axis, size in pairs):
            index = ", ".join(":" if a in axes else "None" for a in range(axes[0], len(to)))
            ways[tuple(axis for axis, size in pairs if size != 1)] = f"[{index}]"
    if len(shape) > len(to):
        for axis, size in enumerate(shape):
            rest = torch.Size((*shape[:axis], *shape[axis + 1 :]))
            if size == 1 and _broadcasts(rest, to):
                ways.setdefault(tuple(rest), f".squeeze({axis})")
    return f": pass {name}{ways.popitem()[1]}" if len(ways) == 1 else ""


def _differ_by_ones(one: Tensor, other: Tensor) -> bool:
    """Whether two shapes differ in how many sizes of 1 they have, and in nothing else.

    (Where both have as many, one may be transposed.)
    """
    if one.dim() == other.dim() or not _are_known(*one.shape, *other.shape):
        return False
    sizes, others = ([size for size in tensor.shape if size != 1] for tensor in (one, other))
    return sizes == others


def _are_known(*sizes: int) -> bool:
    """Whether these are no symbols, whose comparison would add guards."""
    return all(type(size) is int for size in sizes)


def _has_shape(tensor: Tensor, shape: torch.Size) -> bool:
    if not is_dynamo_compiling():
        return tensor.shape == shape
    # Size by size: comparing whole shapes would guard on sizes that depend on data.
    return tensor.dim() == len(shape) and all(map(_equal, tensor.shape, shape))


def _broadcasts(shape: torch.Size, to: torch.Size) -> bool:
    # Lengths first: comparing symbolic sizes adds guards.
    if not shape or len(shape) > len(to):
        return not shape
    if not is_dynamo_compiling() and type(math.prod((*shape, *to))) is int:
        # Without symbols, the same in a fraction of the time.
        return shape == to or all(a in (1, b) for a, b in zip(shape[::-1], to[::-1], strict=False))
    for i in range(-len(shape), 0):
        if may_hold(shape[i] != 1) and not _equal(shape[i], to[i]):
            return False
    return True


def _equal(size: int, other: int) -> bool:
    """Whether two sizes are equal; sizes that depend on data are checked at run time."""
    equal = may_hold(size == other)
    if equal and is_dynamo_compiling():
        torch._check(size == other)
    return equal


def _checked_transition(
    sigma: TensorOrNumber | None, beta: TensorOrNumber | None, input: Tensor | None = None
) -> tuple[Tensor | None, float | None, float]:
    """Return the tensor or None, the number sigma or None, and the number beta."""
    if sigma is not None and beta is not None:
        given = " and ".join(
            f"{name}={_kind(value) if isinstance(value, Tensor) else value}"
            for name, value in (("sigma", sigma), ("beta", beta))
        )
        raise ValueError(
            f"at most one of sigma and beta may be given, got {given}: beta is 1 / sigma ** 2"
        )
    name, value = ("beta", beta) if sigma is None else ("sigma", sigma)
    if value is None:
        return None, None, 1.0
    if type(value) is not float and isinstance(value, Tensor):
        _check_tensor(name, value, FLOAT_DTYPES, input)
        if input is not None:
            _check_broadcasts(name, value, input)
        return value, None, 1.0
    number = _number(name, value, " or a torch.Tensor")
    if sigma is None:
        if not (may_hold(number >= 0) and may_hold(number < math.inf)):
            raise ValueError(f"beta must be in [0, inf), got {beta}")
        return None, None, number
    if not may_hold(number > 0):
        raise ValueError(f"sigma must be in (0, inf], got {sigma}")
    return None, number, 1.0 / number / number


def _beta_of(sigma: Tensor, dtype: torch.dtype) -> Tensor:
    """Return beta in this dtype: 1 / sigma², and NaN where sigma is not in (0, inf]."""
    sigma = sigma.to(dtype)
    is_allowed = sigma > 0
    # Where beta would overflow it is finite, and the gradient 0.
    least = 1.01 * LARGEST[dtype] ** -0.5
    divisor = torch.where(is_allowed, sigma, 1).clamp(min=least)
    # (Divided, as in `composition`; PyTorch takes 1 / divisor for a reciprocal.)
    beta = (torch.ones_like(divisor) / divisor).square()
    # A sigma that is not allowed has beta's own gradient: NaN, or 0 where a mask excludes it.
    return nan_unless(is_allowed, torch.where(is_allowed, beta, sigma))


def _number(name: str, value: Any, alternative: str = "") -> float:
    if type(value) is float:  # The common case; isinstance(value, Real) is slow.
        return value
    if isinstance(value, SYMBOLS):
        return cast(float, torch.sym_float(value))
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a real number{alternative}, got {_kind(value)}")
    if isinstance(value, int) and not is_static(value):
        # As an integer: PyTorch 2.9 compiles no product of a tensor and a float made of it.
        return value
    try:
        return float(value)
    except OverflowError:
        raise ValueError(
            f"{name} must be a number that a float can hold, got a larger one"
        ) from None


def _kind(value: object) -> str:
    kind = type(value)
    return kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"


def _check_reduction(reduction: Reduction) -> None:
    if reduction not in REDUCTIONS:
        allowed = ", ".join(f'"{name}"' for name in REDUCTIONS)
        raise ValueError(f"reduction must be one of {allowed}, got {reduction!r}")


def _divisor(reduction: Reduction, normalizer: Any, input: Tensor) -> tuple[Tensor | None, float]:
    """Return what the sum is divided by: a tensor and 1, or None and a number."""
    _check_reduction(reduction)
    if normalizer is None:
        if reduction == "mean":
            return _at_least_one(math.prod(input.shape))
        if reduction == "batchmean" and input.dim() > 0:
            return _at_least_one(input.shape[0])
        return None, 1.0
    if reduction != "sum":
        raise ValueError(
            f'normalizer is allowed only with reduction="sum", got reduction={reduction!r}'
        )
    if not isinstance(normalizer, Tensor):
        number = _number("normalizer", normalizer, " or a torch.Tensor without dimensions")
        if not (may_hold(number > 0) and may_hold(number < math.inf)):
            raise ValueError(
                f"normalizer must be a finite number above 0, got {normalizer}: "
                "max(n, 1) serves for a count that may be 0"
            )
        return None, number
    if normalizer.dim() != 0:
        raise ValueError(
            "normalizer must be a number or a tensor without dimensions, "
            f"got shape {tuple(normalizer.shape)}"
        )
    _check_tensor("normalizer", normalizer, WEIGHT_DTYPES, input)
    if normalizer.requires_grad:
        raise ValueError(
            "normalizer gets no gradient, got one that requires grad: pass normalizer.detach()"
        )
    return normalizer, 1.0


def _at_least_one(size: Any) -> tuple[Tensor | None, float]:
    # Under torch.jit.trace sizes are tensors, and max() would record a constant.
    return (size.clamp(min=1), 1.0) if isinstance(size, Tensor) else (None, max(size, 1))
