"""Triton's interpreter, as strict as a GPU and quicker. Import it only where Triton is installed.

What a GPU does to a kernel, and Triton's interpreter by itself does not:

- It crashes at a foreign address, or reads there what then reaches no result. Here every access of
  every launch must lie inside one tensor that was given to the launch, and what is written inside
  an output or a workspace.
- It takes hints at their word: `tl.multiple_of` and `tl.max_contiguous` decide how wide an access
  is. Here what they say must be true.
- It rounds float32 to the nearest bfloat16. The interpreter truncates.
"""

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
from torch import Tensor
from triton import language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle

READ_ONLY = ("operands", "upstream_ptr", "divisor_ptr")

# What the programs of the last launch did, one program after the other, and to which argument:
# "load", "store", "atomic", or "barrier", which is of none.
events: list[tuple[str, str]] = []
# The addresses of each of its tensors' first byte, and of one past the last.
_extents: dict[str, tuple[int, int]] = {}


def make_strict() -> None:
    """Change the interpreter of this process, for good."""
    _before(GridExecutor, "__call__", _launched)
    # Which of the arguments are the pointers and the mask.
    for kind, name, pointers, mask in (
        ("load", "create_masked_load", 0, 1),
        ("store", "create_masked_store", 0, 2),
        ("atomic", "create_atomic_rmw", 1, 3),
    ):
        _before(InterpreterBuilder, name, partial(_accessed, kind, pointers, mask))
    _before(InterpreterBuilder, "create_barrier", lambda _: events.append(("barrier", "")))
    _before(TensorHandle, "set_attr", _hinted)
    _round_bfloat16()
    # Triton replaces its language by an interpreted one at every launch, and anew for each function
    # that a kernel calls. Once is enough, and spares a third of the time.
    interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    patched = SimpleNamespace(restore=lambda: None)
    interpreter._patch_lang = lambda function: patched


def _before(owner: type, name: str, check: Callable[..., None]) -> None:
    """Let a method's arguments be looked at whenever it is called."""
    method = getattr(owner, name)

    def checked(*arguments: Any, **options: Any) -> Any:
        check(*arguments)
        return method(*arguments, **options)

    setattr(owner, name, checked)


def _launched(executor: Any, *arguments: Any) -> None:
    events.clear()
    _extents.clear()
    for name, value in zip(executor.arg_names, arguments, strict=False):
        is_tuple = isinstance(value, tuple)
        for i, tensor in enumerate(value if is_tuple else (value,)):
            if isinstance(tensor, Tensor) and tensor.numel():
                steps = zip(tensor.shape, tensor.stride(), strict=True)
                last = sum((size - 1) * step for size, step in steps)
                start = tensor.data_ptr()
                own = f"{name}[{i}]" if is_tuple else name
                _extents[own] = start, start + (last + 1) * tensor.element_size()


def _accessed(kind: str, pointers: int, mask: int, _: Any, *arguments: Any) -> None:
    active = arguments[pointers].data[arguments[mask].data]
    if active.size:
        low, high = active.min(), active.max()
        names = [name for name, (start, stop) in _extents.items() if start <= low and high < stop]
        if kind != "load":
            names = [name for name in names if not name.startswith(READ_ONLY)]
        assert names, f"a {kind} outside of every tensor that the kernel was given for it"
        events.append((kind, names[0]))


def _hinted(handle: Any, hint: str, values: list[int]) -> None:
    """Check what is said of the last dimension: runs of neighbours, that start at a multiple."""
    hints = {**handle.attr, hint: values}
    *others, run = hints.get("tt.contiguity", [1])
    *more, multiple = hints.get("tt.divisibility", [1])
    assert {*others, *more} <= {1}, "a hint about another dimension, which is not checked here"
    runs = handle.data.reshape(-1, run)
    assert (runs - runs[:, :1] == np.arange(run)).all(), "not contiguous"
    assert run == 1 or not (runs[:, 0] % multiple).any(), "not a multiple"


def _round_bfloat16() -> None:
    truncate = InterpreterBuilder.create_fp_trunc

    def create_fp_trunc(self: Any, source: Any, dtype: Any) -> Any:
        if source.dtype.scalar != tl.float32 or dtype.scalar != tl.bfloat16:
            return truncate(self, source, dtype)
        # (By NumPy, because PyTorch's allocations are counted.)
        bits = np.array(source.data).view(np.uint32)
        to_nearest_even = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
        rounded = np.where(np.isnan(source.data), 0x7FC0, to_nearest_even)
        return TensorHandle(rounded.astype(np.uint16), dtype.scalar)

    InterpreterBuilder.create_fp_trunc = create_fp_trunc
