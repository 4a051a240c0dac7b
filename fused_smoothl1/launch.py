"""The backend on Triton: strides, grid, workspace, the launch."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from functools import cache, lru_cache
from typing import Any, NamedTuple, cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_smoothl1.hooks import has_no_memory, untraced
from fused_smoothl1.kernel import scale_kernel, smooth_l1_kernel
from fused_smoothl1.layout import Ints, broadcast_strides, collapse, contiguous_strides, extent
from fused_smoothl1.problem import (
    OPERANDS,
    Gradients,
    Needs,
    Problem,
    beta_and_inverse,
    empty_gradients,
    empty_loss,
    is_mask,
    sum_to_weights,
)

INTERPRETED = not isinstance(smooth_l1_kernel, triton.JITFunction)

# Bytes of the widest access of a thread.
WIDEST_ACCESS = 16
# A tile gives each thread two wide accesses of each operand, and at most eight elements: with more,
# 16-bit kernels spill registers.
TILE_BYTES = 4096
MOST_ELEMENTS = 1024
THREADS = 128
# Programs loop over tiles: there are no more than fill the GPU once, so few partial sums to add.
PROGRAMS_PER_MULTIPROCESSOR = 8
# Below this size a multiplication costs less host time than a kernel that can skip it.
MULTIPLY_BELOW = 1 << 20
INT32_MAX = 2**31 - 1
TRITON_DTYPES = {torch.float32: tl.float32, torch.float64: tl.float64}


class Plan(NamedTuple):
    """How the kernel walks through its operands: arguments of `kernel.smooth_l1_kernel`."""

    sizes: Ints | None
    strides: tuple[Ints | None, ...]
    access: tuple[str | None, ...]
    aligned: bool
    lanes: int
    block: int
    is_long: bool


@untraced
def forward(
    problem: Problem, needs: Needs, *, may_be_replayed: bool = False
) -> tuple[Tensor, Gradients]:
    """Return the loss and the needed gradients for an upstream gradient of 1, in one launch."""
    loss, gradients = empty_loss(problem), empty_gradients(problem, needs)
    _launch(problem, None, loss, gradients, may_be_replayed=may_be_replayed)
    return loss, gradients


def backward(problem: Problem, upstream: Tensor, needs: Needs) -> Gradients:
    """Return the needed gradients for any upstream gradient, in one launch."""
    gradients = empty_gradients(problem, needs)
    _launch(problem, upstream, None, gradients)
    return sum_to_weights(problem, gradients)


def scale(gradients: Gradients, upstream: Tensor, has_masks: bool = False) -> Gradients | None:
    """Multiply what `forward` returned by the upstream gradient, in place and in one launch."""
    if has_masks:
        return None
    first, *others = [gradient for gradient in gradients if gradient is not None]
    numel = first.numel()
    # (PyTorch's product of 16 bits with float32 on a GPU would round the upstream gradient first.)
    if not others and numel < MULTIPLY_BELOW and first.dtype == upstream.dtype:
        first.mul_(upstream)
        return gradients
    block = TILE_BYTES // min(gradient.element_size() for gradient in (first, *others))
    with _device_of(first):
        scale_kernel[(_programs(first.device, numel, block),)](
            gradients[:2],
            _in_memory(upstream),
            numel,
            TRITON_DTYPES[upstream.dtype],
            tl.int64 if numel + block > INT32_MAX else tl.int32,
            block,
            num_warps=_warps(),
            enable_fp_fusion=False,
        )
    return gradients


def recompute(problem: Problem, gradients: Gradients, upstream: Tensor, needs: Needs) -> Gradients:
    """Compute the gradients anew, in place and in one launch, unless the upstream gradient is 1.

    Groups that masks exclude are not even loaded, so this may be less work than a product.
    """
    _launch(problem, upstream, None, gradients, unless_one=True)
    return gradients


def _launch(
    problem: Problem,
    upstream: Tensor | None,
    loss: Tensor | None,
    gradients: Gradients,
    *,
    unless_one: bool = False,
    may_be_replayed: bool = False,
) -> None:
    input = problem.input
    operands = tuple(map(_in_memory, (*problem[:OPERANDS], upstream)))
    outputs = [t for t in (None if problem.reduce else loss, *gradients) if t is not None]
    numel = input.numel()
    plan = _plan(
        tuple(input.shape),
        outputs[0].stride() if outputs else input.stride(),
        tuple(None if t is None else (tuple(t.shape), t.stride()) for t in operands),
        min(t.element_size() for t in (input, problem.target, *outputs)),
    )
    programs = _programs(input.device, numel, plan.block)
    reduces = problem.reduce and loss is not None
    with _device_of(input):
        partials, ticket = (
            _workspace(input.device, programs, may_be_replayed)
            if reduces and programs > 1
            else (None, None)
        )
        try:
            smooth_l1_kernel[(programs,)](
                operands,
                _in_memory(problem.divisor),
                problem.beta,
                loss,
                gradients,
                partials,
                ticket,
                plan.sizes,
                plan.strides,
                numel,
                *beta_and_inverse(problem),
                1.0 / problem.divisor_number,
                problem.inside_number,
                problem.outside_number,
                plan.access,
                tuple(map(is_mask, operands)),
                reduces,
                unless_one,
                TRITON_DTYPES[problem.compute_dtype],
                tl.int64 if plan.is_long else tl.int32,
                plan.aligned,
                plan.lanes,
                plan.block,
                num_warps=_warps(),
                # Without fused multiply-add each operation rounds as it does in eager PyTorch.
                enable_fp_fusion=False,
            )
        except BaseException:
            # An interrupted launch may leave a ticket drawn: later ones would add up too early.
            _workspaces.clear()
            raise


@lru_cache(maxsize=4096)
def _plan(
    shape: Ints,
    order: Ints,
    operands: tuple[tuple[Ints, Ints] | None, ...],
    itemsize: int,
) -> Plan:
    """Plan the walk through operands, (shape, strides) each, in the memory order of `order`.

    `itemsize`, in bytes, is the least of input, target and outputs: it decides how many elements a
    wide access moves.
    """
    nothing = (), ()  # broadcasts to every shape, and changes no plan
    expanded = (broadcast_strides(*(operand or nothing), shape) for operand in operands)
    sizes, (_, *walks) = collapse(shape, (order, *expanded))
    dense = contiguous_strides(sizes)
    numel = dense[0] * sizes[0]
    longest = max(extent(sizes, strides) for strides in (dense, *walks))

    lanes = WIDEST_ACCESS // itemsize
    block = min(TILE_BYTES // itemsize, MOST_ELEMENTS)
    aligned = False
    needs_walk = any(any(strides) and strides != dense for strides in walks)
    if needs_walk:
        group_size = lanes
        while sizes[-1] % group_size:
            group_size //= 2
        # Half a wide access is better than an index for every element, a quarter is not.
        aligned = group_size * 2 >= lanes
        lanes = group_size if aligned else lanes

    def access(strides: Ints) -> str:
        if not any(strides):
            return "scalar"
        if strides == dense:
            return "flat"
        if aligned and strides[-1] == 0:
            return "row"
        if aligned and strides[-1] == 1 and not any(step % lanes for step in strides[:-1]):
            return "vector"
        return "strided"

    kinds = [operand and access(strides) for operand, strides in zip(operands, walks, strict=True)]
    if aligned:
        # Rows of one group, as boxes are, make this 1: Triton then compiles no division by it.
        sizes = (*sizes[:-1], sizes[-1] // lanes)
    return Plan(
        sizes=sizes if needs_walk else None,
        strides=tuple(
            strides if kind in ("row", "vector", "strided") else None
            for kind, strides in zip(kinds, walks, strict=True)
        ),
        access=tuple(kinds),
        aligned=aligned,
        lanes=lanes,
        block=block,
        is_long=max(longest, numel + block) > INT32_MAX,
    )


def _programs(device: torch.device, numel: int, block: int) -> int:
    return min(-(-numel // block), _multiprocessors(device) * PROGRAMS_PER_MULTIPROCESSOR)


@cache
def _multiprocessors(device: torch.device) -> int:
    if device.type == "cpu":
        return 1  # The interpreter runs one program at a time.
    properties: Any = torch.get_device_module(device).get_device_properties(device)
    if device.type == "xpu":
        return int(properties.max_compute_units)
    return int(properties.multi_processor_count)


@cache
def _warps() -> int:
    """Return how many warps make `THREADS` threads: an AMD data-centre GPU's are twice as wide."""
    width = 32 if INTERPRETED else triton.runtime.driver.active.get_current_target().warp_size
    return THREADS // width


_workspaces: dict[tuple[torch.device, int], tuple[Tensor, Tensor]] = {}


def _workspace(device: torch.device, programs: int, may_be_replayed: bool) -> tuple[Tensor, Tensor]:
    """Return room for one partial sum a program, and a ticket at 0.

    Launches on one stream follow each other and each leaves the ticket at 0, so they share both. A
    graph may be replayed on any stream, so a captured launch gets its own, zeroed in the graph. So
    does one that is recorded: torch.compile warms its graphs up in the memory they will use.
    """
    if device.type == "cpu":
        stream, capturing = 0, False
    else:
        module = torch.get_device_module(device)
        stream = module.current_stream(device).stream_id
        is_capturing = getattr(module, "is_current_stream_capturing", None)
        capturing = is_capturing is not None and is_capturing()
    if capturing or may_be_replayed:
        return _new_workspace(device, programs)
    workspace = _workspaces.get((device, stream))
    if workspace is None:
        workspace = _workspaces[device, stream] = _kept_workspace(device)
    return workspace


def _kept_workspace(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return a workspace for all launches on the current stream.

    A new thread allocates it. This one may be allocating from a graph's memory, which nothing
    reveals: torch.compile does so around a user's operator that calls this library.
    """
    capacity = _multiprocessors(device) * PROGRAMS_PER_MULTIPROCESSOR
    if device.type == "cpu":
        return _new_workspace(device, capacity)
    module = torch.get_device_module(device)
    stream = module.current_stream(device)

    def allocate() -> tuple[Tensor, Tensor]:
        # (To restore another stream would start the first device up, which may not be this one.)
        module.set_stream(stream)
        return _new_workspace(device, capacity)

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(allocate).result()


def _new_workspace(device: torch.device, programs: int) -> tuple[Tensor, Tensor]:
    return (
        torch.empty(programs, dtype=torch.float64, device=device),
        torch.zeros(1, dtype=torch.int32, device=device),
    )


def _in_memory(tensor: Tensor | None) -> Tensor | None:
    """Return the tensor as its memory holds it: no zeros without memory, no pending negation."""
    if tensor is None:
        return None
    return torch.zeros_like(tensor) if has_no_memory(tensor) else tensor.resolve_neg()


def _device_of(tensor: Tensor) -> AbstractContextManager[None]:
    """Make the tensor's device the current one, to which Triton launches."""
    if tensor.device.type == "cpu":
        return nullcontext()
    module = torch.get_device_module(tensor.device)
    if module.current_device() == tensor.device.index:
        return nullcontext()
    return cast(AbstractContextManager[None], module.device(tensor.device))
