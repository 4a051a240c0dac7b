"""`python -m bench codegen`: the machine code of every kernel variant, without a GPU.

Every variant is asked for through the public function and specialized and compiled as a launch
would, by the launcher's and Triton's own code: a driver that only knows its target stands in for
the GPU's, and what would be launched is compiled instead. Then the machine code is read.
"""

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from bench import assembly
from fused_smoothl1 import smooth_l1_loss

PROCESSES = 2
# The variants of a target are compiled in so many parts, so that the processes end together.
PARTS = 2
TARGETS: dict[str, tuple[str, int | str, int]] = {
    "sm_75": ("cuda", 75, 32),
    "sm_80": ("cuda", 80, 32),
    "sm_86": ("cuda", 86, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "sm_120": ("cuda", 120, 32),
    "gfx90a": ("hip", "gfx90a", 64),
    "gfx942": ("hip", "gfx942", 64),
    "gfx1100": ("hip", "gfx1100", 32),
}
"""Triton's backend, architecture, and threads in a warp."""
ROWS = 16385  # of 4 coordinates: several tiles, and a tail
ODD = 65539  # elements of a flat tensor, divisible by nothing that a wide access needs
LONG = 2**31 + ODD  # more than an int32 can count
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


class Launch(NamedTuple):
    """One launch that was compiled instead."""

    dtype: str
    variant: str
    arguments: dict[str, Any]
    compiled: Any


class Variant(NamedTuple):
    """A call whose launches are variants."""

    dtype: str
    name: str
    call: Callable[[], object]


def main(arguments: Sequence[str] | None = None) -> int:
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
    """Compile all variants for all targets; tell `progress` how many tasks of how many are done."""
    # Workers are fresh interpreters. Triton reads this when it is imported.
    environment = {"FUSED_SMOOTHL1_BACKEND": "triton", "TRITON_INTERPRET": "0"}
    tasks = [(target, part) for target in TARGETS for part in range(PARTS)]
    with (
        mock.patch.dict(os.environ, environment),
        ProcessPoolExecutor(PROCESSES, mp_context=get_context("spawn")) as pool,
    ):
        futures: list[Future[list[Row]]] = [pool.submit(_compile_part, *task) for task in tasks]
        for done, _ in enumerate(as_completed(futures), start=1):
            progress(done, len(futures))
        rows = [row for future in futures for row in future.result()]
    unique = {(row.target, row.dtype, row.variant): row for row in rows}
    return list(unique.values())


def variants() -> Iterator[Variant]:
    """Yield calls that between them make every kind of launch.

    Most are in float32; what another type changes is repeated in it.
    """
    yield _dense(torch.float32)
    yield _elementwise(torch.float32)
    yield _row_mask(torch.float32)
    yield from _layout_variants()
    yield from _launch_variants()
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        yield _dense(dtype)
    for dtype in (torch.bfloat16, torch.float16):
        yield _row_mask(dtype)


def _dense(dtype: torch.dtype) -> Variant:
    def call() -> None:
        _differentiate(*(_empty(ODD, dtype=dtype) for _ in range(4)))

    return Variant(_name(dtype), "dense", call)


def _elementwise(dtype: torch.dtype) -> Variant:
    def call() -> None:
        _differentiate(*(_empty(ODD, dtype=dtype) for _ in range(4)), reduction="none")

    return Variant(_name(dtype), "dense, elementwise", call)


def _row_mask(dtype: torch.dtype) -> Variant:
    def call() -> None:
        boxes = (_empty(ROWS, 4, dtype=dtype) for _ in range(2))
        _differentiate(*boxes, _empty(ROWS, 1, dtype=torch.bool))

    return Variant(_name(dtype), "row mask", call)


def _layout_variants() -> Iterator[Variant]:
    maps = (2, 4, 33, 31)
    last = torch.channels_last

    def variant(name: str, *operands: Tensor) -> Variant:
        return Variant(_name(torch.float32), name, lambda: _differentiate(*operands))

    boxes = [_empty(ROWS, 4) for _ in range(2)]
    yield variant("element mask", *boxes, _empty(ROWS, 4, dtype=torch.uint8))
    yield variant("row and column weights", *boxes, _empty(1, 4), _empty(ROWS, 1))
    yield variant("rows of 5", *(_empty(ROWS, 5) for _ in range(2)), _empty(5), _empty(ROWS, 1))
    yield variant(
        "channels_last, pixel weights",
        *(_empty(*maps).to(memory_format=last) for _ in range(2)),
        _empty(2, 1, 33, 31),
    )
    yield variant("planes, pixel weights", _empty(*maps), _empty(*maps), _empty(2, 1, 33, 31))
    yield variant("transposed target", _empty(64, 1024), _empty(1024, 64).t())
    yield variant("slice of columns", _empty(ROWS, 4), _empty(ROWS, 8)[:, :4])
    yield variant("unaligned", *(_empty(ODD + 1)[1:] for _ in range(2)))


def _launch_variants() -> Iterator[Variant]:
    def pair(numel: int = ODD) -> list[Tensor]:
        return [_empty(numel) for _ in range(2)]

    def variant(name: str, call: Callable[[], object]) -> Variant:
        return Variant(_name(torch.float32), name, call)

    def twice() -> None:
        input, target = pair()
        loss = smooth_l1_loss(input.requires_grad_(), target)
        for _ in range(2):
            loss.backward(retain_graph=True)

    yield variant("dense, no weights", lambda: _differentiate(*pair()))
    yield variant("dense, second backward", twice)
    yield variant("dense, both gradients", lambda: _differentiate(*pair(), wanted=2))
    yield variant("dense, all gradients", lambda: _differentiate(*pair(), *pair(), wanted=4))
    yield variant("dense, no gradient", lambda: _differentiate(*pair(), wanted=0))
    yield variant(
        "dense, normalizer",
        lambda: _differentiate(*pair(), reduction="sum", normalizer=torch.ones(())),
    )
    yield variant("dense, one program", lambda: _differentiate(*pair(numel=1000)))
    yield variant("dense, large", lambda: _differentiate(*pair(numel=(1 << 20) + 3)))
    # (Memory that is never touched is never there.)
    yield variant("dense, long", lambda: _differentiate(*pair(numel=LONG)))
    yield Variant(
        "float32, bfloat16",
        "dense, mixed",
        lambda: _differentiate(_empty(ODD), _empty(ODD, dtype=torch.bfloat16)),
    )


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype)


def _differentiate(*operands: Tensor, wanted: int = 1, **options: Any) -> None:
    """Ask for the loss and for the gradients of the first operands."""
    sources = [operand.detach().requires_grad_() for operand in operands[:wanted]]
    loss = smooth_l1_loss(*sources, *operands[wanted:], **options)
    if sources:
        torch.autograd.grad(loss, sources, torch.empty_like(loss))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class _Driver:
    """What Triton asks of a driver before it launches."""

    def __init__(self, target: Any, device: int) -> None:
        self.target = target
        self.device = device

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        # Triton keeps what it compiled by device: another one for every target.
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


class _Recorder:
    """Stands in for a kernel: compiles what would be launched."""

    def __init__(self, kernel: Any, launches: list[tuple[dict[str, Any], Any]]) -> None:
        self.kernel = kernel
        self.launches = launches

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def compile(*arguments: Any, **options: Any) -> None:
            compiled = self.kernel.warmup(*arguments, grid=grid, **options)
            names = self.kernel.arg_names
            self.launches.append((dict(zip(names, arguments, strict=True)), compiled))

        return compile


def _compile_part(target: str, part: int) -> list[Row]:
    """Compile every PARTS-th variant for the target. Runs in a worker."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    torch.set_num_threads(1)
    gpu = GPUTarget(*TARGETS[target])
    driver.set_active(_Driver(gpu, list(TARGETS).index(target)))
    problem = _obstacle()
    if problem is not None:
        return [Row(target, unknown=problem)]
    every = list(variants())
    launches = _launches(every[len(every) * part // PARTS : len(every) * (part + 1) // PARTS])
    return [
        _row(target, launch, code)
        for launch, code in zip(launches, _machine_code(target, launches), strict=True)
    ]


def _obstacle() -> str | None:
    """Say why the installed Triton cannot compile anything for the active target, or None."""
    import triton

    @triton.jit
    def nothing() -> None:
        pass

    try:
        nothing.warmup(grid=(1,), enable_fp_fusion=False)
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None


def _launches(chosen: list[Variant]) -> list[Launch]:
    """Make the calls; return their launches, each kernel once."""
    import triton

    from fused_smoothl1 import dispatch, launch

    recorded: list[tuple[dict[str, Any], Any]] = []
    kernels = {
        name: _Recorder(value, recorded)
        for name, value in vars(launch).items()
        if isinstance(value, triton.JITFunction)
    }
    launches: dict[str, Launch] = {}
    # The dispatcher would let tensors of the CPU through to an interpreted kernel only.
    serves = mock.patch.object(dispatch, "_triton_on", return_value=(launch, ""))
    with mock.patch.dict(vars(launch), kernels), serves:
        for variant in chosen:
            for function in vars(launch).values():
                # What the launcher remembers of a device or a plan may be of another target.
                getattr(function, "cache_clear", lambda: None)()
            variant.call()
            for arguments, compiled in recorded:
                name = f"{variant.name}: {_role(arguments)}"
                launches.setdefault(compiled.hash, Launch(variant.dtype, name, arguments, compiled))
            recorded.clear()
    return list(launches.values())


def _role(arguments: dict[str, Any]) -> str:
    """Say what a launch is for."""
    if "INPUT" not in arguments:
        return "rescale"
    if arguments["UNLESS_ONE"]:
        return "refresh"
    return "backward" if arguments["loss_ptr"] is None else "forward"


def _machine_code(target: str, launches: list[Launch]) -> list[assembly.Code]:
    arch = TARGETS[target][1]
    assemblies = [launch.compiled.asm for launch in launches]
    if isinstance(arch, int):
        return assembly.read_cubins([asm["cubin"] for asm in assemblies], arch)
    return [assembly.read_amdgcn(asm["amdgcn"]) for asm in assemblies]


def _row(target: str, launch: Launch, code: assembly.Code) -> Row:
    arguments, metadata = launch.arguments, launch.compiled.metadata
    threads = metadata.num_warps * TARGETS[target][2]
    full_loads, full_stores, others = _full_width(arguments, threads)
    loop = assembly.hot_loop(code)
    loads, stores = assembly.loads(loop), assembly.stores(loop)
    return Row(
        target,
        launch.dtype,
        launch.variant,
        registers=code.registers,
        spills=code.spills,
        stack=code.stack,
        shared=metadata.shared,
        threads=threads,
        access=" ".join(arguments.get(name.upper()) or "-" for name in OPERANDS),
        loads=_readable(loads),
        stores=_readable(stores),
        full_loads=_readable(full_loads),
        full_stores=_readable(full_stores),
        vectorized=bool(loop)
        and _is_full_width(loads, full_loads, others)
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

    def add(to: Counter[int], tensor: Tensor) -> None:
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


if __name__ == "__main__":
    sys.exit(main())
