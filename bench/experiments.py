"""What might make the library faster, as edits of its source, each with a prediction.

A variant is a backend with some lines replaced, loaded beside the real one. So the library carries
no switch that only an experiment needs, and any line can be put in question. `python -m bench tune`
measures them; what it found, and what became of it, is in RESULTS.md.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch

import fused_smoothl1

PACKAGE = Path(fused_smoothl1.__file__).parent
# The files of each backend, its own last. All else is the library's.
FILES = {"triton": ("kernel", "launch"), "eager": ("eager",)}


class Edit(NamedTuple):
    """A text in a file of the package, where it stands exactly once, and what replaces it."""

    file: str
    old: str
    new: str


@dataclass(frozen=True)
class Variant:
    """A backend with these edits."""

    name: str
    edits: tuple[Edit, ...]


@dataclass(frozen=True)
class Experiment:
    """Variants to be measured against the code as it is, on workloads (case, elements, dtype)."""

    name: str
    prediction: str
    workloads: tuple[tuple[str, int, torch.dtype], ...]
    variants: tuple[Variant, ...]
    backend: str = "triton"


AS_BUILT = Variant("as built", ())
HEAD, RPN = 10_752, 86_184
LARGE = (("dense", 2**26, torch.float32), ("dense", 2**26, torch.bfloat16))
SWEPT = (*LARGE, ("dense", 2**22, torch.float32), ("row_mask", 2**26, torch.float32))
SMALL = (("dense", HEAD, torch.float32), ("dense", RPN, torch.float32))


def _constant(name: str, old: str, *values: str, file: str = "launch") -> tuple[Variant, ...]:
    """Return a variant for each value of a constant."""
    return tuple(
        Variant(f"{name} {value}", (Edit(file, f"{name} = {old}\n", f"{name} = {value}\n"),))
        for value in values
    )


def _tile(size: int, elements: int) -> Variant:
    edits = (
        Edit("launch", "TILE_BYTES = 4096\n", f"TILE_BYTES = {size}\n"),
        Edit("launch", "MOST_ELEMENTS = 1024\n", f"MOST_ELEMENTS = {elements}\n"),
    )
    return Variant(f"tiles of {size} bytes, at most {elements} elements", edits)


FLAT_LOAD = "return tl.load(ptr + (group + lane), mask=mask, other=0)"
STORE = "tl.store(pointers, values, mask=mask)"
LOOP = "for block in range(start, stop, programs):"
SKIPPED = "wanted = within & (tl.max(selected.to(tl.int32), 1, keep_dims=True) != 0)"
LAUNCH = "smooth_l1_kernel[(programs,)]("
# Launches what the first call compiled. It may only serve calls of one kind and alignment, so it
# shows how much there is to gain, and not yet how.
REMEMBER = """_compiled = {}


def _remembered(kernel, programs, *key):
    if key in _compiled:
        compiled = _compiled[key]
        return lambda *arguments, **_: compiled[(programs, 1, 1)](*arguments)

    def first(*arguments, **options):
        compiled = kernel[(programs,)](*arguments, **options)
        if compiled is not None:  # As it is in the interpreter.
            _compiled[key] = compiled

    return first


def _launch("""

SUM = "    block_sum: Tensor | None = None\n"

# The most telling first: the launch's constants, then edits of the kernel.
EXPERIMENTS = (
    Experiment(
        "tile",
        "4096 bytes are best or within 2%: smaller tiles keep too few loads in flight, larger ones "
        "cost registers, and in bfloat16 spill.",
        SWEPT,
        (_tile(2048, 1024), _tile(4096, 2048), _tile(8192, 1024), _tile(8192, 2048)),
    ),
    Experiment(
        "threads",
        "128 and 256 threads a program are within 2%; 64 lose a little to more partial sums.",
        SWEPT,
        _constant("THREADS", "128", "64", "256"),
    ),
    Experiment(
        "programs",
        "8 programs a multiprocessor saturate the memory: 4 are slower, 16 and 32 no faster.",
        SWEPT,
        _constant("PROGRAMS_PER_MULTIPROCESSOR", "8", "4", "16", "32"),
    ),
    Experiment(
        "multiply below",
        "Up to 2^20 elements torch.mul costs less host time than a launch of Triton's; above, the "
        "kernel that returns early is faster.",
        tuple(("dense", n, torch.float32) for n in (RPN, 2**18, 2**20, 2**22)),
        _constant("MULTIPLY_BELOW", "1 << 20", "0", "1 << 30"),
    ),
    Experiment(
        "cache hints",
        "Nothing is read twice, so evict_first and a streaming store gain at most 2% at 2^26, and "
        "lose where the next kernel would find the gradient in the L2.",
        (*LARGE, ("dense", 2**22, torch.float32)),
        (
            Variant(
                "loads evict first",
                (
                    Edit(
                        "kernel",
                        FLAT_LOAD,
                        FLAT_LOAD[:-1] + ', eviction_policy="evict_first")',
                    ),
                ),
            ),
            Variant(
                "streaming stores", (Edit("kernel", STORE, STORE[:-1] + ', cache_modifier=".cs")'),)
            ),
        ),
    ),
    Experiment(
        "pipelined loop",
        "Loads through shared memory gain nothing: enough programs are in flight without.",
        LARGE,
        (
            Variant(
                "num_stages 3",
                (
                    Edit(
                        "kernel",
                        LOOP,
                        "for block in tl.range(start, stop, programs, num_stages=3):",
                    ),
                ),
            ),
        ),
    ),
    Experiment(
        "early return",
        "Without it, the backward pass reads and writes the gradient: 7/5 of the time.",
        LARGE[:1],
        (
            Variant(
                "always multiplies",
                (Edit("kernel", "numel = tl.where(factor == 1, 0, numel)\n", "numel = numel\n"),),
            ),
        ),
    ),
    Experiment(
        "skipped loads",
        "With 1% of the boxes selected, loading all of them takes over twice as long.",
        (("row_mask", 2**26, torch.float32), ("row_mask", 2**26, torch.bfloat16)),
        (Variant("loads all", (Edit("kernel", SKIPPED, "wanted = within"),)),),
    ),
    Experiment(
        "launch",
        "At these sizes time is host time: launching the compiled kernel without Triton's look-up "
        "saves a third of the forward pass.",
        SMALL,
        (
            Variant(
                "remembered kernel",
                (
                    Edit("launch", "def _launch(", REMEMBER),
                    Edit(
                        "launch",
                        LAUNCH,
                        "_remembered(smooth_l1_kernel, programs, plan, loss is None, "
                        "problem.compute_dtype, input.dtype)(",
                    ),
                ),
            ),
        ),
    ),
    Experiment(
        "block",
        "Smaller blocks are slower by the host time of their operations. Larger ones gain less "
        "than 10% where the last cache is large, lose where it is not, and need more scratch.",
        (
            *(("dense", n, torch.float32) for n in (2**20, 2**22, 2**24)),
            ("row_mask", 2**22, torch.float32),
            ("broadcast", 2**22, torch.float32),
        ),
        _constant("BLOCK", "1 << 18", *(f"1 << {n}" for n in (16, 17, 19, 20)), file="eager"),
        backend="eager",
    ),
    Experiment(
        "wide fills",
        "To exclude a box of four coordinates by one wide fill halves the time under a row mask.",
        tuple(("row_mask", n, torch.float32) for n in (RPN, 2**22)),
        (
            Variant(
                "an element at a time",
                (Edit("eager", "values = values.view(torch.complex128)", "pass"),),
            ),
        ),
        backend="eager",
    ),
    Experiment(
        "weighted slope",
        "With the outside weights in the slope before the loss is made of it, one of ten passes is "
        "saved: 7%. (The bits would differ from the kernel's where float32 underflows.)",
        tuple(("dense", n, torch.float32) for n in (RPN, 2**22, 2**24)),
        (
            Variant(
                "shared",
                (
                    Edit(
                        "eager",
                        SUM,
                        f"    if not _is_one(outside):\n        slope.mul_(outside)\n{SUM}",
                    ),
                    Edit("eager", "            loss.mul_(outside)\n", "            pass\n"),
                    Edit(
                        "eager",
                        "grad_x = slope if _is_one(outside) else slope.mul_(outside)",
                        "grad_x = slope",
                    ),
                ),
            ),
        ),
        backend="eager",
    ),
    Experiment(
        "constants",
        "A product with a number costs some microseconds more than one with a tensor kept for it: "
        "it shows at small sizes alone.",
        SMALL,
        (
            Variant(
                "numbers",
                (Edit("eager", "_constant(1.0 / divisor, dtype)", "1.0 / divisor"),),
            ),
        ),
        backend="eager",
    ),
)


@contextmanager
def backends(variants: tuple[Variant, ...], backend: str) -> Iterator[list[Any]]:
    """Load the variants of a backend, each a `contract.Backend`, in their order."""
    with TemporaryDirectory() as folder:
        sys.path.insert(0, folder)
        try:
            yield [_load(variant, FILES[backend], Path(folder)) for variant in variants]
        finally:
            sys.path.remove(folder)


def _load(variant: Variant, files: tuple[str, ...], folder: Path) -> Any:
    package = "variant_" + "".join(c if c.isalnum() else "_" for c in variant.name)
    (folder / package).mkdir()
    for file in files:
        text = _edited(file, variant)
        for own in files:
            text = text.replace(f"from fused_smoothl1.{own} ", f"from {package}.{own} ")
        (folder / package / f"{file}.py").write_text(text)
    for name in [name for name in sys.modules if name.startswith(f"{package}.")]:
        del sys.modules[name]
    return import_module(f"{package}.{files[-1]}")


def _edited(file: str, variant: Variant) -> str:
    text = (PACKAGE / f"{file}.py").read_text()
    for edit in variant.edits:
        if edit.file != file:
            continue
        if text.count(edit.old) != 1:
            raise ValueError(
                f"{variant.name}: {file}.py must hold {edit.old!r} once, "
                f"and holds it {text.count(edit.old)} times"
            )
        text = text.replace(edit.old, edit.new)
    return text
