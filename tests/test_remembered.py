"""A compiled kernel is launched again without Triton, and only where Triton would launch the same.

`python -m tests.test_remembered TARGET` compares: a process that has Triton's own launcher, not its
interpreter, on a stand-in for a GPU. Compilation is left out: each kind of code that Triton asks
for is an object of its own.
"""

import os
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import count, product
from math import prod
from typing import Any, ClassVar
from unittest import mock

import pytest
import torch
from torch import Tensor

from bench import stand_in
from bench.codegen.calls import Call, Operand, calls
from fused_smoothl1 import smooth_l1_loss
from tests import support
from tests.support import requiring_grad, run_python

Step = Callable[[], object]
FLOATS = "float32", "bfloat16", "float16", "float64"


class Compiled:
    """What Triton would compile: it writes down its launches."""

    run_with: ClassVar[list[tuple[Any, ...]]] = []
    function = packed_metadata = metadata = None

    def __init__(self, *_: Any, **__: Any) -> None:
        self.number = len(made)
        made.append(self)

    def __getitem__(self, grid: tuple[int, int, int]) -> None:
        """Load nothing."""

    def launch_metadata(self, *_: Any) -> None:
        return None

    def run(self, *arguments: Any) -> None:
        """Take what Triton's launcher for a device takes."""
        x, y, z, stream, _, _, metadata, enter, leave, *own = arguments
        assert (y, z, stream) == (1, 1, 0)
        for hook in (enter, leave):
            if hook is not None:
                hook(metadata)
        self.run_with.append((self.number, x, own))


made: list[Compiled] = []


def step(call: Call, number: int = -1, skip: int = 0) -> Step:
    """Return the call with its backward pass.

    The tensor of this number lies so many elements behind an address that 16 divides. (Memory that
    is never touched is never there.)
    """
    numbers = count()

    def make(*shape: int, dtype: str) -> Tensor:
        skipped = skip if next(numbers) == number else 0
        memory = torch.empty(skipped + prod(shape), dtype=getattr(torch, dtype))
        return memory[skipped:].view(shape)

    operands, options = call.bind(make)

    def run() -> None:
        loss = smooth_l1_loss(*operands, **options)
        if wanted := requiring_grad(operands, options):
            torch.autograd.grad(loss, wanted, call.upstream(torch.empty_like(loss)))

    return run


def special() -> Iterator[Call]:
    """Yield calls that differ in what the catalogue does not vary."""
    boxes = 2 * (Operand((300, 4)),)
    # In a storage beyond the reach of 32-bit offsets:
    large = Operand((2**29 + 2**20,), view=lambda memory: memory[:1200].view(300, 4))
    for number in range(4):
        operands = [*boxes, *boxes]
        operands[number] = large
        yield Call("", tuple(operands))
    for dtypes in product(FLOATS, repeat=2):
        yield Call("", tuple(Operand((32, 4), dtype) for dtype in dtypes))
    for dtype in (*FLOATS, "bool", "uint8", "int64"):
        weights = Operand((300, 1), dtype), Operand((300, 4), dtype)
        yield Call("", (*boxes, *weights), reduction="sum")
        yield Call("", (*boxes, weights[0]), reduction="sum", normalizer=dtype)
    for rows, columns in product((1, 2, 15, 16, 17, 32, 1000, 4096), (1, 3, 4, 5, 16, 32)):
        same, row = 2 * (Operand((rows, columns)),), Operand((rows, 1))
        every_other = Operand((rows, 2 * columns), view=lambda wide: wide[:, ::2])
        transposed = Operand((columns, rows), view=lambda turned: turned.t())
        yield Call("", (*same, row))
        yield Call("", (*same, row._replace(dtype="bool"), Operand((columns,))))
        yield Call("", (every_other, transposed))
    yield Call("", boxes, reduction="none", upstream=lambda g: g.new_ones(()).expand_as(g))
    yield Call("", boxes, reduction="none", upstream=lambda g: g.new_ones(1201)[1:].view_as(g))
    yield Call("", 2 * (Operand((1 << 20,)),), upstream=lambda g: g.new_ones(2)[1])
    for rows, stride in ((3, 2**30 + 16), (2, 2**31 + 16)):
        apart = Operand((rows, stride), "float16", view=lambda long: long[:, :4])
        yield Call("", (Operand((rows, 4)), apart))
    for numel in (2**31 - 2048, 2**31 - 512, 2**31 + 16):
        yield Call("", 2 * (Operand((numel,), "bfloat16"),))


def steps() -> Iterator[Step]:
    """Yield calls that differ in one of the facts that Triton specialises by, or in several."""
    for rows in (1, 2, 15, 16, 17, 1000, 1 << 18):
        yield from map(step, calls(rows))
    for call, number, skip in product(calls(300), range(5), (1, 2, 4)):
        yield step(call, number, skip)
    yield from map(step, special())


def few_kinds_of_code() -> None:
    """What changes nothing is not compiled in, as the outermost size, which is not read."""

    def masked(rows: int, columns: tuple[int, ...], columns_of_mask: tuple[int, ...]) -> Step:
        operands = 2 * (Operand((rows, *columns)),)
        mask = Operand((rows, *columns_of_mask), "bool")
        return step(Call("", (*operands, mask), wanted=0))

    assert compare(masked(rows, (4,), (1,)) for rows in (50, 17, 18, 32, 255))[2] == 1
    chance = random.Random(0)
    sizes = ([chance.randint(*sizes) for sizes in ((1, 8), (8, 200), (8, 200))] for _ in range(300))
    assert compare(masked(n, (36, *size), (1, *size)) for n, *size in sizes)[2] <= 9


def flat(arguments: Any) -> list[Any]:
    """Return arguments without their tuples; of a tensor, its address."""
    if isinstance(arguments, tuple | list):
        return [item for argument in arguments for item in flat(argument)]
    return [arguments.data_ptr() if isinstance(arguments, Tensor) else arguments]


def compare(steps: Iterable[Step]) -> tuple[int, int, int]:
    """Hold each launch against Triton's own: the code, the number of programs and every argument.

    Return how many there were, how many of them by Triton, and how many kinds of code are new.
    """
    from triton.runtime.jit import JITFunction

    from fused_smoothl1.launcher import Code

    before, counts, launch_code, run = len(made), Counter[str](), Code.launch, JITFunction.run

    def launch(code: Any, programs: int, stream: int, tensors: Any, *others: Any) -> None:
        counts["launches"] += 1
        arguments = (*code.grouped(tensors), *others[1])
        expected = code.kernel.warmup(*arguments, grid=(programs,), **code.options)
        Compiled.run_with.clear()
        launch_code(code, programs, stream, tensors, *others)
        launched = [(number, x, flat(own)) for number, x, own in Compiled.run_with]
        assert launched == [(expected.number, programs, flat(arguments))], code.kernel.__name__

    def run_by_triton(kernel: Any, *arguments: Any, warmup: bool, **options: Any) -> Any:
        counts["by Triton"] += not warmup
        return run(kernel, *arguments, warmup=warmup, **options)

    patch = mock.patch.object
    with patch(Code, "launch", launch), patch(JITFunction, "run", run_by_triton):
        for one in steps:
            one()
    return counts["launches"], counts["by Triton"], len(made) - before


def the_same_as_triton(launch: Any) -> None:
    """Whatever came before; and Triton is asked once for each kind."""
    every = list(steps())
    random.Random(0).shuffle(every)
    launches, by_triton, compiled = compare(every)
    assert launches > 1000
    assert by_triton == compiled > 200
    assert compare(every) == (launches, 0, 0)
    for function in (launch._launch_of, launch._loss_code, launch._scale_code):
        function.cache_clear()
    # A version of Triton that has not all that is needed is asked for each launch.
    with mock.patch("fused_smoothl1.launcher.LAUNCHED_WITH", ("run", "what no version has")):
        assert [compare(every) for _ in range(2)] == [(launches, launches, 0)] * 2


def triton_is_asked_where_it_would_do_more(kernel: Any) -> None:
    """Hooks of profilers and of a kernel see each launch, and debugging compiles anew."""
    from triton import knobs

    call = step(Call("", 2 * (Operand((9, 4)),), reduction="none"))
    call()
    runtime, own = knobs.runtime, kernel.pre_run_hooks
    adding = runtime.launch_enter_hook.add, runtime.launch_exit_hook.add, own.append
    removing = runtime.launch_enter_hook.remove, runtime.launch_exit_hook.remove, own.remove
    for add, remove in zip(adding, removing, strict=True):
        hook = mock.Mock()
        add(hook)
        call()
        remove(hook)
        call()
        assert hook.call_count == 2
    assert compare([call]) == (2, 0, 0)
    for group, name, value, new in (
        (runtime, "debug", True, 2),
        (runtime, "debug", True, 0),
        (knobs.compilation, "instrumentation_mode", "some", None),
        (runtime, "add_stages_inspection_hook", lambda *_: ("key", "hash"), None),
    ):
        with mock.patch.object(group, name, value, create=True):  # Triton 3.5 has not all.
            launches, by_triton, compiled = compare([call])
        assert launches == by_triton == 2
        assert new in (compiled, None)


@support.needs_triton
@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_remembered(target: str) -> None:
    # With this, Triton's code for AMD depends on a storage's size, in Triton 3.5 too.
    run_python("-m", "tests.test_remembered", target, AMDGCN_USE_BUFFER_OPS="1")


if __name__ == "__main__":
    os.environ.update(stand_in.ENVIRONMENT)
    import triton.compiler

    compiling = mock.patch.object(triton.compiler, "compile", Compiled)
    with compiling, stand_in.gpu(sys.argv[1]) as launch:
        few_kinds_of_code()
        triton_is_asked_where_it_would_do_more(launch.smooth_l1_kernel)
        the_same_as_triton(launch)
