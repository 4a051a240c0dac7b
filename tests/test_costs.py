"""One launch forward and at most one backward, no copy of an operand, and no wait of the host.

Launches are those of every Triton kernel there is, under the interpreter or compiled. Memory is
watched through PyTorch's profiler on the CPU, so a temporary inside an operator counts too, and
through the allocator's statistics on a GPU. Allowed beside the results are 64 KiB for the kernel's
workspace, and for eager PyTorch one buffer of the losses, of which it holds at most 2²² at once.
The interpreter counts as a GPU of one multiprocessor, whose workspace is much smaller, so that a
small input is enough to see a copy.
"""

import gc
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_smoothl1 import eager, smooth_l1_loss
from tests import support
from tests.support import CALLS, DEVICE, HAS_GPU, REDUCTIONS, boxes, call, requiring_grad

WORKSPACE = 64 * 1024 if HAS_GPU else 1024
LOSSES = 2**22
# Elements so many that their copy, even in bytes, exceeds what is allowed besides.
SIZES = {"eager": LOSSES, "triton": 2**24 if HAS_GPU else 2**13}
ALLOWED = {"eager": 4 * LOSSES + WORKSPACE, "triton": WORKSPACE}
# Methods and operators that make the host wait for a device.
READS = "item", "tolist", "cpu", "__float__", "__int__", "__bool__", "__index__"
WAITS = "_local_scalar_dense", "item", "equal", "nonzero", "is_nonzero"


@pytest.fixture(scope="module", autouse=True)
def _quick_collections() -> Iterator[None]:
    """Keep the many objects that PyTorch is made of out of each collection in this file."""
    gc.freeze()
    yield
    gc.unfreeze()


def _counts(
    launches: list[str], operands: list[Any], upstream: float = 1.0, **options: Any
) -> tuple[int, int]:
    """Return the number of launches of a call, and the most of either of two backward passes."""
    launches.clear()
    loss = smooth_l1_loss(*operands, **options)
    above, forward, backward = torch.full_like(loss, upstream), len(launches), 0
    for _ in range(2 if loss.requires_grad else 0):
        launches.clear()
        torch.autograd.grad(loss, requiring_grad(operands, options), above, retain_graph=True)
        backward = max(backward, len(launches))
    return forward, backward


@support.on_kernel
@pytest.mark.parametrize("name", CALLS)
def test_launches(name: str, launches: list[str]) -> None:
    for reduction, upstream in itertools.product(REDUCTIONS, (1.0, 2.0)):
        operands, options = call(name, 300, reduction=reduction)
        assert _counts(launches, operands, upstream, **options) in ((1, 0), (1, 1))


@support.on_kernel
def test_fewer_launches(launches: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """None without elements; and under no_grad autograd, which costs host time, takes no part."""
    for empty, reduction in itertools.product([(0,), (0, 4), (3, 0)], REDUCTIONS):
        assert _counts(launches, boxes(empty), reduction=reduction) == (0, 0)
    monkeypatch.setattr("fused_smoothl1.functional.apply", None)
    with torch.no_grad():
        assert _counts(launches, boxes(9, (9, 4), grad=3)) == (1, 0)


@support.needs_triton
def test_numbers_are_annotated_as_float64() -> None:
    """So Triton specialises the kernel on none of their values."""
    from fused_smoothl1.kernel import smooth_l1_kernel

    for name in ("beta", "inverse_beta", "inverse_divisor", "outside_number"):
        assert str(smooth_l1_kernel.fn.__annotations__[name]) == "fp64"


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


def _dense(backend: str, *needed: int) -> list[Tensor]:
    return [_ones(SIZES[backend] // 4, 4).requires_grad_(i in needed) for i in range(4)]


def _step(operands: list[Any], upstream: float = 2.0, **options: Any) -> int:
    """Return the bytes of the loss and the gradients."""
    loss, wanted = smooth_l1_loss(*operands, **options), requiring_grad(operands, {})
    above = torch.full_like(loss, upstream) if loss.dim() == 0 else loss.detach()
    gradients = torch.autograd.grad(loss, wanted, above) if wanted else ()
    return sum(tensor.nbytes for tensor in (loss, *gradients))


def _besides(*call: Any, **options: Any) -> int:
    """Return the most bytes that a step allocates beside its results; none must stay allocated."""
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
    operands, options = support.catalogued(name, SIZES[backend] // 4).bind(_ones)
    # (Gradients of weights and beta have a buffer, in which they are summed.)
    for tensor in requiring_grad(operands[2:], options):
        tensor.requires_grad_(False)
    for upstream in (1.0, 2.0):
        assert _besides(operands, upstream, **options) < ALLOWED[backend]


WEIGHTS: dict[str, Callable[[int], list[Tensor]]] = {
    "none": lambda rows: [],
    "masks": lambda rows: [_ones(rows, 4, dtype="bool"), _ones(4, dtype="uint8")],
    "expanded": lambda rows: [_ones(rows, 1).expand(rows, 4), _ones(4).expand(rows, 4)],
    "strided": lambda rows: [_ones(rows, 8)[:, ::2], _ones(4, rows).t()],
    "integers": lambda rows: [_ones(rows, 4, dtype="int64"), _ones(rows, 4, dtype="int8")],
    "16 bits": lambda rows: [_ones(rows, 4, dtype="float16"), _ones(rows, 1, dtype="bfloat16")],
}


@support.on_both
@pytest.mark.parametrize("weights", WEIGHTS)
def test_no_weights_are_copied(weights: str, backend: str) -> None:
    rows, allowed = SIZES[backend] // 4, ALLOWED[backend]
    options: dict[str, Any] = {"reduction": "sum"}
    if backend == "triton":
        options["beta"] = _ones(rows, 4, dtype="float16")
    elif weights in ("integers", "16 bits"):
        allowed *= 2  # PyTorch's operators convert them while they multiply by them.
    dense, transposed = _ones(rows, 4), _ones(4, rows).t()
    for input, target in [(dense, dense), (_ones(rows, 8)[:, ::2], transposed)]:
        operands = [input.detach().requires_grad_(), target, *WEIGHTS[weights](rows)]
        assert _besides(operands, **options) < allowed


@support.on_both
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("needed", [(), (0,), (1,), (0, 1)], ids=str)
def test_only_needed_gradients(needed: tuple[int, ...], reduction: str, backend: str) -> None:
    """A second buffer is there if two are asked for, and only then."""
    # (In eager PyTorch, a forward pass alone needs the weighted difference as well.)
    allowed = ALLOWED[backend] * (1 if needed else 2)
    assert _besides(_dense(backend, *needed), reduction=reduction) < allowed


@support.on_eager
def test_buffers_of_eager_pytorch(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It converts one operand at a time, and gathers the few rows that a mask selects, on a CPU.

    What it needs beside a large gradient does not grow with that: losses are held in parts.
    """
    input, target, weights, _ = _dense(backend)
    half = [input.half().requires_grad_(), target.half(), weights.half()]
    assert _besides(half, reduction="sum") < 2 * ALLOWED["eager"]
    few_rows = torch.arange(LOSSES // 4, device=DEVICE)[:, None] % 16 == 0
    allowed = ALLOWED["eager"] if HAS_GPU else 2 * LOSSES
    assert _besides([input.requires_grad_(), target, few_rows], reduction="sum") < allowed
    monkeypatch.setattr(eager, "PART_NUMEL", LOSSES // 4)
    assert _besides(_dense(backend, 0)) < LOSSES + WORKSPACE


@support.on_kernel
@pytest.mark.parametrize("name", CALLS)
def test_the_host_does_not_wait(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the kernel needs of a normalizer, a mask or an upstream gradient, it loads itself.

    No operator reads a value on the host; on a GPU PyTorch itself is told to object.
    """
    ways = [call(name, 40, reduction=reduction) for reduction in REDUCTIONS]
    operands, options = ways[0]
    if isinstance(options.get("beta"), Tensor):
        ways.append((operands, {**options, "beta": None, "sigma": options["beta"]}))
    _step(operands, **options)

    def read(self: Tensor, *_: Any) -> Any:
        raise AssertionError("the host reads a tensor")

    for method in READS:
        monkeypatch.setattr(Tensor, method, read)
    try:
        with torch.autograd.profiler.profile() as profile:
            if HAS_GPU:
                torch.cuda.set_sync_debug_mode("error")
            for operands, options in ways:
                for upstream in (1.0, 2.0):
                    _step(operands, upstream, **options)
    finally:
        if HAS_GPU:
            torch.cuda.set_sync_debug_mode("default")
    found = {event.name for event in profile.function_events}
    assert "aten::empty_like" in found
    assert found.isdisjoint({f"aten::{name}" for name in WAITS})
