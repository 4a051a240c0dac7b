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
