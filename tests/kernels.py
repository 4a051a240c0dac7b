"""Kernels that only tests need, to look into the library's. To be imported where Triton is."""

import triton
import triton.language as tl

from fused_smoothl1.kernel import _blocks


@triton.jit(do_not_specialize=["numel"])
def blocks_kernel(found_ptr, numel, BLOCK: tl.constexpr):
    """Store the first block and the end of the blocks of each program.

    found_ptr: int64 [programs, 2, 2]: of the whole blocks, then of the tail
    numel:     elements that the blocks must cover
    BLOCK:     elements in a block
    """
    for TAIL in tl.static_range(2):
        start, stop = _blocks(numel, BLOCK, TAIL)
        tl.store(found_ptr + tl.program_id(0) * 4 + TAIL * 2, start)
        tl.store(found_ptr + tl.program_id(0) * 4 + TAIL * 2 + 1, stop)


@triton.jit
def copy_kernel(input_ptr, found_ptr, first, step, RUN: tl.constexpr, MULTIPLE: tl.constexpr):
    """Store the eight elements from `first` on that are so many steps apart.

    RUN, MULTIPLE: what is said of the offsets: runs of so many neighbours start at a multiple
    """
    position = tl.arange(0, 8)
    offset = tl.max_contiguous(tl.multiple_of(first + position * step, MULTIPLE), RUN)
    tl.store(found_ptr + position, tl.load(input_ptr + offset))
