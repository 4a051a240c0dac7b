"""`python -m bench codegen`: the machine code of every kind of launch, without a GPU.

Each kernel is asked for through the public function and compiled as for a launch, and its machine
code is read.
"""

import argparse
import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from multiprocessing import get_context
from typing import TYPE_CHECKING, Any
from unittest import mock

from bench import assembly
from bench.crosscompile import TARGETS, Launch, UnknownTargetError, launches, translated_once
from bench.variants import Variant, variants

# Only the workers load PyTorch and Triton: who shows the table waits for them and not for itself.
if TYPE_CHECKING:
    from torch import Tensor

PROCESSES = 2
WIDEST_BITS = 128
OPERANDS = ("input", "target", "inside", "outside", "upstream")
GRADIENTS = ("grad_input", "grad_target", "grad_inside", "grad_outside")


@dataclass
class Row:
    """One kernel variant on one target. What is counted in the hot loop is counted a thread."""

    target: str
    dtype: str = ""
    variant: str = ""
    unknown: str | None = None
    """Why the installed Triton cannot compile for this target; then there is nothing else."""
    registers: int = 0
    """A thread's (vector) registers."""
    spills: int = 0
    """Accesses to spilled registers, or registers spilled; 0 if and only if there are none."""
    stack: int = 0
    """Bytes of stack a thread; without spills they are reserved and not used."""
    shared: int = 0
    """Bytes of shared memory a program."""
    threads: int = 0
    """Threads a program."""
    access: str = ""
    """How the operands are reached, in the order of `OPERANDS`; "-" without one."""
    loads: dict[str, int] = field(default_factory=dict)
    """Loads from global memory in the hot loop, by width in bits."""
    stores: dict[str, int] = field(default_factory=dict)
    full_loads: dict[str, int] = field(default_factory=dict)
    """What the loads of dense operands are where each is as wide as the layout allows."""
    full_stores: dict[str, int] = field(default_factory=dict)
    vectorized: bool = False
    """The dense operands are accessed so, and nothing is accessed more often than that needs."""
    atomics: list[str] = field(default_factory=list)
    """Opcodes of atomic operations."""
    ticket: list[str] = field(default_factory=list)
    """The steps of the reduction's last part in their order, see `assembly.ticket_steps`."""


@dataclass(frozen=True)
class Kernel:
    """What was compiled, with its machine code still to be read."""

    row: Row
    hash: str = ""
    binary: Any = None
    """NVIDIA's cubin, or AMD's assembly text."""
    full_loads: Counter[int] = field(default_factory=Counter)
    full_stores: Counter[int] = field(default_factory=Counter)
    others: int = 0
    """How many loads in the hot loop the operands need that are not dense."""


def main(arguments: Sequence[str]) -> int:
    """Compile everything and print it; return 1 if a dense loop is not full width or spills."""
    parser = argparse.ArgumentParser(prog="python -m bench codegen", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print the rows as JSON, nothing else")
    options = parser.parse_args(arguments)
    if options.json:
        rows = compile_all(lambda done, tasks: None)
        print(json.dumps([asdict(row) for row in rows], indent=1))
    else:
        rows = _show()
    return int(any(row.unknown is None and (row.spills or not row.vectorized) for row in rows))


def compile_all(progress: Callable[[int, int], None]) -> list[Row]:
    """Compile all variants for all targets; tell `progress` how many steps of how many are done."""
    # Workers are fresh interpreters. Triton reads this when it is imported.
    environment = {"FUSED_SMOOTHL1_BACKEND": "triton", "TRITON_INTERPRET": "0"}
    targets: dict[str, list[str]] = {}
    for target, (backend, _, _) in TARGETS.items():
        targets.setdefault(backend, []).append(target)
    numbers = range(len(list(variants())))
    steps = len(targets) * len(numbers) + len(TARGETS)
    done = 0

    def count(_: Future[Any]) -> None:
        nonlocal done
        done += 1
        progress(done, steps)

    with (
        mock.patch.dict(os.environ, environment),
        ProcessPoolExecutor(PROCESSES, mp_context=get_context("spawn")) as pool,
    ):

        def submit(function: Callable[..., Any], *arguments: Any) -> Future[Any]:
            future = pool.submit(function, *arguments)
            future.add_done_callback(count)
            return future

        compiled = {
            backend: [submit(_compile, alike, number) for number in numbers]
            for backend, alike in targets.items()
        }
        read: list[Future[list[Row]]] = []
        for backend, futures in compiled.items():
            kernels = [kernel for future in futures for kernel in future.result()]
            # One call of NVIDIA's disassembler for all of a target: it takes long to start.
            read += [submit(_read, target, _unique(target, kernels)) for target in targets[backend]]
        return [row for future in read for row in future.result()]


def _unique(target: str, kernels: list[Kernel]) -> list[Kernel]:
    """Return the target's kernels, each once."""
    by_hash: dict[str, Kernel] = {}
    for kernel in kernels:
        if kernel.row.target == target:
            by_hash.setdefault(kernel.hash, kernel)
    return list(by_hash.values())


def _compile(targets: list[str], number: int) -> list[Kernel]:
    """Compile one of the variants for targets of one backend. Runs in a worker."""
    variant = list(variants())[number]
    kernels = []
    with translated_once():
        for target in targets:
            try:
                found = launches(variant.call, target)
            except UnknownTargetError as error:
                kernels.append(Kernel(Row(target, unknown=str(error))))
            else:
                kernels += [_kernel(target, variant, launch) for launch in found]
    return kernels


def _kernel(target: str, variant: Variant, launch: Launch) -> Kernel:
    arguments, compiled = launch
    threads = compiled.metadata.num_warps * TARGETS[target][2]
    row = Row(
        target,
        variant.dtype,
        f"{variant.name}: {_role(arguments)}",
        shared=compiled.metadata.shared,
        threads=threads,
        access=" ".join(arguments.get(name.upper()) or "-" for name in OPERANDS),
    )
    binary = compiled.asm["amdgcn" if "amdgcn" in compiled.asm else "cubin"]
    return Kernel(row, compiled.hash, binary, *_full_width(arguments, threads))


def _role(arguments: dict[str, Any]) -> str:
    """Say what a launch is for."""
    if "INPUT" not in arguments:
        return "rescale"
    if arguments["UNLESS_ONE"]:
        return "refresh"
    return "backward" if arguments["loss_ptr"] is None else "forward"


def _read(target: str, kernels: list[Kernel]) -> list[Row]:
    """Read the machine code for a target. Runs in a worker."""
    if kernels[0].row.unknown is not None:
        return [kernels[0].row]
    arch = TARGETS[target][1]
    binaries = [kernel.binary for kernel in kernels]
    if isinstance(arch, int):
        codes = assembly.read_cubins(binaries, arch)
    else:
        codes = [assembly.read_amdgcn(binary) for binary in binaries]
    return [_complete(kernel, code) for kernel, code in zip(kernels, codes, strict=True)]


def _complete(kernel: Kernel, code: assembly.Code) -> Row:
    """Fill the row with what its machine code does."""
    loop = assembly.hot_loop(code)
    loads, stores = assembly.loads(loop), assembly.stores(loop)
    full_loads, full_stores = kernel.full_loads, kernel.full_stores
    return replace(
        kernel.row,
        registers=code.registers,
        spills=code.spills,
        stack=code.stack,
        loads=_readable(loads),
        stores=_readable(stores),
        full_loads=_readable(full_loads),
        full_stores=_readable(full_stores),
        vectorized=bool(loop)
        and _is_full_width(loads, full_loads, kernel.others)
        and _is_full_width(stores, full_stores, 0),
        atomics=assembly.atomics(code),
        ticket=assembly.ticket_steps(code),
    )


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

    for name in OPERANDS if "INPUT" in arguments else ():
        tensor, access = arguments[f"{name}_ptr"], arguments[name.upper()]
        if access in ("flat", "vector"):
            add(loads, tensor)
        elif access == "row":
            others += max(block // lanes // threads, 1)
        elif access == "strided":
            others += block // threads
    for name in GRADIENTS:
        if arguments.get(f"{name}_ptr") is not None:
            add(stores, arguments[f"{name}_ptr"])
    if "INPUT" not in arguments:
        loads = stores
    elif arguments["loss_ptr"] is not None and not arguments["REDUCE"]:
        add(stores, arguments["loss_ptr"])
    return loads, stores, others


def _is_full_width(accesses: Counter[int], full: Counter[int], others: int) -> bool:
    """Whether dense operands are moved at full width, or a wider one, and nothing is split."""

    def bits_from(width: int, counted: Counter[int]) -> int:
        return sum(w * number for w, number in counted.items() if w >= width)

    return accesses.total() <= full.total() + others and all(
        bits_from(width, accesses) >= bits_from(width, full) for width in full
    )


def _readable(accesses: Counter[int]) -> dict[str, int]:
    return {str(width): accesses[width] for width in sorted(accesses, reverse=True)}


def _show() -> list[Row]:
    """Compile under a progress bar and print the tables."""
    # Imported here so that --json, which the tests read, needs no more than the library.
    from rich.progress import Progress

    from bench.table import console

    out = console()
    with Progress(console=out, transient=True, disable=not out.is_terminal) as bar:
        task = bar.add_task("compiling")
        rows = compile_all(lambda done, tasks: bar.update(task, completed=done, total=tasks))
    for target in TARGETS:
        out.print(_table(target, [row for row in rows if row.target == target]))
    out.print(
        "Registers a thread; shared memory in bytes a program. Loads and stores: how many of how\n"
        "many bits a thread makes to global memory in one iteration of the loop over whole tiles.\n"
        "Full: those of dense operands, each as wide as the layout allows. Ticket: the steps\n"
        "around the atomic operation that ends a reduction, in their order.",
        highlight=False,
    )
    return rows


def _table(target: str, rows: list[Row]) -> Any:
    from rich import box
    from rich.table import Table

    if rows[0].unknown is not None:
        return f"\n{target}: not known to the installed Triton ({rows[0].unknown})"
    table = Table(title=target, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for heading in ("dtype", "variant"):
        table.add_column(heading, overflow="fold")
    for heading in ("registers", "spills", "stack", "shared"):
        table.add_column(heading, justify="right", overflow="fold")
    for heading in ("loads", "full", "stores", "full", "vectorized", "atomics", "ticket"):
        table.add_column(heading, overflow="fold")
    for row in rows:
        cells = [_listed(c) for c in (row.loads, row.full_loads, row.stores, row.full_stores)]
        table.add_row(
            row.dtype,
            row.variant,
            str(row.registers),
            str(row.spills),
            str(row.stack),
            str(row.shared),
            *cells,
            "yes" if row.vectorized else "NO",
            str(len(row.atomics) or "-"),
            ", ".join(row.ticket) or "-",
            style="bold red" if row.spills or not row.vectorized else None,
        )
    return table


def _listed(accesses: dict[str, int]) -> str:
    return " ".join(f"{count}x{width}" for width, count in accesses.items()) or "-"
