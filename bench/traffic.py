"""`python -m bench traffic`: draw what a step moves through memory, in eager PyTorch and here.

It is counted, not measured. The best eager composition runs once on the CPU with both weights,
forward and backward. Each of its operators is one kernel on a GPU, which reads its operands from
memory and writes its result there. This library's kernel reads each operand once and writes the
gradient; its backward multiplies that (2 N more), unless the call is large and what arrives there
is 1, as in training without a loss scale. N is how many numbers the input has.
"""

import argparse
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")  # no display is needed, nor looked for

import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Patch, Rectangle
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.measure import peak_extra_bytes
from bench.report import RESULTS
from bench.rivals import autograd_step, composition
from bench.workloads import Spec, build

NUMEL = 2**16  # so many that single numbers beside them round to nothing
OVERWRITING = ("copy_", "fill_", "zero_")  # do not read what they change
READ, WRITE, TEXT, FAINT = "#b5d0ee", "#f7c08a", "#1b1b1b", "#6f6f6f"
BLOCK = 0.8  # height, of the distance between two lines
TITLE = "forward + backward with both weights; a block is N numbers, as many as the input has"
NAMES = ("input", "target", "inside", "outside", "gradient")  # all others are temporary


class Kernel(NamedTuple):
    """An operator, and the tensors that it reads from memory and writes there."""

    operator: str
    reads: Sequence[Tensor]
    writes: Sequence[Tensor]

    @property
    def moved(self) -> int:
        """How many numbers it reads and writes."""
        return elements(self.reads) + elements(self.writes)


class Traffic(TorchDispatchMode):
    """Collects the kernels of what runs under it, and keeps their tensors alive."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: list[Kernel] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, before = kwargs or {}, len(self.kernels)
        if _may_call_others(func):
            with self:
                result = func._op_dk(
                    torch._C.DispatchKey.CompositeExplicitAutograd, *args, **kwargs
                )
            if len(self.kernels) > before:
                return result
        else:
            result = func(*args, **kwargs)
        name = func.__name__.partition(".")[0]
        reads, writes = [], []
        for argument, value in zip(func._schema.arguments, args, strict=False):
            changed = argument.alias_info is not None and argument.alias_info.is_write
            writes += _tensors(value) if changed else []
            reads += [] if changed and name in OVERWRITING else _tensors(value)
        for argument in func._schema.arguments[len(args) :]:
            (writes if argument.is_out else reads).extend(_tensors(kwargs.get(argument.name)))
        known = {_address(tensor) for tensor in reads + writes}
        writes += [tensor for tensor in _tensors(result) if _address(tensor) not in known]
        # A view writes nothing, nor does an allocation.
        if writes and not name.startswith(("empty", "new_empty")):
            self.kernels.append(Kernel(name, reads, writes))
        return result


def elements(tensors: Sequence[Tensor]) -> int:
    """Return how many numbers they have in memory, where what is broadcast is there once."""
    return sum(
        prod(size for size, stride in zip(t.shape, t.stride(), strict=True) if stride)
        for t in tensors
    )


class Step(NamedTuple):
    """A way to compute loss and gradient: its kernels, forward and backward, and its memory."""

    title: str
    sections: dict[str, list[Kernel]]
    peak: int  # numbers in memory at once, beyond the operands

    @property
    def kernels(self) -> list[Kernel]:
        """All of them."""
        return [kernel for section in self.sections.values() for kernel in section]

    @property
    def total(self) -> str:
        """What it moves, in words."""
        moved, count = sum(kernel.moved for kernel in self.kernels), len(self.kernels)
        return (
            f"{self.title}: {_in_n(moved)} in {f'{count} kernels' if count > 1 else 'one kernel'}"
        )

    @property
    def memory(self) -> str:
        """What it needs, in words."""
        return f"{_in_n(self.peak)} of new memory"


def main(arguments: Sequence[str]) -> int:
    """Count, draw and tell; return 0."""
    parser = argparse.ArgumentParser(prog="python -m bench traffic", description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR", help="for the picture")
    options = parser.parse_args(arguments)
    path = options.out / "traffic.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    *steps, names = counted()
    _draw(steps, names, path)
    for step in steps:
        print(f"{step.total}, {step.memory}")
    print(f"Wrote {path}.")
    return 0


def counted() -> tuple[Step, Step, dict[int, str]]:
    """Return the composition's step and this library's, and the names of tensors by address."""
    device = torch.device("cpu")
    workload = build(Spec("dense", NUMEL), device)
    operands = [workload.input, *_tensors(workload.operands)]
    with Traffic() as forward:
        loss = composition(*operands, **workload.options)
    with Traffic() as backward:
        (gradient,) = torch.autograd.grad(loss, workload.input, torch.ones(()))
    peak = peak_extra_bytes(autograd_step(composition, workload), device)
    assert peak is not None, "the profiler saw no allocation"
    # (Left out is a kernel that fills a single number.)
    sections = {
        name: [kernel for kernel in run.kernels if kernel.moved >= NUMEL]
        for name, run in (("forward", forward), ("backward", backward))
    }
    one = Kernel("smooth_l1_loss", operands, [gradient])
    return (
        Step("Eager PyTorch", sections, peak // gradient.element_size()),
        Step("This library", {"forward": [one]}, elements(one.writes)),
        dict(zip(map(_address, [*operands, gradient]), NAMES, strict=True)),
    )


def _may_call_others(func: Any) -> bool:
    """Say whether an operator has no kernel of its own, but may call others, which then count.

    The CPU is asked: what the composition uses has kernels there where it has them on a GPU.
    """

    def has_kernel(key: str) -> bool:
        return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), key)

    return not func.is_view and has_kernel("CompositeExplicitAutograd") and not has_kernel("CPU")


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _in_n(numbers: int) -> str:
    return f"{numbers / NUMEL:.0f} N"


def _draw(steps: Sequence[Step], names: dict[int, str], path: Path) -> None:
    """Draw a line for each kernel, and in it a block for each tensor."""
    figure, axes = plt.subplots(figsize=(9.0, 5.8), layout="constrained")
    widest = max(kernel.moved for step in steps for kernel in step.kernels) / NUMEL
    line = 0.0
    for step in steps:
        axes.text(0, line, step.total, va="center", fontsize=14, fontweight="bold", color=TEXT)
        axes.text(widest, line, step.memory, ha="right", va="center", fontsize=11, color=TEXT)
        line += 1.0
        for section, kernels in step.sections.items():
            first = line
            for kernel in kernels:
                _draw_kernel(axes, kernel, line, names)
                line += 1.0
            if len(step.sections) > 1:
                ends = (first - BLOCK / 2, line - 1 + BLOCK / 2)
                axes.plot([-1.75, -1.75], ends, color=FAINT, linewidth=1.5)
                look: Any = {"ha": "right", "va": "center", "rotation": 90, "color": FAINT}
                axes.text(-1.82, sum(ends) / 2, section, **look)
            line += 0.25
        line += 0.35
    axes.set(xlim=(-2.0, widest), ylim=(line - 1.0, -0.6))
    axes.set_axis_off()
    figure.suptitle(TITLE, fontsize=10, color=TEXT)
    handles = [Patch(color=READ, label="read"), Patch(color=WRITE, label="written")]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _draw_kernel(axes: Axes, kernel: Kernel, line: float, names: dict[int, str]) -> None:
    look: Any = {"va": "center", "fontsize": 10}
    axes.text(-0.08, line, kernel.operator, ha="right", family="monospace", color=TEXT, **look)
    left = 0.0
    for tensors, color in ((kernel.reads, READ), (kernel.writes, WRITE)):
        for tensor in tensors:
            width, name = elements([tensor]) / NUMEL, names.get(_address(tensor))
            corner = (left, line - BLOCK / 2)
            axes.add_patch(Rectangle(corner, width, BLOCK, facecolor=color, edgecolor="white"))
            if width > 0.5:
                text, ink = (name, TEXT) if name else ("temporary", FAINT)
                axes.text(left + width / 2, line, text, ha="center", color=ink, **look)
            left += width
