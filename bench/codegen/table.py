"""`python -m bench codegen`: the machine code of every kind of launch, without a GPU.

Each kernel is asked for through the public function and compiled as for a launch, and its machine
code is read.
"""

import argparse
import json
import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from typing import TYPE_CHECKING, Any, NamedTuple
from unittest import mock

from bench.codegen import assembly
from bench.codegen.calls import LONG_CALL, calls
from bench.codegen.crosscompile import UnknownTargetError, launches
from bench.codegen.datasheets import issue_shares
from bench.stand_in import ENVIRONMENT, TARGETS

# Only the workers load PyTorch and Triton: the parent process, which waits for them, needs neither.
if TYPE_CHECKING:
    from torch import Tensor

CALLS = [*calls(rows=16385), LONG_CALL]  # of several tiles, and a tail
PROCESSES = 2
WIDEST_BITS = 128
HEADINGS = ("loads", "full", "stores", "full", "vectorized", "atomics", "ticket")
EXPLANATION = """\
Registers a thread; shared memory in bytes a program; instructions of the loop over whole tiles, and
how many of them a warp issues for each element. Issue slots: the share of a GPU's that this takes
while its memory runs at full speed, from `bench/codegen/datasheets.py`; with masks, first if they
select everything, then if they select nothing, which spares memory the other operands.
Loads and stores: how many of how many bits a thread makes to global memory in one iteration of that
loop. Full: those of dense operands, each as wide as the layout allows. Ticket: the steps around the
atomic operation that ends a reduction, in their order."""


@dataclass
class Kernel:
    """One kernel on one target. What is counted in the hot loop is counted a thread."""

    target: str
    dtype: str = ""
    call: str = ""  # which one asked for it, and what for
    unknown: str | None = None  # why Triton cannot compile for this target; else there is the rest
    registers: int = 0  # a thread's (vector) registers
    spills: int = 0  # accesses to spilled registers, or registers spilled; 0 if there are none
    stack: int = 0  # bytes of it a thread; without spills they are reserved and not used
    shared: int = 0  # bytes of shared memory a program
    threads: int = 0  # in a program
    instructions: int = 0  # in the hot loop
    per_element: float = 0.0  # of them, for each element, as a warp issues them
    # `datasheets.issue_shares`, if masks select everything and if they select nothing
    issue_shares: dict[str, tuple[float, float]] = field(default_factory=dict)
    access: str = ""  # how each operand is reached; "-": absent
    loads: dict[int, int] = field(default_factory=dict)  # in the hot loop, by width in bits
    stores: dict[int, int] = field(default_factory=dict)
    full_loads: dict[int, int] = field(default_factory=dict)  # dense ones, as wide as can be
    full_stores: dict[int, int] = field(default_factory=dict)
    vectorized: bool = False  # the dense operands are accessed so, and nothing more often than that
    atomics: list[str] = field(default_factory=list)  # opcodes
    ticket: list[str] = field(default_factory=list)  # `assembly.ticket_steps`


class Compiled(NamedTuple):
    """What the compiler made of a kernel, to be read."""

    kernel: Kernel
    hash: str = ""
    binary: Any = None  # NVIDIA's cubin, or AMD's assembly text
    other_loads: int = 0  # in the hot loop, which the operands need that are not dense
    elements: float = 1.0  # of a warp, in an iteration of the hot loop
    bytes_moved: tuple[float, float] = (1.0, 1.0)  # for each element; as `issue_shares`


def main(arguments: Sequence[str]) -> int:
    """Compile everything and print it; return 1 if a dense loop is not full width or spills."""
    parser = argparse.ArgumentParser(prog="python -m bench codegen", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print it as JSON, nothing else")
    as_json = parser.parse_args(arguments).json
    kernels = compile_all() if as_json else _show()
    if as_json:
        print(json.dumps([asdict(kernel) for kernel in kernels], indent=1))
    return int(any(k.unknown is None and (k.spills or not k.vectorized) for k in kernels))


def compile_all() -> list[Kernel]:
    """Compile all calls for all targets."""
    # Workers are fresh interpreters. Triton reads this when it is imported.
    with (
        mock.patch.dict(os.environ, ENVIRONMENT),
        ProcessPoolExecutor(PROCESSES, mp_context=get_context("spawn")) as pool,
    ):
        compiling = {
            target: [pool.submit(_compile, target, number) for number in range(len(CALLS))]
            for target in TARGETS
        }
        reading = []
        for target, futures in compiling.items():
            # Each kernel once, and all of a target together: NVIDIA's disassembler takes long to
            # start.
            own: dict[str, Compiled] = {}
            for compiled in (compiled for future in futures for compiled in future.result()):
                own.setdefault(compiled.hash, compiled)
            reading.append(pool.submit(_read, target, list(own.values())))
        return [kernel for future in reading for kernel in future.result()]


def _compile(target: str, number: int) -> list[Compiled]:
    """Compile one of the calls for a target. Runs in a worker."""
    import torch

    from fused_smoothl1 import smooth_l1_loss

    call = CALLS[number]

    def differentiate() -> None:
        operands, options = call.bind(
            lambda *shape, dtype: torch.empty(shape, dtype=getattr(torch, dtype))
        )
        loss = smooth_l1_loss(*operands, **options)
        tensors = [t for t in (*operands, options.get("beta")) if isinstance(t, torch.Tensor)]
        wanted = [tensor for tensor in tensors if tensor.requires_grad]
        if wanted:
            upstream = torch.empty_like(loss)
            upstream = call.upstream(upstream) if loss.dim() else upstream
            torch.autograd.grad(loss, wanted, upstream)

    try:
        launched = launches(differentiate, target)
    except UnknownTargetError as error:
        return [Compiled(Kernel(target, unknown=str(error)))]
    compiled = []
    for arguments, result in launched:
        threads = result.metadata.num_warps * TARGETS[target][2]
        full_loads, full_stores, other_loads = _full_width(arguments, threads)
        kernel = Kernel(
            target,
            call.dtype,
            f"{call.name}: {_role(arguments)}",
            shared=result.metadata.shared,
            threads=threads,
            access=_access(arguments),
            full_loads=_widest_first(full_loads),
            full_stores=_widest_first(full_stores),
        )
        binary = result.asm["amdgcn" if "amdgcn" in result.asm else "cubin"]
        elements = arguments["BLOCK"] / result.metadata.num_warps
        moved = _bytes_moved(arguments)
        compiled.append(Compiled(kernel, result.hash, binary, other_loads, elements, moved))
    return compiled


def _access(arguments: dict[str, Any]) -> str:
    """Say how each operand is reached."""
    if "ACCESS" not in arguments:
        return ""
    pairs = zip(arguments["ACCESS"], arguments["MASKS"], strict=True)
    return " ".join((kind or "-") + ("-mask" if is_mask else "") for kind, is_mask in pairs)


def _role(arguments: dict[str, Any]) -> str:
    """Say what a launch is for."""
    if "ACCESS" not in arguments:
        return "scale"
    if arguments["UNLESS_ONE"]:
        return "recompute"
    return "backward" if arguments["loss_ptr"] is None else "forward"


def _read(target: str, compiled: list[Compiled]) -> list[Kernel]:
    """Read the machine code for a target, and fill in what it does. Runs in a worker."""
    if compiled[0].kernel.unknown is not None:
        return [compiled[0].kernel]
    arch = TARGETS[target][1]
    binaries = [one.binary for one in compiled]
    if isinstance(arch, int):
        codes = assembly.read_cubins(binaries, arch)
    else:
        codes = [assembly.read_amdgcn(binary) for binary in binaries]
    kernels = []
    for (kernel, _, _, other_loads, elements, moved), code in zip(compiled, codes, strict=True):
        loop = assembly.hot_loop(code)
        loads, stores = assembly.loads(loop), assembly.stores(loop)
        kernel.registers, kernel.spills, kernel.stack = code.registers, code.spills, code.stack
        kernel.instructions = len(loop)
        # (AMD's scalar instructions are issued beside those of its vector units.)
        issued = [instruction for instruction in loop if not instruction.opcode.startswith("s_")]
        kernel.per_element = len(issued) / elements
        most, least = (issue_shares(target, kernel.per_element, each) for each in moved)
        kernel.issue_shares = {gpu: (most[gpu], least[gpu]) for gpu in most}
        kernel.loads, kernel.stores = _widest_first(loads), _widest_first(stores)
        kernel.vectorized = (
            bool(loop)
            and _is_full_width(loads, kernel.full_loads, other_loads)
            and _is_full_width(stores, kernel.full_stores, 0)
        )
        kernel.atomics, kernel.ticket = assembly.atomics(code), assembly.ticket_steps(code)
        kernels.append(kernel)
    return kernels


def _full_width(arguments: dict[str, Any], threads: int) -> tuple[Counter[int], Counter[int], int]:
    """Return the dense operands' loads and stores at full width, and how many loads others need.

    Per thread and iteration, by width in bits. A group of lanes is one access if it has at most 16
    bytes, and if the tensor's first address is divisible by 16; otherwise every element is.
    """
    block = arguments["BLOCK"]
    # A kernel without groups has neighbours only.
    lanes = arguments.get("LANES", WIDEST_BITS)
    loads: Counter[int] = Counter()
    stores: Counter[int] = Counter()
    others = 0

    def add(to: Counter[int], tensor: "Tensor") -> None:
        bits = 8 * tensor.element_size()
        width = min(WIDEST_BITS, lanes * bits) if tensor.data_ptr() % 16 == 0 else bits
        to[width] += block * bits // (threads * width)

    for tensor in arguments["gradients"]:
        if tensor is not None:
            add(stores, tensor)
    if "ACCESS" not in arguments:
        return stores, stores, others
    for tensor, access in zip(arguments["operands"], arguments["ACCESS"], strict=True):
        if access in ("flat", "vector"):
            add(loads, tensor)
        elif access == "row":
            others += max(block // lanes // threads, 1)
        elif access == "strided":
            others += block // threads
    if arguments["loss_ptr"] is not None and not arguments["REDUCE"]:
        add(stores, arguments["loss_ptr"])
    return loads, stores, others


def _bytes_moved(arguments: dict[str, Any]) -> tuple[float, float]:
    """Return how many bytes memory moves for each element: if masks select everything, or nothing.

    What is read again from a cache is not counted.
    """
    stores = [t for t in arguments["gradients"] if t is not None]
    if "ACCESS" not in arguments:  # It reads what it writes.
        moved = sum(2 * t.element_size() for t in stores)
        return moved, moved
    if not arguments["REDUCE"] and arguments["loss_ptr"] is not None:
        stores.append(arguments["loss_ptr"])
    operands = zip(arguments["operands"], arguments["MASKS"], strict=True)
    present = [(tensor, is_mask) for tensor, is_mask in operands if tensor is not None]
    has_masks = any(arguments["MASKS"])

    def bytes_of(tensors: list["Tensor"]) -> float:
        held: list[int] = [
            min(t.untyped_storage().nbytes(), t.numel() * t.element_size()) for t in tensors
        ]
        return float(sum(t.element_size() for t in stores) + sum(held) / arguments["numel"])

    return (
        bytes_of([tensor for tensor, _ in present]),
        bytes_of([tensor for tensor, is_mask in present if is_mask or not has_masks]),
    )


def _is_full_width(accesses: dict[int, int], full: dict[int, int], others: int) -> bool:
    """Whether dense operands are moved at full width, or a wider one, and nothing is split."""

    def bits_from(width: int, counted: dict[int, int]) -> int:
        return sum(w * number for w, number in counted.items() if w >= width)

    return sum(accesses.values()) <= sum(full.values()) + others and all(
        bits_from(width, accesses) >= bits_from(width, full) for width in full
    )


def _widest_first(accesses: Counter[int]) -> dict[int, int]:
    return dict(sorted(accesses.items(), reverse=True))


def _show() -> list[Kernel]:
    """Compile, and print the tables."""
    # Imported here so that --json, which the tests read, needs no more than the library.
    from bench.report import console, table

    out = console()
    with out.status("compiling ..."):
        kernels = compile_all()
    numbers = ("registers", "spills", "stack", "shared", "instructions")
    more = ("an element", "issue slots")
    accesses = ("loads", "full_loads", "stores", "full_stores")
    for target in TARGETS:
        own = [kernel for kernel in kernels if kernel.target == target]
        if own[0].unknown is not None:
            out.print(f"\n{target}: not known to the installed Triton ({own[0].unknown})")
            continue
        filled = table(target, ["dtype", "call"], [*numbers, *more, *HEADINGS])
        for kernel in own:
            filled.add_row(
                kernel.dtype,
                kernel.call,
                *(str(getattr(kernel, name)) for name in numbers),
                f"{kernel.per_element:.2f}",
                ", ".join(_shares(*share) for share in kernel.issue_shares.items()) or "-",
                *(
                    " ".join(f"{count}x{width}" for width, count in counted.items()) or "-"
                    for counted in (getattr(kernel, name) for name in accesses)
                ),
                "yes" if kernel.vectorized else "NO",
                str(len(kernel.atomics) or "-"),
                ", ".join(kernel.ticket) or "-",
                style="bold red" if kernel.spills or not kernel.vectorized else None,
            )
        out.print(filled)
    out.print(EXPLANATION)
    return kernels


def _shares(gpu: str, shares: tuple[float, float]) -> str:
    return f"{gpu} {' to '.join(dict.fromkeys(f'{share:.0%}' for share in shares))}"
