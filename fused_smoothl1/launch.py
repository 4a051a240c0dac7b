"""The backend on Triton: what the kernels get, and a workspace for their sums."""

from collections.abc import Hashable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, lru_cache
from typing import Any, NamedTuple, cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_smoothl1.hooks import has_no_memory, untraced
from fused_smoothl1.kernel import scale_kernel, smooth_l1_kernel
from fused_smoothl1.launcher import (
    INT32_MAX,
    Arguments,
    Code,
    Facts,
    FactTuples,
    Gpu,
    addresses_of,
    as_facts,
    facts_of,
    gpu_of,
    integer_key,
    tensor_key,
)
from fused_smoothl1.layout import Ints, broadcast_strides, collapse, contiguous_strides, extent
from fused_smoothl1.problem import (
    MASK_DTYPES,
    OPERANDS,
    TENSORS,
    Gradients,
    Needs,
    Problem,
    beta_and_inverse,
    empty_gradients,
    empty_loss,
    sum_to_operands,
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
TRITON_DTYPES = {torch.float32: tl.float32, torch.float64: tl.float64}
INDEX_DTYPES = (tl.int32, tl.int64)
# Of all pointers of the kernel: it walks through the operands and the upstream gradient; divisor
# and loss follow, then the gradients, then the workspace.
WALKED = OPERANDS + 1
GRADIENTS = WALKED + 2
WORKSPACE = GRADIENTS + OPERANDS


class Plan(NamedTuple):
    """How the kernel walks through its operands: arguments of `kernel.smooth_l1_kernel`."""

    sizes: Ints | None
    strides: tuple[Ints | None, ...]
    numel: int
    access: tuple[str | None, ...]
    aligned: bool
    lanes: int
    block: int
    is_long: bool


class Launch(NamedTuple):
    """How problems are launched whose tensors agree in their `Facts`."""

    code: Code
    programs: int
    has_workspace: bool
    """Whether several programs add up one sum."""
    walk: Arguments
    """Sizes, strides and number of elements."""
    constants: Arguments
    """What is compiled in, of the kernel's arguments."""


@untraced
def forward(
    problem: Problem, needs: Needs, *, may_be_replayed: bool = False
) -> tuple[Tensor, Gradients]:
    """Return the loss and the needed gradients for an upstream gradient of 1, in one launch."""
    if problem.reduce:
        loss = torch.empty_like(_scalar(problem.input.device, problem.loss_dtype))
    else:
        loss = empty_loss(problem)
    gradients = empty_gradients(problem, needs)
    _launch(problem, None, loss, gradients, may_be_replayed=may_be_replayed)
    return loss, gradients


def backward(problem: Problem, upstream: Tensor, needs: Needs) -> Gradients:
    """Return the needed gradients for any upstream gradient, in one launch."""
    gradients = empty_gradients(problem, needs)
    _launch(problem, upstream, None, gradients)
    return sum_to_operands(problem, gradients)


def scale(gradients: Gradients, upstream: Tensor, has_masks: bool) -> Gradients | None:
    """Multiply what `forward` returned by the upstream gradient, in place and in one launch."""
    if has_masks:
        return None
    present = [gradient for gradient in gradients if gradient is not None]
    first, numel = present[0], present[0].numel()
    # (PyTorch's product of 16 bits with float32 on a GPU would round the upstream gradient first.)
    if numel < MULTIPLY_BELOW and len(present) == 1 and first.dtype == upstream.dtype:
        first.mul_(upstream)
        return gradients
    gpu = gpu_of(first.device)
    if not gpu.is_current():
        with gpu.made_current():
            return scale(gradients, upstream, has_masks)
    block = TILE_BYTES // min(gradient.element_size() for gradient in present)
    constants = TRITON_DTYPES[upstream.dtype], INDEX_DTYPES[numel + block > INT32_MAX], block
    tensors = *gradients[:2], _in_memory(upstream)
    addresses = addresses_of(tensors)
    facts = as_facts(facts_of(tensors, addresses, gpu))
    kind = constants, numel > INT32_MAX, tensor_key(facts)
    _scale_code(gpu, *kind).launch(
        _programs(gpu, numel, block),
        gpu.stream(),
        tensors,
        addresses,
        (numel, *constants),
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
    unless_one: bool = False,
    may_be_replayed: bool = False,
) -> None:
    gpu = gpu_of(problem.input.device)
    if not gpu.is_current():
        with gpu.made_current():
            return _launch(problem, upstream, loss, gradients, unless_one, may_be_replayed)
    tensors = (*problem[:OPERANDS], upstream, *problem[OPERANDS:TENSORS], loss, *gradients)
    addresses = addresses_of(tensors)
    known = facts_of(tensors, addresses, gpu)
    launch = _launch_of(gpu, known, problem.compute_dtype, problem.reduce, unless_one)
    if launch is None or 0 in addresses:
        problem = Problem._make((*map(_in_memory, problem[:TENSORS]), *problem[TENSORS:]))
        upstream = _in_memory(upstream)
        return _launch(problem, upstream, loss, gradients, unless_one, may_be_replayed)

    stream = gpu.stream()
    workspace, workspace_addresses = NO_WORKSPACE
    if launch.has_workspace:
        workspace, workspace_addresses = _workspace(gpu, stream, launch.programs, may_be_replayed)
    try:
        numbers = *beta_and_inverse(problem), 1.0 / problem.divisor_number, problem.outside_number
        launch.code.launch(
            launch.programs,
            stream,
            tensors + workspace,
            addresses + workspace_addresses,
            (*launch.walk, *numbers, *launch.constants),
        )
    except BaseException:
        # An interrupted launch may leave a ticket drawn: later ones would add up too early.
        _kept_workspace.cache_clear()
        raise


@lru_cache(maxsize=4096)
def _launch_of(
    gpu: Gpu,
    known: FactTuples,
    compute_dtype: torch.dtype,
    reduce: bool,
    unless_one: bool,
) -> Launch | None:
    """Return how a problem is launched, or None if a tensor's values are not those in memory.

    `known` holds the facts of `_launch`'s tensors, in their order.
    """
    facts = as_facts(known)
    if any(fact is not None and fact.is_negated for fact in facts):
        return None
    walked, (*_, loss), gradients = facts[:WALKED], facts[WALKED:GRADIENTS], facts[GRADIENTS:]
    input, target = cast(list[Facts], walked[:2])
    outputs = [fact for fact in (None if reduce else loss, *gradients) if fact is not None]
    plan = _plan(
        input.shape,
        (outputs[0] if outputs else input).strides,
        tuple([fact and (fact.shape, fact.strides) for fact in walked]),
        min(input.dtype.itemsize, target.dtype.itemsize),
    )
    programs = _programs(gpu, plan.numel, plan.block)
    reduces = reduce and loss is not None
    has_workspace = reduces and programs > 1
    constants = (
        plan.access,
        tuple([fact is not None and fact.dtype in MASK_DTYPES for fact in walked]),
        reduces,
        unless_one,
        TRITON_DTYPES[compute_dtype],
        INDEX_DTYPES[plan.is_long],
        plan.aligned,
        plan.lanes,
        plan.block,
    )
    walk = plan.sizes, plan.strides, plan.numel
    integers = integer_key(walk[:2]), plan.numel > INT32_MAX
    code = _loss_code(gpu, constants, integers, tensor_key(facts), has_workspace)
    return Launch(code, programs, has_workspace, walk, constants)


@lru_cache(maxsize=4096)
def _plan(
    shape: Ints,
    order: Ints,
    operands: tuple[tuple[Ints, Ints] | None, ...],
    itemsize: int,
) -> Plan:
    """Plan the walk through operands, (shape, strides) each, in the memory order of `order`.

    `itemsize`, in bytes, is the least of input and target, and so of all outputs: it decides how
    many elements a wide access moves.
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
    steps = tuple(
        strides if kind in ("row", "vector", "strided") else None
        for kind, strides in zip(kinds, walks, strict=True)
    )
    return Plan(
        # The kernel does not read the outermost size, but Triton would compile it in.
        sizes=(1, *sizes[1:]) if needs_walk else None,
        # (Triton 3.6 confuses itself where the last item of a tuple is a tuple.)
        strides=(*steps, None),
        numel=numel,
        access=tuple(kinds),
        aligned=aligned,
        lanes=lanes,
        block=block,
        is_long=max(longest, numel + block) > INT32_MAX,
    )


# (Without a limit: there are no more of these than Triton itself keeps.)
@cache
def _loss_code(gpu: Gpu, *kind: Hashable) -> Code:
    return Code(
        gpu,
        smooth_l1_kernel,
        lambda p: (p[:WALKED], *p[WALKED:GRADIENTS], p[GRADIENTS:WORKSPACE], *p[WORKSPACE:]),
        THREADS // gpu.warp_size,
    )


@cache
def _scale_code(gpu: Gpu, *kind: Hashable) -> Code:
    return Code(gpu, scale_kernel, lambda p: (p[:2], *p[2:]), THREADS // gpu.warp_size)


def _programs(gpu: Gpu, numel: int, block: int) -> int:
    return min(-(-numel // block), gpu.multiprocessors * PROGRAMS_PER_MULTIPROCESSOR)


# Partial sums and ticket, and their addresses.
Workspace = tuple[tuple[Tensor, Tensor], tuple[int | None, ...]]
NO_WORKSPACE: Any = (None, None), (None, None)


def _workspace(gpu: Gpu, stream: int, programs: int, may_be_replayed: bool) -> Workspace:
    """Return room for one partial sum a program, and a ticket at 0.

    Launches on one stream follow each other and each leaves the ticket at 0, so they share both. A
    graph may be replayed on any stream, so a captured launch gets its own, zeroed in the graph. So
    does one that is recorded: torch.compile warms its graphs up in the memory they will use.
    """
    if may_be_replayed or gpu.is_capturing():
        return _new_workspace(gpu.device, programs)
    return _kept_workspace(gpu, stream)


# (Streams come and go. Memory that is given up here is used again on its own stream alone.)
@lru_cache(maxsize=256)
def _kept_workspace(gpu: Gpu, stream: int) -> Workspace:
    """Return a workspace for all launches on the current stream, whose handle this is.

    A new thread allocates it. This one may be allocating from a graph's memory, which nothing
    reveals: torch.compile does so around a user's operator that calls this library.
    """
    capacity = gpu.multiprocessors * PROGRAMS_PER_MULTIPROCESSOR
    if gpu.module is None:
        return _new_workspace(gpu.device, capacity)
    current = gpu.module.current_stream(gpu.device)

    def allocate() -> Workspace:
        # (To restore another stream would start the first device up, which may not be this one.)
        gpu.module.set_stream(current)
        return _new_workspace(gpu.device, capacity)

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(allocate).result()


def _new_workspace(device: torch.device, programs: int) -> Workspace:
    workspace = (
        torch.empty(programs, dtype=torch.float64, device=device),
        torch.zeros(1, dtype=torch.int32, device=device),
    )
    return workspace, addresses_of(workspace)


def _in_memory(tensor: Tensor | None) -> Tensor | None:
    """Return the tensor as its memory holds it: no zeros without memory, no pending negation."""
    if tensor is None:
        return None
    return torch.zeros_like(tensor) if has_no_memory(tensor) else tensor.resolve_neg()


@cache
def _scalar(device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return a tensor without dimensions and without memory: the quickest way to others like it."""
    scalar = torch.empty((), dtype=dtype, device=device)
    scalar.untyped_storage().resize_(0)
    return scalar
