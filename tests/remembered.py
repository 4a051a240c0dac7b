"""What is launched again without Triton, against what Triton would launch: run by its tests.

    python -m tests.remembered TARGET

This process has Triton's own launcher, not its interpreter, on a stand-in for a GPU. Compilation is
left out: each kind of code that Triton asks for is an object of its own. What was found is printed
as JSON, for `test_remembered.py`.
"""

import json
import os
import random
import sys
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any, ClassVar
from unittest import mock

import torch
from torch import Tensor

from bench import stand_in

Step = Callable[[], object]
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


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


def boxes(rows: int, columns: int = 4, dtype: torch.dtype = torch.float32, skip: int = 0) -> Tensor:
    """Return boxes that begin so many elements behind an address that 16 divides."""
    return torch.zeros(rows * columns + skip, dtype=dtype)[skip:].view(rows, columns)


def steps() -> Iterator[Step]:
    """Yield calls that differ in one of the facts that Triton specialises by, or in several."""
    for dtypes in product(FLOATS, repeat=2):
        yield step(*(boxes(32, dtype=dtype) for dtype in dtypes))
    for position, skip in product(range(4), (1, 2, 4)):
        operands = [boxes(300, skip=skip if i == position else 0) for i in range(4)]
        for reduction in ("mean", "none"):
            yield step(*operands, reduction=reduction, wanted=4)
            yield step(*operands, reduction=reduction)
    for dtype in (*FLOATS, torch.bool, torch.uint8, torch.int64):
        weights = torch.ones(300, 1).to(dtype)
        for pair in ([weights], [None, weights], [weights, weights.expand(300, 4)]):
            yield step(boxes(300), boxes(300), *pair, reduction="sum")
    for dtype in (torch.float32, torch.int64, torch.float64):
        yield step(boxes(9), boxes(9), reduction="sum", normalizer=torch.ones((), dtype=dtype))
    for rows, columns in product((1, 2, 15, 16, 17, 32, 1000, 4096), (1, 3, 4, 5, 16, 32)):
        weights = torch.ones(rows, 1)
        yield step(boxes(rows, columns), boxes(rows, columns), weights)
        yield step(boxes(rows, columns), boxes(rows, columns), weights > 0, torch.ones(columns))
        yield step(boxes(rows, 2 * columns)[:, ::2], boxes(columns, rows).t())
    for rows in (16, 17, 300):
        for upstream in (
            torch.ones(rows, 1).expand(rows, 4),
            torch.ones(rows, 8)[:, :4],
            torch.ones(4, rows).t(),
            torch.ones(()).expand(rows, 4),
            torch.ones(4 * rows + 1)[1:].view(rows, 4),
        ):
            yield step(boxes(rows), boxes(rows), reduction="none", upstream=upstream)
    for wanted in (1, 2):  # of a large gradient, and of two: they are scaled by a kernel
        for dtype, skip in product((torch.float32, torch.bfloat16), (0, 1)):
            large = [boxes(1 << 18, dtype=dtype, skip=skip) for _ in range(2)]
            yield step(*large, wanted=wanted)
            yield step(*large, wanted=wanted, upstream=torch.ones(2)[1])

    # Memory that is never touched is never there.
    far = torch.empty(2**29 + 1200)  # Its bytes are beyond the reach of 32-bit offsets.
    for position in range(2):
        yield step(*(far[:1200].view(300, 4) if i == position else boxes(300) for i in range(2)))
    for rows, stride in ((3, 2**30 + 16), (2, 2**31 + 16)):
        last = torch.empty((rows - 1) * stride + 4).as_strided((rows, 4), (stride, 1))
        yield step(boxes(rows), last)
    for numel in (2**31 - 2048, 2**31 - 512, 2**31 + 16):
        yield step(*(torch.empty(numel, dtype=torch.bfloat16) for _ in range(2)))


def step(
    *operands: Tensor | None, wanted: int = 1, upstream: Tensor | None = None, **options: Any
) -> Step:
    """Return the call, and its backward pass if gradients are wanted."""
    from fused_smoothl1 import smooth_l1_loss

    required = [t.detach().requires_grad_() for t in operands[:wanted] if t is not None]

    def run() -> None:
        loss = smooth_l1_loss(*required, *operands[wanted:], **options)
        if not wanted:
            return
        above = torch.ones_like(loss) if upstream is None else upstream
        torch.autograd.grad(loss, required, above.to(loss.dtype))

    return run


def feature_maps(count: int) -> Iterator[Step]:
    """Yield calls on feature maps of random sizes under a mask of pixels."""
    chance = random.Random(0)
    for _ in range(count):
        batch, height, width = (chance.randint(*sizes) for sizes in ((1, 8), (8, 200), (8, 200)))
        maps = [torch.empty(batch, 36, height, width) for _ in range(2)]
        yield step(*maps, torch.ones(batch, 1, height, width, dtype=torch.bool), wanted=0)


def flat(arguments: Any) -> list[Any]:
    """Return arguments without their tuples; of a tensor, its address."""
    if isinstance(arguments, tuple | list):
        return [item for argument in arguments for item in flat(argument)]
    return [arguments.data_ptr() if isinstance(arguments, Tensor) else arguments]


class Watch:
    """Compares each launch with Triton's own."""

    def __init__(self) -> None:
        from fused_smoothl1.launcher import Code

        self.original = Code.launch
        self.launches = self.by_triton = 0
        self.wrong: list[str] = []

    def launch(
        self, code: Any, programs: int, stream: int, tensors: Any, addresses: Any, others: Any
    ) -> None:
        """Stand in for `Code.launch`."""
        arguments = (*code.grouped(tensors), *others)
        expected = code.kernel.warmup(*arguments, grid=(programs,), **code.options)
        Compiled.run_with.clear()
        self.launches += 1
        self.by_triton += code.compiled is None
        self.original(code, programs, stream, tensors, addresses, others)
        launched = [(number, x, flat(own)) for number, x, own in Compiled.run_with]
        if launched != [(expected.number, programs, flat(arguments))]:
            self.wrong.append(f"{code.kernel.__name__}, {launched}, {expected.number}")


def watched(run: Callable[[], object]) -> Watch:
    """Run something, and compare its launches."""
    from fused_smoothl1.launcher import Code

    watch = Watch()
    with mock.patch.object(Code, "launch", lambda *arguments: watch.launch(*arguments)):
        run()
    return watch


def compiled_by(calls: Iterator[Step]) -> int:
    """Return how many kinds of code calls need that no earlier one needed."""
    before = len(made)
    for call in calls:
        call()
    return len(made) - before


def asked_of_triton(call: Step) -> int:
    """Return how many launches of a call are Triton's own."""
    from triton.runtime.jit import JITFunction

    asked: list[object] = []
    original = JITFunction.run

    def run(*arguments: Any, **options: Any) -> Any:
        asked.append(None)
        return original(*arguments, **options)

    with mock.patch.object(JITFunction, "run", run):
        call()
    return len(asked)


def compared(calls: list[Step]) -> dict[str, Any]:
    """Make the calls, and tell of their launches."""
    watch = watched(lambda: [call() for call in calls])
    return {"launches": watch.launches, "by_triton": watch.by_triton, "wrong": watch.wrong}


def main(target: str) -> None:
    """Print what was found."""
    os.environ.update(stand_in.ENVIRONMENT)
    import triton.compiler
    from triton import knobs

    found: dict[str, Any] = {}
    with mock.patch.object(triton.compiler, "compile", Compiled), stand_in.gpu(target) as launch:
        from fused_smoothl1 import launcher

        calls = list(steps())
        random.Random(0).shuffle(calls)
        found["first"], found["again"] = compared(calls), compared(calls)
        found["kinds"] = len(made)

        masked = [step(boxes(n), boxes(n), torch.ones(n, 1) > 0) for n in (50, 17, 18, 32, 64, 255)]
        found["rows"] = [compiled_by(iter([call])) for call in masked]
        found["feature_maps"] = compiled_by(feature_maps(300))

        call = step(boxes(9), boxes(9), reduction="none")
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
        call()
        found["told"] = told
        with mock.patch.object(knobs.runtime, "debug", True):
            found["debug"] = [compiled_by(iter([call])) for _ in range(2)]
        found["asked"] = {"nothing": asked_of_triton(call)}
        for group, name, value in (
            (knobs.runtime, "debug", True),
            (knobs.compilation, "instrumentation_mode", "some"),
            (knobs.runtime, "add_stages_inspection_hook", lambda *_: ("key", "hash")),
        ):
            with mock.patch.object(group, name, value, create=True):  # Triton 3.5 has not all.
                found["asked"][name] = asked_of_triton(call)

        launch._launch_of.cache_clear()
        launch._loss_code.cache_clear()
        launch._scale_code.cache_clear()
        with mock.patch.object(launcher, "LAUNCHED_WITH", ("run", "what no version has")):
            found["ordinary"] = [compared(calls), compared(calls)]
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
