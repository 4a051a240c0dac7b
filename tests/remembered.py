"""A compiled kernel is launched again without Triton, and only where Triton would launch the same.

    python -m tests.remembered TARGET

This process has Triton's own launcher, not its interpreter, on a stand-in for a GPU. Compilation is
left out: each kind of code that Triton asks for is an object of its own. `test_remembered.py` runs
it.
"""

import os
import random
import sys
from collections.abc import Callable, Iterable, Iterator
from itertools import count, product
from math import prod
from typing import Any, ClassVar
from unittest import mock

import torch
from torch import Tensor

from bench import stand_in
from bench.codegen.calls import Call, Operand, calls
from fused_smoothl1 import smooth_l1_loss
from tests.support import requiring_grad

Step = Callable[[], object]
FLOATS = "float32", "bfloat16", "float16", "float64"
# Memory that is never touched is never there. These bytes are beyond the reach of 32-bit offsets.
FAR = torch.empty(2**31 + 2**22, dtype=torch.uint8)


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


def step(call: Call, number: int = -1, skip: int = 0, far: bool = False) -> Step:
    """Return the call with its backward pass.

    The tensor of this number lies so many elements behind an address that 16 divides, or in a large
    storage.
    """
    numbers = count()

    def make(*shape: int, dtype: str) -> Tensor:
        kind = getattr(torch, dtype)
        is_it = next(numbers) == number
        first, size = is_it * skip * kind.itemsize, prod(shape) * kind.itemsize
        memory = FAR if far and is_it else torch.empty(first + size, dtype=torch.uint8)
        return memory[first : first + size].view(kind).view(shape)

    operands, options = call.bind(make)

    def run() -> None:
        loss = smooth_l1_loss(*operands, **options)
        if wanted := requiring_grad(operands, options):
            torch.autograd.grad(loss, wanted, call.upstream(torch.empty_like(loss)))

    return run


def special() -> Iterator[Call]:
    """Yield calls that differ in what the catalogue does not vary."""
    boxes = 2 * (Operand((300, 4)),)
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
        far = Operand((rows, stride), "float16", view=lambda long: long[:, :4])
        yield Call("", (Operand((rows, 4)), far))
    for numel in (2**31 - 2048, 2**31 - 512, 2**31 + 16):
        yield Call("", 2 * (Operand((numel,), "bfloat16"),))


def steps() -> Iterator[Step]:
    """Yield calls that differ in one of the facts that Triton specialises by, or in several."""
    for rows in (1, 2, 15, 16, 17, 1000, 1 << 18):
        yield from map(step, calls(rows))
    for call, number in product(calls(300), range(5)):
        for skip in (1, 2, 4):
            yield step(call, number, skip)
        yield step(call, number, far=True)
    yield from map(step, special())


def feature_maps(number: int) -> Iterator[Step]:
    """Yield calls on feature maps of random sizes under a mask of pixels."""
    chance = random.Random(0)
    for _ in range(number):
        batch, height, width = (chance.randint(*sizes) for sizes in ((1, 8), (8, 200), (8, 200)))
        maps = 2 * (Operand((batch, 36, height, width)),)
        yield step(Call("", (*maps, Operand((batch, 1, height, width), "bool")), wanted=0))


def flat(arguments: Any) -> list[Any]:
    """Return arguments without their tuples; of a tensor, its address."""
    if isinstance(arguments, tuple | list):
        return [item for argument in arguments for item in flat(argument)]
    return [arguments.data_ptr() if isinstance(arguments, Tensor) else arguments]


def run(steps: Iterable[Step]) -> tuple[int, int]:
    """Return how many launches of calls are Triton's own, and how many kinds of code are new."""
    from triton.runtime.jit import JITFunction

    before, original = len(made), JITFunction.run
    with mock.patch.object(JITFunction, "run", autospec=True, side_effect=original) as asked:
        for one in steps:
            one()
    return asked.call_count, len(made) - before


def compare(steps: list[Step]) -> tuple[int, int]:
    """Hold each launch against Triton's own: the code, the number of programs and every argument.

    Return how many there were, and how many of them were Triton's own.
    """
    from fused_smoothl1.launcher import Code

    original, asked = Code.launch, []

    def launch(code: Any, programs: int, stream: int, tensors: Any, *others: Any) -> None:
        arguments = (*code.grouped(tensors), *others[1])
        expected = code.kernel.warmup(*arguments, grid=(programs,), **code.options)
        Compiled.run_with.clear()
        asked.append(code.compiled is None)
        original(code, programs, stream, tensors, *others)
        launched = [(number, x, flat(own)) for number, x, own in Compiled.run_with]
        assert launched == [(expected.number, programs, flat(arguments))], code.kernel.__name__

    with mock.patch.object(Code, "launch", launch):
        for one in steps:
            one()
    return len(asked), sum(asked)


def the_same_as_triton(launch: Any) -> None:
    """Whatever came before; and Triton is asked once for each kind."""
    every = list(steps())
    random.Random(0).shuffle(every)
    before = len(made)
    launches, asked = compare(every)
    assert launches > 1000
    assert asked == len(made) - before > 200
    assert compare(every) == (launches, 0)
    for function in (launch._launch_of, launch._loss_code, launch._scale_code):
        function.cache_clear()
    # A version of Triton that has not all that is needed is asked for each launch.
    with mock.patch("fused_smoothl1.launcher.LAUNCHED_WITH", ("run", "what no version has")):
        assert [compare(every) for _ in range(2)] == [(launches, launches)] * 2


def no_compilation_that_changes_nothing() -> None:
    """The outermost size is not read, so it is not compiled in."""
    boxes = [2 * (Operand((n, 4)),) + (Operand((n, 1), "bool"),) for n in (50, 17, 18, 32, 64, 255)]
    first, *others = (step(Call("", one)) for one in boxes)
    first()
    assert run(others)[1] == 0
    assert run(feature_maps(300))[1] <= 9


def triton_is_asked_where_it_would_do_more(launch: Any) -> None:
    """Hooks of profilers and of a kernel see each launch, and debugging compiles anew."""
    from triton import knobs

    call = step(Call("", 2 * (Operand((9, 4)),), reduction="none"))
    call()
    told: list[str] = []
    for name in ("launch_enter_hook", "launch_exit_hook"):
        hook = getattr(knobs.runtime, name)
        hook.add(tell := lambda metadata, name=name: told.append(name))
        call()
        hook.remove(tell)
    call()
    launch.smooth_l1_kernel.pre_run_hooks.append(lambda *_, **__: told.append("pre_run_hook"))
    call()
    launch.smooth_l1_kernel.pre_run_hooks.clear()
    assert run([call]) == (0, 0)
    hooks = "launch_enter_hook", "launch_exit_hook", "pre_run_hook"
    assert told == [name for name in hooks for _ in range(2)]
    for group, name, value, compiled in (
        (knobs.runtime, "debug", True, 2),
        (knobs.runtime, "debug", True, 0),
        (knobs.compilation, "instrumentation_mode", "some", None),
        (knobs.runtime, "add_stages_inspection_hook", lambda *_: ("key", "hash"), None),
    ):
        with mock.patch.object(group, name, value, create=True):  # Triton 3.5 has not all.
            asked, new = run([call])
        assert asked == 2
        assert compiled in (new, None)


if __name__ == "__main__":
    os.environ.update(stand_in.ENVIRONMENT)
    import triton.compiler

    compiling = mock.patch.object(triton.compiler, "compile", Compiled)
    with compiling, stand_in.gpu(sys.argv[1]) as launch:
        no_compilation_that_changes_nothing()
        triton_is_asked_where_it_would_do_more(launch)
        the_same_as_triton(launch)
