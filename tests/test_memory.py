"""The kernel allocates nothing beside the loss and the gradients; nobody copies an operand.

On the CPU the allocator's own events are watched, through PyTorch's profiler, so a temporary
inside an operator counts too; on a GPU the allocator's statistics are. Allowed beside the results
are 64 KiB for the kernel's workspace, and for eager PyTorch one buffer of the losses, of which it
holds at most 2²² at once. The interpreter counts as a GPU of one multiprocessor, whose workspace is
much smaller, so that a small input is enough to see a copy.
"""

import gc
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.codegen.calls import calls
from fused_smoothl1 import eager, smooth_l1_loss
from tests import support
from tests.support import CALLS, DEVICE, HAS_GPU, call, requiring_grad

pytestmark = support.on_both

WORKSPACE = 64 * 1024 if HAS_GPU else 6 * 1024
LOSSES = 2**22
# Elements so many that their copy, even in bytes, exceeds what is allowed besides.
SIZES = {"eager": LOSSES, "triton": 2**24 if HAS_GPU else 2**13}
# Operators that make the host wait for a device.
WAITING = ("_local_scalar_dense", "item", "equal", "nonzero", "is_nonzero")
ALLOWED = {"eager": 4 * LOSSES + WORKSPACE, "triton": WORKSPACE}


@pytest.fixture(scope="module", autouse=True)
def _quick_collections() -> Iterator[None]:
    """Spare each collection below the hundreds of thousands of objects that PyTorch is made of."""
    gc.freeze()
    yield
    gc.unfreeze()


def _settle() -> None:
    """Free what only a last call holds on to: Triton's interpreter, and backward's thread."""
    gc.collect()
    if HAS_GPU:
        with torch.enable_grad():
            torch.zeros((), device=DEVICE, requires_grad=True).exp().backward()
        torch.cuda.synchronize()


def _watch(step: Callable[[], object]) -> tuple[int, int]:
    """Return the most bytes that a step has allocated at once, and those that still are."""
    _settle()
    if HAS_GPU:
        torch.cuda.empty_cache()  # A block that it keeps would be handed out, and counted, whole.
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        _settle()
        return torch.cuda.max_memory_allocated() - before, torch.cuda.memory_allocated() - before
    profile: Any = torch.autograd.profiler.profile(profile_memory=True)
    with profile:
        step()
        _settle()
    events = [e for e in profile.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    totals = [*itertools.accumulate(event.nbytes() for event in events)]
    return max(totals), totals[-1]


def _ones(*shape: int, dtype: str = "float32") -> Tensor:
    return torch.ones(shape, dtype=getattr(torch, dtype), device=DEVICE)


LAYOUTS: dict[str, Callable[[int], Tensor]] = {
    "dense": lambda rows: _ones(rows, 4),
    "columns": lambda rows: _ones(rows, 8)[:, ::2],
    "transposed": lambda rows: _ones(4, rows).t(),
}
WEIGHTS: dict[str, Callable[[int], list[Tensor]]] = {
    "none": lambda rows: [],
    "row mask": lambda rows: [_ones(rows, 1, dtype="bool")],
    "masks": lambda rows: [_ones(rows, 4, dtype="bool"), _ones(4, dtype="uint8")],
    "broadcast": lambda rows: [_ones(rows, 1), _ones(1, 4)],
    "expanded": lambda rows: [_ones(rows, 1).expand(rows, 4), _ones(4).expand(rows, 4)],
    "strided": lambda rows: [_ones(rows, 8)[:, ::2], _ones(4, rows).t()],
    "integers": lambda rows: [_ones(rows, 4, dtype="int64"), _ones(rows, 4, dtype="int8")],
    "16 bits": lambda rows: [_ones(rows, 4, dtype="float16"), _ones(rows, 1, dtype="bfloat16")],
}


def _dense(backend: str, *needed: int) -> list[Tensor]:
    return [_ones(SIZES[backend] // 4, 4).requires_grad_(i in needed) for i in range(4)]


def _step(operands: list[Any], upstream: float = 2.0, **options: Any) -> int:
    """Return the bytes of the loss and the gradients."""
    loss, wanted = smooth_l1_loss(*operands, **options), requiring_grad(operands, {})
    above = torch.full_like(loss, upstream) if loss.dim() == 0 else loss.detach()
    gradients = torch.autograd.grad(loss, wanted, above) if wanted else ()
    return sum(tensor.nbytes for tensor in (loss, *gradients))


def _besides(*call: Any, **options: Any) -> int:
    """Return the most bytes that a step allocates at once beside its results; none are kept."""
    results = _step(*call, **options)  # Workspaces are made once and kept.
    peak, kept = _watch(lambda: _step(*call, **options))
    assert peak >= results
    assert kept == 0
    return peak - results


def test_the_instrument_sees_a_copy() -> None:
    values = _ones(1 << 20)
    assert _watch(values.clone) == (values.nbytes, 0)


@support.on_kernel
@pytest.mark.parametrize("name", CALLS)
def test_no_operand_is_copied(name: str, backend: str) -> None:
    operands, options = dict(zip(CALLS, calls(SIZES[backend] // 4), strict=True))[name].bind(_ones)
    # (Gradients of weights and beta have a buffer, in which they are summed.)
    for tensor in requiring_grad(operands[2:], options):
        tensor.requires_grad_(False)
    for upstream in (1.0, 2.0):
        assert _besides(operands, upstream, **options) < ALLOWED[backend]


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_weights_are_copied(layout: str, weights: str, backend: str) -> None:
    rows = SIZES[backend] // 4
    input, target = (LAYOUTS[layout](rows) for _ in range(2))
    operands = [input.detach().requires_grad_(), target, *WEIGHTS[weights](rows)]
    # (PyTorch's operators convert weights of another dtype while they multiply by them.)
    converted = ALLOWED[backend] if weights in ("integers", "16 bits") else 0
    assert _besides(operands, reduction="sum") < ALLOWED[backend] + converted


@support.on_eager
def test_operands_are_not_converted_together(backend: str) -> None:
    """The weighted difference is held in float32, and one operand at a time."""
    input, target, inside, _ = _dense(backend)
    operands = [input.half().requires_grad_(), target, inside.half()]
    assert _besides(operands, reduction="sum") < 2 * ALLOWED["eager"]


@support.on_kernel
def test_beta_is_not_converted(backend: str) -> None:
    beta = _ones(SIZES[backend] // 4, 4, dtype="float16")
    assert _besides(_dense(backend, 0), beta=beta) < WORKSPACE


@support.on_eager
def test_losses_are_held_in_parts(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """So what eager PyTorch needs beside a large gradient does not grow with it."""
    monkeypatch.setattr(eager, "PART_NUMEL", LOSSES // 4)
    assert _besides(_dense(backend, 0)) < LOSSES + WORKSPACE


@support.on_eager
@support.needs_no_gpu
def test_few_rows_need_no_buffers(backend: str) -> None:
    """Where a mask selects few rows, these are gathered, on a CPU."""
    few_rows = torch.arange(LOSSES // 4)[:, None] % 16 == 0
    assert _besides([*_dense(backend, 0)[:2], few_rows], reduction="sum") < 2 * LOSSES


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("needed", [(), (0,), (1,), (0, 1)], ids=str)
def test_only_needed_gradients(needed: tuple[int, ...], reduction: str, backend: str) -> None:
    """A second buffer is there if two are asked for, and only then."""
    # (In eager PyTorch, a forward pass alone needs the weighted difference as well.)
    allowed = ALLOWED[backend] * (1 if needed else 2)
    assert _besides(_dense(backend, *needed), reduction=reduction) < allowed


@support.on_kernel
@pytest.mark.parametrize("name", CALLS)
def test_no_host_synchronisation(name: str) -> None:
    """No operator reads a value on the host; on a GPU PyTorch itself is told to object."""
    operands, options = call(name, rows=40)
    ways = [options, {**options, "reduction": "none", "normalizer": None}]
    if isinstance(options.get("beta"), Tensor):
        ways.append({**options, "beta": None, "sigma": options["beta"]})
    _step(operands, **options)
    try:
        with torch.autograd.profiler.profile() as profile:
            if HAS_GPU:
                torch.cuda.set_sync_debug_mode("error")
            for way in ways:
                _step(operands, **way)
    finally:
        if HAS_GPU:
            torch.cuda.set_sync_debug_mode("default")
    found = {event.name for event in profile.function_events}
    assert "aten::empty_like" in found
    assert found.isdisjoint({f"aten::{name}" for name in WAITING})
