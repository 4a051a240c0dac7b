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
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fused_smoothl1 import eager, smooth_l1_loss

WORKSPACE = 64 * 1024 if torch.cuda.is_available() else 6 * 1024
LOSSES = 2**22


@pytest.fixture(scope="module", autouse=True)
def _quick_collections() -> Iterator[None]:
    """Spare each collection below the hundreds of thousands of objects that PyTorch is made of."""
    gc.freeze()
    yield
    gc.unfreeze()


def _filled(
    *shape: int,
    device: str,
    dtype: torch.dtype = torch.float32,
    requires_grad: bool = False,
) -> Tensor:
    return torch.ones(shape, dtype=dtype, device=device, requires_grad=requires_grad)


class Usage:
    """Bytes, as they were when the watched block ended."""

    peak = 0
    kept = 0


@contextmanager
def _watched(device: str) -> Iterator[Usage]:
    """Measure the most bytes that were allocated at once, and those that still are."""
    usage = Usage()
    gc.collect()  # Triton's interpreter leaves cycles of references to its last operands.
    if device == "cuda":
        # (The thread of a backward pass holds on to what it did last.)
        with torch.enable_grad():
            torch.zeros((), device=device, requires_grad=True).exp().backward()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # A block that it keeps would be handed out, and counted, whole.
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        yield usage
        torch.cuda.synchronize()
        usage.peak = torch.cuda.max_memory_allocated() - before
        usage.kept = torch.cuda.memory_allocated() - before
        return
    profile: Any = torch.autograd.profiler.profile(profile_memory=True)
    with profile:
        yield usage
        gc.collect()
    events = [e for e in profile.kineto_results.events() if e.name() == "[memory]"]
    assert events, "the profiler saw no allocation"
    for event in sorted(events, key=lambda e: e.start_ns()):
        usage.kept += event.nbytes()
        usage.peak = max(usage.peak, usage.kept)


def _size(backend: str, device: str) -> int:
    """Return elements so many that their copy, even in bytes, exceeds what is allowed besides."""
    if backend == "eager":
        return LOSSES
    return 1 << 13 if device == "cpu" else 1 << 24


def _allowed(backend: str, buffers: int = 1) -> int:
    return WORKSPACE + (buffers * 4 * LOSSES if backend == "eager" else 0)


def _step(operands: list[Any], upstream: float, **options: Any) -> list[Tensor]:
    loss = smooth_l1_loss(*operands, **options)
    sources = [t for t in operands if isinstance(t, Tensor) and t.requires_grad]
    above = torch.full_like(loss, upstream) if loss.dim() == 0 else loss.detach()
    return [loss, *torch.autograd.grad(loss, sources, above)]


def _peak(operands: list[Any], device: str, upstream: float = 1.0, **options: Any) -> int:
    _step(operands, upstream, **options)  # Workspaces are made once and kept.
    with _watched(device) as usage:
        results = _step(operands, upstream, **options)
    assert len(results) > 1
    return usage.peak


def test_the_instrument_sees_a_copy(device: str) -> None:
    values = torch.zeros(1 << 20, device=device)
    with _watched(device) as usage:
        copy = values.clone()
        del copy
    assert usage.peak == values.numel() * 4
    assert usage.kept == 0


@pytest.mark.parametrize("upstream", [1.0, 2.0])
@pytest.mark.parametrize("reduction", ["sum", "mean", "batchmean"])
def test_dense_call_allocates_one_gradient(
    reduction: str, upstream: float, backend: str, device: str
) -> None:
    n = _size(backend, device)
    operands = [_filled(n, device=device, requires_grad=i == 0) for i in range(4)]
    peak = _peak(operands, device, upstream, reduction=reduction)
    assert 4 * n <= peak < 4 * n + _allowed(backend)


def test_losses_are_held_in_parts(eager_backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """So what eager PyTorch needs beside a large gradient does not grow with it."""
    monkeypatch.setattr(eager, "PART", LOSSES // 4)
    operands = [_filled(LOSSES // 4, 4, device="cpu", requires_grad=i == 0) for i in range(4)]
    assert _peak(operands, "cpu") < 5 * LOSSES + WORKSPACE


def test_few_rows_need_no_buffers(eager_backend: str) -> None:
    """Where a mask selects few rows, these are gathered."""
    operands = [_filled(LOSSES // 4, 4, device="cpu", requires_grad=i == 0) for i in range(2)]
    mask = (torch.arange(LOSSES // 4) % 16 == 0)[:, None]
    assert _peak([*operands, mask], "cpu", 2.0, reduction="sum") < 4 * LOSSES * 1.5


def _columns(*shape: int, device: str) -> Tensor:
    return _filled(*shape[:-1], 2 * shape[-1], device=device)[..., ::2].detach()


CASES: dict[str, Callable[[int, str], list[Any]]] = {
    "no weights": lambda n, d: [],
    "row mask": lambda n, d: [_filled(n // 64, 1, dtype=torch.bool, device=d)],
    "full mask": lambda n, d: [_filled(n // 64, 64, dtype=torch.bool, device=d)],
    "two masks": lambda n, d: [
        _filled(n // 64, 1, dtype=torch.bool, device=d),
        _filled(64, dtype=torch.bool, device=d).to(torch.uint8),
    ],
    "broadcast weights": lambda n, d: [
        _filled(n // 64, 1, device=d),
        _filled(1, 64, device=d),
    ],
    "single values": lambda n, d: [torch.tensor(2.0, device=d), 0.5],
    "expanded weights": lambda n, d: [
        _filled(n // 64, 1, device=d).expand(n // 64, 64),
        _filled(64, device=d).expand(n // 64, 64),
    ],
    "strided weights": lambda n, d: [
        _columns(n // 64, 64, device=d),
        _filled(64, n // 64, device=d).t(),
    ],
    "integer weights": lambda n, d: [
        _filled(n // 64, 64, dtype=torch.bool, device=d).to(torch.int64),
        _filled(n // 64, 64, dtype=torch.bool, device=d).to(torch.int8),
    ],
    "float16 weights": lambda n, d: [
        _filled(n // 64, 64, dtype=torch.float16, device=d),
        _filled(n // 64, 1, dtype=torch.bfloat16, device=d),
    ],
}
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "dense": lambda t: t,
    "columns": lambda t: t.repeat_interleave(2, dim=1)[:, ::2],
    "transposed": lambda t: t.t().contiguous().t(),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_operand_is_copied(layout: str, case: str, backend: str, device: str) -> None:
    n = _size(backend, device)
    input, target = (LAYOUTS[layout](_filled(n // 64, 64, device=device)) for seed in (1, 2))
    operands = [input.detach().requires_grad_(), target, *CASES[case](n, device)]
    peak = _peak(operands, device, 2.0, reduction="sum")
    # (PyTorch's operators convert weights of another dtype while they multiply by them.)
    buffers = 2 if case in ("integer weights", "float16 weights") else 1
    assert peak < 4 * n + _allowed(backend, buffers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(), (-1, 1), (64,), (-1, 64)], ids=str)
def test_beta_is_not_copied(
    shape: tuple[int, ...], dtype: torch.dtype, triton_backend: str, device: str
) -> None:
    """Eager PyTorch makes its inverse, in its own shape."""
    rows = _size(triton_backend, device) // 64
    operands = [_filled(rows, 64, device=device, requires_grad=i == 0) for i in range(2)]
    own = (rows if size == -1 else size for size in shape)
    peak = _peak(operands, device, 2.0, beta=_filled(*own, dtype=dtype, device=device))
    assert peak < 4 * rows * 64 + _allowed(triton_backend)


@pytest.mark.parametrize("mixed", [torch.float16, torch.bfloat16])
def test_operands_are_not_converted_together(mixed: torch.dtype, backend: str, device: str) -> None:
    n = _size(backend, device)
    operands = [
        _filled(n, dtype=mixed, device=device, requires_grad=True),
        _filled(n, device=device),
        _filled(n, dtype=mixed, device=device),
    ]
    # (Eager PyTorch holds the weighted difference in float32, and one operand at a time.)
    assert _peak(operands, device, 2.0, reduction="sum") < 2 * n + _allowed(backend, buffers=2)


def test_none_allocates_the_loss_and_the_gradient(backend: str, device: str) -> None:
    n = _size(backend, device)
    operands = [_filled(n, device=device, requires_grad=i == 0) for i in range(4)]
    assert _peak(operands, device, reduction="none") < 8 * n + _allowed(backend)


@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize("needed", [(0,), (1,), (0, 1)], ids=str)
def test_only_needed_gradients_are_allocated(
    needed: tuple[int, ...], reduction: str, backend: str, device: str
) -> None:
    """A second buffer is there if two are asked for, and only then."""
    n = _size(backend, device)
    operands = [_filled(n, device=device, requires_grad=i in needed) for i in range(4)]
    peak = _peak(operands, device, reduction=reduction)
    results = len(needed) + (reduction == "none")
    assert 4 * n * results <= peak < 4 * n * results + _allowed(backend)


def test_forward_without_gradients_allocates_nothing(backend: str, device: str) -> None:
    n = _size(backend, device)
    operands = [_filled(n, device=device, requires_grad=True) for i in range(4)]
    with torch.no_grad():
        smooth_l1_loss(*operands)
        with _watched(device) as usage:
            loss = smooth_l1_loss(*operands)
    assert loss.isfinite()
    # (In eager PyTorch, the weighted difference and the losses.)
    assert usage.peak < _allowed(backend, buffers=2)


def test_nothing_stays_behind(backend: str, device: str) -> None:
    """After the step, what it allocated is free again: no cache grows with the calls."""
    n = _size(backend, device) // 8
    operands = [_filled(n, device=device, requires_grad=i < 2) for i in range(4)]
    _step(operands, 2.0)
    with _watched(device) as usage:
        for _ in range(3):
            _step(operands, 2.0)
    assert usage.kept == 0


class _Reads(TorchDispatchMode):
    """Record every operator that would make the host wait for a device."""

    SYNCS = ("aten._local_scalar_dense", "aten.equal", "aten.nonzero", "aten.is_nonzero")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        moved = name.startswith("aten._to_copy") and (kwargs or {}).get("device") is not None
        if name.startswith(self.SYNCS) or moved:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


def test_kernel_path_has_no_host_synchronisation(triton_backend: str, device: str) -> None:
    """No operator reads a value on the host; on a GPU PyTorch itself is told to object."""
    operands = [_filled(40, 5, device=device, requires_grad=i == 0) for i in range(3)]
    count, betas = torch.tensor(7, device=device), _filled(40, 1, device=device)
    smooth_l1_loss(*operands)
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        for weights in ([], [_filled(40, 1, dtype=torch.bool, device=device)]):
            reductions = ({"reduction": "none"}, {"reduction": "sum", "normalizer": count})
            ways: list[dict[str, Any]] = [{}, {"beta": betas}, {"sigma": betas}]
            transitions = [*ways, {"beta": betas.mean()}]
            for own, transition in itertools.product(reductions, transitions):
                options: dict[str, Any] = {**own, **transition}
                for upstream in (1.0, 2.0):
                    with _Reads() as reads:
                        loss = smooth_l1_loss(*operands, *weights, **options)
                        loss.backward(torch.full_like(loss, upstream))
                    assert reads.found == []
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")
