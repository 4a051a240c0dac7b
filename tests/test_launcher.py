"""What the launcher asks of a GPU: the right device, stream, grid, integers and workspace.

No GPU is needed for that, and most of it the interpreter, which has one device, cannot show.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from operator import is_
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_smoothl1 import smooth_l1_loss
from fused_smoothl1.problem import NO_NEEDS, Problem, make_problem
from tests.fake_gpu import MULTIPROCESSORS, FakeGpu, Launch, fake_gpu
from tests.support import FLOATS, HAS_TRITON, boxes, needs_no_gpu, needs_triton, on_kernel, values

if HAS_TRITON:
    from fused_smoothl1 import launch, launcher
    from tests.interpreter import Event, recorded

pytestmark = needs_triton

DOUBLE, FLOAT, HALF = torch.float64, torch.float32, torch.bfloat16
INPUT = (True, False, False, False, False)
SEVERAL = 100_000  # elements, of several programs


@pytest.fixture
def gpu() -> Iterator[FakeGpu]:
    with fake_gpu() as gpu:
        yield gpu


def _pair(numel: int, dtypes: Sequence[torch.dtype], device: str) -> list[Tensor]:
    return [torch.empty(numel, dtype=dtype, device=device) for dtype in dtypes]


def _problem(
    numel: int = SEVERAL,
    dtypes: Sequence[torch.dtype] = (FLOAT, FLOAT),
    device: str = "cuda:0",
    reduce: bool = True,
) -> Problem:
    pair = _pair(numel, dtypes, device)
    return make_problem(*pair, divisor_number=3.0, beta_number=0.5, reduce=reduce)


def _scale(gpu: FakeGpu, gradients: Sequence[Any], upstream: torch.dtype) -> list[Launch]:
    """Return the launches of a product with an upstream gradient, which is made in place."""
    gpu.launches.clear()
    padded = (*gradients, *[None] * (5 - len(gradients)))
    found = launch.scale(padded, torch.empty((), dtype=upstream, device=gradients[-1].device))
    assert found is not None
    assert all(map(is_, found, padded))
    return gpu.launches


def loss(gpu: FakeGpu, *arguments: Any, may_be_replayed: bool = False, **options: Any) -> Launch:
    """Return the launch of the loss of a problem, with the input's gradient."""
    launch.forward(_problem(*arguments, **options), INPUT, may_be_replayed=may_be_replayed)
    return gpu.launches[-1]


def product(
    gpu: FakeGpu,
    numel: int = SEVERAL,
    dtypes: Sequence[torch.dtype] = (FLOAT, FLOAT),
    device: str = "cuda:0",
) -> Launch:
    """Return the launch that multiplies two gradients."""
    (asked,) = _scale(gpu, _pair(numel, dtypes, device), FLOAT)
    return asked


on_each = pytest.mark.parametrize("ask", [loss, product])
Ask = Callable[..., Launch]


@on_each
def test_device_of_the_operands(ask: Ask, gpu: FakeGpu) -> None:
    """Triton launches to the current device, which need not be theirs."""
    for index in (2, 0):
        gpu.entered.clear()
        assert ask(gpu, device=f"cuda:{index}").device == index
        assert gpu.current == 0
        # To change it costs host time, where it is the current one already.
        assert gpu.entered == ([2] if index else [])


def test_workspace_of_a_stream(gpu: FakeGpu) -> None:
    """Launches on one stream follow each other, and share one; no others do."""
    found: dict[tuple[str, int], tuple[int, int]] = {}
    for place in 2 * [("cuda:0", 0), ("cuda:0", 7), ("cuda:1", 0), ("cuda:1", 7)]:
        device, gpu.stream = place
        asked = loss(gpu, device=device)
        assert asked.stream == gpu.stream
        assert found.setdefault(place, asked.workspace) == asked.workspace
        for name in ("partials_ptr", "ticket_ptr"):
            assert asked.arguments[name].device == torch.device(device)
    assert len({part for workspace in found.values() for part in workspace}) == 8


def test_workspace_has_room(gpu: FakeGpu) -> None:
    """For all programs of any later launch."""
    small, large = loss(gpu, 2048), loss(gpu, 2**31 + 5)
    assert small.workspace == large.workspace
    partials, ticket = (small.arguments[name] for name in ("partials_ptr", "ticket_ptr"))
    assert (partials.shape, partials.dtype) == ((large.programs,), torch.float64)
    assert (ticket.shape, ticket.dtype) == ((1,), torch.int32)


def test_streams_come_and_go(gpu: FakeGpu) -> None:
    """What is kept for them does not grow without end, and the streams in use keep theirs."""
    first = loss(gpu).workspace
    for gpu.stream in range(1, 1000):
        loss(gpu)
        gpu.stream = 0
        assert loss(gpu).workspace == first
    assert launch._kept_workspace.cache_info().currsize <= 256


@pytest.mark.parametrize("captured", [True, False], ids=["captured", "recorded"])
def test_workspace_in_a_graph(captured: bool, gpu: FakeGpu) -> None:
    """A graph may be replayed on any stream, so that its launches share nothing with others."""
    before = loss(gpu)
    gpu.capturing = captured
    graph = [loss(gpu, may_be_replayed=not captured) for _ in range(2)]
    gpu.capturing = False
    assert len({part for asked in (before, *graph) for part in asked.workspace}) == 6
    assert all(asked.arguments["partials_ptr"].shape == (asked.programs,) for asked in graph)
    assert loss(gpu).workspace == before.workspace


def test_device_that_captures_nothing(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not every kind of device has graphs."""
    monkeypatch.delattr(FakeGpu, "is_current_stream_capturing")
    assert loss(gpu).workspace == loss(gpu).workspace


def test_another_thread_allocates(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the caller's stream; whose own thread may be allocating from the memory of a graph."""
    caller, new_workspace = threading.get_ident(), launch._new_workspace
    allocations: list[tuple[bool, int]] = []

    def allocate(*arguments: Any) -> Any:
        allocations.append((threading.get_ident() == caller, gpu.stream))
        return new_workspace(*arguments)

    monkeypatch.setattr(launch, "_new_workspace", allocate)
    gpu.stream = 7
    for _ in range(2):
        loss(gpu)
    assert allocations == [(False, 7)]


def test_no_workspace(gpu: FakeGpu) -> None:
    """Where there is nothing to add up: one program, one loss an element, gradients alone."""
    launch.forward(_problem(1024), INPUT)
    launch.forward(_problem(reduce=False), NO_NEEDS)
    several, upstream = _problem(), torch.empty((), device="cuda:0")
    launch.recompute(several, launch.backward(several, upstream, INPUT), upstream, INPUT)
    assert [asked.workspace for asked in gpu.launches] == [(id(None), id(None))] * 4
    assert not launch._kept_workspace.cache_info().currsize


@on_each
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_grid(dtype: torch.dtype, ask: Ask, gpu: FakeGpu) -> None:
    """A program for each tile, until they fill the GPU; 64 bits if the last tile's end needs it."""
    tile = min(4096 // dtype.itemsize, 1024 if ask is loss else 4096)
    most, last = 8 * MULTIPROCESSORS, 2**31 - 1
    for numel, programs in [(1, 1), (tile, 1), (tile + 1, 2), (most * tile, most), (2**31, most)]:
        asked = ask(gpu, numel, (dtype, dtype))
        assert (asked.programs, asked.arguments["BLOCK"]) == (programs, tile)
        assert asked.arguments["numel"] == numel
    for numel, index in [(last - tile, "int32"), (last - tile + 1, "int64"), (2**31, "int64")]:
        assert str(ask(gpu, numel, (dtype, dtype)).arguments["INDEX"]) == index


@pytest.mark.parametrize("narrow", FLOATS, ids=str)
def test_narrowest_decides(narrow: torch.dtype, gpu: FakeGpu) -> None:
    """Of dense operands, and of gradients: each is accessed as wide as the others."""
    for dtypes in [(DOUBLE, narrow), (narrow, DOUBLE)]:
        assert loss(gpu, SEVERAL, dtypes).arguments["LANES"] == 16 // narrow.itemsize
        assert product(gpu, SEVERAL, dtypes).arguments["BLOCK"] == 4096 // narrow.itemsize


@pytest.mark.parametrize(
    ("device", "name"), [("cuda:0", "multi_processor_count"), ("xpu:0", "max_compute_units")]
)
def test_size_of_a_gpu_on_every_vendor(
    device: str, name: str, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a multiprocessor is called differs."""
    properties = SimpleNamespace(**{name: 132})
    monkeypatch.setattr(FakeGpu, "get_device_properties", lambda *_: properties)
    assert launcher.gpu_of(torch.device(device)).multiprocessors == 132


@on_each
@pytest.mark.parametrize(("warp_size", "warps"), [(32, 4), (64, 2)])
def test_128_threads(warp_size: int, warps: int, ask: Ask) -> None:
    with fake_gpu(warp_size) as gpu:
        # (Fused multiply-add gains nothing: bench/RESULTS.md. Triton's default for it changes.)
        assert ask(gpu).options == {"num_warps": warps, "enable_fp_fusion": False}


@pytest.mark.parametrize(
    ("dtypes", "numel", "upstream", "is_kernel"),
    [
        ([FLOAT], 2**20 - 1, FLOAT, False),
        ([FLOAT], 2**20, FLOAT, True),
        ([DOUBLE], 4, DOUBLE, False),
        ([FLOAT, FLOAT], 4, FLOAT, True),
        ([None, HALF], 4, FLOAT, True),
        ([HALF], 4, FLOAT, True),
        ([FLOAT], 4, DOUBLE, True),
    ],
    ids=str,
)
def test_product_by_pytorch_or_by_a_kernel(
    dtypes: list[Any], numel: int, upstream: torch.dtype, is_kernel: bool, gpu: FakeGpu
) -> None:
    """PyTorch's is quicker on the host where it is small, and alone if the dtypes are the same."""
    gradients = [one and torch.empty(numel, device="cuda:0", dtype=one) for one in dtypes]
    launches = _scale(gpu, gradients, upstream)
    assert [asked.arguments["COMPUTE"] for asked in launches] == (
        [launch.TRITON_DTYPES[upstream]] if is_kernel else []
    )
    assert all(asked.arguments["gradients"] == (*gradients, None)[:2] for asked in launches)
    assert gradients[-1]._version == (0 if is_kernel else 1)


@needs_no_gpu
@on_kernel
@pytest.mark.parametrize("masked", [False, True])
def test_upstream_gradient_of_1(masked: bool) -> None:
    """What the forward pass computed is left as it is: nothing but this number is read for it."""
    weights = values(9, 1)
    operands = boxes(9, weights > 0 if masked else weights, grad=2)
    only_that = {Event("load", "operands[5]" if masked else "upstream_ptr")}
    for upstream in (1.0, 2.0):
        value = smooth_l1_loss(*operands, reduction="sum")
        with recorded() as events:
            torch.autograd.grad(value, operands[:2], torch.tensor(upstream))
        assert ({*events} == only_that) == (upstream == 1.0)


@needs_no_gpu
@on_kernel
@pytest.mark.parametrize("place", [2, 3], ids=["inside", "outside"])
def test_what_masks_exclude_is_not_loaded(place: int) -> None:
    operands = [*boxes(9), None, None]
    operands[place] = torch.zeros(9, 1, dtype=torch.bool)
    with recorded() as events:
        smooth_l1_loss(*operands, beta=torch.ones(9, 1))
    assert {name for kind, name in events if kind == "load"} == {f"operands[{place}]"}


@needs_no_gpu
@on_kernel
def test_order_around_the_ticket() -> None:
    """Each partial sum is stored, then there is a barrier, then the ticket is drawn.

    Newer versions of Triton put a barrier there by themselves, older ones do not.
    """
    with recorded() as events:
        smooth_l1_loss(*boxes(2500, grad=0))
    names = {"partials_ptr", "ticket_ptr", "loss_ptr", ""}
    program = [("store", "partials_ptr"), ("barrier", ""), ("atomic", "ticket_ptr")]
    last = [("load", "partials_ptr"), ("store", "loss_ptr"), ("store", "ticket_ptr")]
    assert [event for event in events if event.argument in names] == program * 8 + last
