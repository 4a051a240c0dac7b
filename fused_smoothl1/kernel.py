"""The GPU kernels, and nothing else.

One kernel computes everything this library ever needs of the loss; compile-time switches say what
is wanted. It works on tiles of `[BLOCK // LANES, LANES]` elements. A row of a tile is a *group*:
`LANES` neighbours that one thread moves with one wide access, and that share their broadcast
weight wherever the innermost dimension allows it.

How the last program finishes the reduction
-------------------------------------------
Every program stores its partial sum and then takes a ticket. The ticket is an acquire-release
atomic at GPU scope, so whoever draws the last one sees all partials: each partial is stored before
its program's release, and the last draw acquires all of them, because read-modify-writes of one
location continue each other's release sequence. Two details make that true of the machine code too.
The partial is a scalar, which one thread stores, and the barrier after it orders that store before
the atomic, whichever thread executes it. (For a tensor, which all threads store, Triton 3.6 and 3.7
put no barrier there by themselves, and 3.9 does.) The partials are read past the first-level cache,
which is not coherent between multiprocessors. The last program adds the partials in the order of
the programs, not of their arrival: the same bits at every run. It leaves the ticket at zero for the
next launch on the stream.
"""

import triton
import triton.language as tl

# Where each operand stands in the kernel's tuples; the gradients are those of the first five.
INPUT = tl.constexpr(0)
TARGET = tl.constexpr(1)
INSIDE = tl.constexpr(2)
OUTSIDE = tl.constexpr(3)
BETA = tl.constexpr(4)
UPSTREAM = tl.constexpr(5)
# How many partial sums the last program adds at a time.
PARTIALS = tl.constexpr(1024)


@triton.jit
def _clamp(x, bound):
    """Clamp to [-bound, bound]; NaN stays NaN."""
    if x.dtype == tl.float64:  # For which some GPUs have no such instruction.
        return tl.where(x > bound, bound, tl.where(x < -bound, -bound, x))
    else:
        return tl.clamp(x, -bound, bound, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _transition(beta, DTYPE: tl.constexpr, COMPUTE: tl.constexpr):
    """Return a beta that was loaded, and its inverse as computed in DTYPE.

    Both are NaN where beta is not in [0, inf).
    """
    beta = beta.to(DTYPE)
    # (The absolute value, because the inverse of -0 would be -inf.)
    beta = tl.where((beta >= 0) & (beta < float("inf")), tl.abs(beta), float("nan"))
    return beta.to(COMPUTE), (1 / beta).to(COMPUTE)


@triton.jit
def _inverse_divisor(divisor_ptr, inverse_divisor):
    """Return what the sum is multiplied by, in float64.

    It is computed where it is used: kept through a loop, it would be spilled. (It is read past the
    first-level cache only because everything after the ticket must be, which the tests check.)
    """
    if divisor_ptr is None:
        return tl.full((), inverse_divisor, tl.float64)
    else:
        return 1 / tl.load(divisor_ptr, cache_modifier=".cg").to(tl.float64)


@triton.jit
def _blocks(numel, BLOCK: tl.constexpr, TAIL: tl.constexpr):
    """Return the first block of this program and the end of its blocks.

    Whole blocks need no bounds, which keeps their accesses wide for every size. What is left at the
    end (TAIL) is done with bounds, by the program whose turn it is.
    """
    program = tl.program_id(0)
    whole = numel // BLOCK
    if TAIL:
        # (cdiv would overflow near the largest int32.)
        has_tail = whole * BLOCK < numel
        is_its_turn = program == whole % tl.num_programs(0)
        return whole, tl.where(has_tail & is_its_turn, whole + 1, whole)
    else:
        return program, whole


@triton.jit
def _offset(index, sizes, strides, STEP: tl.constexpr):
    """Return the offsets of row-major indices, in elements.

    An innermost index stands for STEP elements.
    """
    RANK: tl.constexpr = len(sizes)
    rest = index
    offset = index * 0
    for axis in tl.static_range(RANK - 1, -1, -1):
        position = rest
        if axis > 0:
            position = rest % sizes[axis]
            rest = rest // sizes[axis]
        if axis == RANK - 1:
            position *= STEP
        offset += position * strides[axis]
    return offset


@triton.jit
def _load(
    operands,
    strides,
    ACCESS: tl.constexpr,
    OPERAND: tl.constexpr,
    sizes,
    group,
    lane,
    mask,
    ALIGNED: tl.constexpr,
):
    """Load one operand's tile, or the smaller tile that broadcasts to it.

    operands, strides, ACCESS, sizes, ALIGNED: as in `smooth_l1_kernel`
    OPERAND: which of the operands
    group:   [BLOCK // LANES, 1] index of each group's first element
    lane:    [1, LANES] position in the group
    mask:    of group's shape, or [BLOCK // LANES, LANES]: which elements to load; the others are 0
    """
    LANES: tl.constexpr = lane.shape[1]
    ptr = operands[OPERAND]
    if ACCESS[OPERAND] == "scalar":
        return tl.load(ptr)
    elif ACCESS[OPERAND] == "flat":
        return tl.load(ptr + (group + lane), mask=mask, other=0)
    elif ACCESS[OPERAND] == "row":
        offset = _offset(group // LANES, sizes, strides[OPERAND], LANES)
        any_lane = tl.max(mask.to(tl.int32), 1, keep_dims=True) != 0
        return tl.load(ptr + offset, mask=any_lane, other=0)
    else:
        if ALIGNED:
            offset = _offset(group // LANES, sizes, strides[OPERAND], LANES)
            offset += lane * strides[OPERAND][len(sizes) - 1]
        else:
            offset = _offset(group + lane, sizes, strides[OPERAND], 1)
        if ACCESS[OPERAND] == "vector":
            offset = tl.max_contiguous(tl.multiple_of(offset, (1, LANES)), (1, LANES))
        return tl.load(ptr + offset, mask=mask, other=0)


@triton.jit
def _weight(
    operands,
    strides,
    ACCESS: tl.constexpr,
    MASKS: tl.constexpr,
    OPERAND: tl.constexpr,
    number,
    sizes,
    group,
    lane,
    within,
    ALIGNED: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Return what a weight multiplies by, and which of the elements within bounds it selects.

    number: what it multiplies by if its operand is absent
    within: which elements to load; the other arguments as in `_load` and `smooth_l1_kernel`
    """
    if ACCESS[OPERAND] is None:
        return tl.full((), number, COMPUTE), within
    else:
        weight = _load(operands, strides, ACCESS, OPERAND, sizes, group, lane, within, ALIGNED)
        if MASKS[OPERAND]:
            return tl.full((), 1, COMPUTE), within & (weight != 0)
        else:
            return weight.to(COMPUTE), within


@triton.jit
def _store(ptr, index, values, selected, within):
    """Store values, or 0 where not selected; nothing if the pointer is None.

    From float64 to 16 bits they are rounded to float32 on the way, as PyTorch does.
    """
    if ptr is not None:
        values = tl.where(selected, values, 0.0)
        if values.dtype == tl.float64 and ptr.dtype.element_ty.primitive_bitwidth == 16:
            values = values.to(tl.float32)
        tl.store(ptr + index, values, mask=within)


@triton.jit(do_not_specialize=["numel"])
def smooth_l1_kernel(
    operands,
    divisor_ptr,
    loss_ptr,
    gradients,
    partials_ptr,
    ticket_ptr,
    sizes,
    strides,
    numel,
    beta: tl.float64,
    inverse_beta: tl.float64,
    inverse_divisor: tl.float64,
    outside_number: tl.float64,
    ACCESS: tl.constexpr,
    MASKS: tl.constexpr,
    REDUCE: tl.constexpr,
    UNLESS_ONE: tl.constexpr,
    COMPUTE: tl.constexpr,
    INDEX: tl.constexpr,
    ALIGNED: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Loss and gradients of weighted Smooth L1 in one pass over the operands.

    Elements are numbered in the order in which the outputs lie in memory. What is None is absent,
    and the code for it is not compiled.

    operands:      pointers in the order INPUT, TARGET, INSIDE, OUTSIDE, BETA, UPSTREAM: input and
                   target of any float dtype and of the input's shape; weights of any real dtype,
                   beta and the upstream gradient of any float dtype, that broadcast to it by
                   strides of 0. Absent outside weights and beta are their numbers, whatever else
                   is absent is 1. Where beta is not in [0, inf), loss and gradients are NaN
    gradients:     pointers in the same order, [numel] each, any float dtype; None: not wanted
    loss_ptr:      any float dtype; REDUCE: one element, otherwise [numel]; None: not wanted
    divisor_ptr:   any real dtype, one element; None: `inverse_divisor` is used
    partials_ptr:  float64 [programs], workspace; None: no sum of several programs
    ticket_ptr:    int32, one element, 0 before and after; None: likewise
    sizes:         collapsed dimensions, outermost first, the innermost in groups of lanes where
                   ALIGNED; None: no operand needs them
    strides:       of each operand, in elements, one per size; None: not needed
    numel:         elements of the input
    outside_number: what the loss is multiplied by where there is no operand for it
    inverse_divisor: what the sum is multiplied by
    beta, inverse_beta: where the quadratic part ends, in [0, inf), and 1 / beta, where there is no
                   operand for it
    ACCESS:        how to reach each operand: "scalar" one element for all; "flat" dense in the
                   order of iteration; "row" one element per group; "vector" groups contiguous and
                   aligned; "strided" anything else; None: absent
    MASKS:         whether each operand selects (nonzero) instead of multiplying
    REDUCE:        the loss is the sum over all elements
    UNLESS_ONE:    write nothing if the upstream gradient is 1
    COMPUTE:       float32 or float64, the dtype of all arithmetic
    INDEX:         int32, or int64 where an offset needs it
    ALIGNED:       no group of lanes crosses the end of the innermost dimension, nor that of all
    LANES:         elements in a group, a power of two
    BLOCK:         elements in a tile, a power of two
    """
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    if ACCESS[BETA] == "scalar":
        # In float64, for the same bits as with a number.
        beta, inverse_beta = _transition(tl.load(operands[BETA]), tl.float64, COMPUTE)
    else:
        beta = tl.full((), beta, COMPUTE)
        inverse_beta = tl.full((), inverse_beta, COMPUTE)
    one = tl.full((), 1, COMPUTE)
    upstream = one
    if ACCESS[UPSTREAM] == "scalar":
        upstream = tl.load(operands[UPSTREAM]).to(COMPUTE)
    if UNLESS_ONE:
        numel = tl.where(upstream == 1, 0, numel)
    common_scale = upstream * _inverse_divisor(divisor_ptr, inverse_divisor).to(COMPUTE)

    lane = tl.arange(0, LANES)[None, :]
    first = tl.arange(0, BLOCK // LANES)[:, None] * LANES
    total = tl.zeros([BLOCK // LANES, LANES], COMPUTE)

    for TAIL in tl.static_range(2):
        start, stop = _blocks(numel, BLOCK, TAIL)
        for block in range(start, stop, programs):
            group = tl.cast(block, INDEX) * BLOCK + first
            if not TAIL:
                within = tl.full([BLOCK // LANES, 1], True, tl.int1)
            elif ALIGNED:
                within = group < numel
            else:
                within = group + lane < numel
            inside, selected_inside = _weight(
                *(operands, strides, ACCESS, MASKS, INSIDE, 1),
                *(sizes, group, lane, within, ALIGNED, COMPUTE),
            )
            outside, selected_outside = _weight(
                *(operands, strides, ACCESS, MASKS, OUTSIDE, outside_number),
                *(sizes, group, lane, within, ALIGNED, COMPUTE),
            )
            selected = selected_inside & selected_outside

            # A group is loaded if any of it is selected: a mask of single elements would split
            # the wide accesses.
            mask = within
            if MASKS[INSIDE] or MASKS[OUTSIDE]:
                mask = within & (tl.max(selected.to(tl.int32), 1, keep_dims=True) != 0)

            input = _load(operands, strides, ACCESS, INPUT, sizes, group, lane, mask, ALIGNED)
            target = _load(operands, strides, ACCESS, TARGET, sizes, group, lane, mask, ALIGNED)
            difference = input.to(COMPUTE) - target.to(COMPUTE)
            x = inside * difference

            if ACCESS[BETA] is None or ACCESS[BETA] == "scalar":
                own_beta, own_inverse = beta, inverse_beta
            else:
                loaded = _load(operands, strides, ACCESS, BETA, sizes, group, lane, mask, ALIGNED)
                own_beta, own_inverse = _transition(loaded, COMPUTE, COMPUTE)

            # The formula. At 0 with beta 0 the product would be 0 times inf.
            at_0 = 0.0 if ACCESS[BETA] is None else 0 * own_beta  # NaN where beta is.
            slope = tl.where(x == 0, at_0, _clamp(x * own_inverse, one))
            loss = slope * (x - 0.5 * _clamp(x, own_beta))

            if ACCESS[UPSTREAM] is None or ACCESS[UPSTREAM] == "scalar":
                own_scale = common_scale
            else:
                own_scale = _load(
                    operands, strides, ACCESS, UPSTREAM, sizes, group, lane, mask, ALIGNED
                ).to(COMPUTE)
            grad_x = slope * outside * own_scale

            index = group + lane
            _store(gradients[INPUT], index, grad_x * inside, selected, within)
            _store(gradients[TARGET], index, -(grad_x * inside), selected, within)
            _store(gradients[INSIDE], index, grad_x * difference, selected, within)
            _store(gradients[OUTSIDE], index, own_scale * loss, selected, within)
            if gradients[BETA] is not None:
                # (At 0 with beta 0 the loss is linear, though its slope is 0.)
                square = tl.where(x == 0, tl.where(own_beta == 0, 1.0, at_0), slope * slope)
                grad_beta = -0.5 * square * outside * own_scale
                _store(gradients[BETA], index, grad_beta, selected, within)
            if REDUCE:
                total += tl.where(selected, outside * loss, 0.0)
            else:
                _store(loss_ptr, index, outside * loss, selected, within)

    if REDUCE:
        partial = tl.sum(tl.sum(total, 1), 0).to(tl.float64)
        if ticket_ptr is None:
            tl.store(loss_ptr, partial * _inverse_divisor(divisor_ptr, inverse_divisor))
        else:
            tl.store(partials_ptr + program, partial)
            tl.debug_barrier()
            ticket = tl.atomic_add(ticket_ptr, 1, sem="acq_rel", scope="gpu")
            if ticket == programs - 1:
                position = tl.arange(0, PARTIALS)
                sums = tl.zeros([PARTIALS], tl.float64)
                for offset in range(0, programs, PARTIALS):
                    sums += tl.load(
                        partials_ptr + offset + position,
                        mask=offset + position < programs,
                        other=0,
                        cache_modifier=".cg",
                    )
                tl.store(loss_ptr, tl.sum(sums, 0) * _inverse_divisor(divisor_ptr, inverse_divisor))
                tl.store(ticket_ptr, 0)


@triton.jit(do_not_specialize=["numel"])
def scale_kernel(
    gradients,
    upstream_ptr,
    numel,
    COMPUTE: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Multiply gradients in place by the upstream gradient; touch nothing if that is 1.

    gradients:    of input and target, pointers, [numel] each, any float dtype; None: absent
    upstream_ptr: float32 or float64, one element
    numel:        elements of each gradient
    COMPUTE:      float32 or float64, the dtype of the product
    INDEX:        int32, or int64 where an offset needs it
    BLOCK:        elements in a tile, a power of two
    """
    upstream = tl.load(upstream_ptr).to(COMPUTE)
    numel = tl.where(upstream == 1, 0, numel)
    for TAIL in tl.static_range(2):
        start, stop = _blocks(numel, BLOCK, TAIL)
        for block in range(start, stop, tl.num_programs(0)):
            index = tl.cast(block, INDEX) * BLOCK + tl.arange(0, BLOCK)
            within = index < numel if TAIL else tl.full([BLOCK], True, tl.int1)
            for OPERAND in tl.static_range(2):
                ptr = gradients[OPERAND]
                if ptr is not None:
                    gradient = tl.load(ptr + index, mask=within)
                    _store(ptr, index, gradient.to(COMPUTE) * upstream, True, within)
