"""What the launcher asks of a GPU: the right device, stream, grid, integers and workspace.

No GPU is needed for that, and most of it the interpreter, which has one device, cannot show.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_smoothl1 import smooth_l1_loss
from fused_smoothl1.problem import NO_NEEDS, NoKernelError, Problem, make_problem
from tests import support
from tests.fake_gpu import MULTIPROCESSORS, FakeGpu, Launch, fake_gpu
from tests.support import FLOATS, HAS_TRITON, boxes, values

if HAS_TRITON:
    from fused_smoothl1 import launch, launcher
    from tests.interpreter import events

pytestmark = support.needs_triton

DOUBLE, FLOAT, HALF = torch.float64, torch.float32, torch.bfloat16
INPUT = (True, False, False, False, False)
SEVERAL = 100_000  # elements, of several programs
MOST = 8 * MULTIPROCESSORS


@pytest.fixture
def gpu() -> Iterator[FakeGpu]:
    with fake_gpu() as gpu:
        yield gpu


def _pair(
    numel: int = SEVERAL, dtypes: Sequence[torch.dtype] = (FLOAT, FLOAT), device: str = "cuda:0"
) -> list[Tensor]:
    return [torch.empty(numel, dtype=dtype, device=device) for dtype in dtypes]


def _problem(pair: Sequence[Tensor], reduce: bool = True) -> Problem:
    return make_problem(pair[0], pair[1], divisor_number=3.0, beta_number=0.5, reduce=reduce)


def _scaled(gpu: FakeGpu, gradients: Sequence[Any], upstream: torch.dtype) -> list[Launch]:
    """Return the launches of a product in place with an upstream gradient."""
    gpu.launches.clear()
    padded = (*gradients, *[None] * (5 - len(gradients)))
    above = torch.empty((), dtype=upstream, device=gradients[-1].device)
    found = launch.scale(padded, above, has_masks=False)
    assert [*map(id, found or ())] == [*map(id, padded)]
    return gpu.launches


def loss(gpu: FakeGpu, *size: Any, may_be_replayed: bool = False, **options: Any) -> Launch:
    """Return the launch of a loss and the input's gradient."""
    launch.forward(_problem(_pair(*size, **options)), INPUT, may_be_replayed=may_be_replayed)
    return gpu.launches[-1]


def product(gpu: FakeGpu, *size: Any, **options: Any) -> Launch:
    """Return the launch that multiplies two gradients."""
    return _scaled(gpu, _pair(*size, **options), FLOAT)[0]


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
    """Launches on one stream follow each other, and share one that has room for all; no others."""
    found: dict[tuple[str, int], tuple[int, int]] = {}
    for numel in (2048, 2**31 + 5):
        for place in [("cuda:0", 0), ("cuda:0", 7), ("cuda:1", 0), ("cuda:1", 7)]:
            device, gpu.stream = place
            asked = loss(gpu, numel, device=device)
            assert asked.stream == gpu.stream
            assert found.setdefault(place, asked.workspace) == asked.workspace
            partials, ticket = asked.arguments["partials_ptr"], asked.arguments["ticket_ptr"]
            assert str(partials.device) == str(ticket.device) == device
            assert (partials.dtype, ticket.dtype) == (torch.float64, torch.int32)
            assert (partials.shape, ticket.shape) == ((MOST,), (1,))
    assert len({part for workspace in found.values() for part in workspace}) == 8


def test_streams_come_and_go(gpu: FakeGpu) -> None:
    """What is kept for them does not grow without end, and the streams in use keep theirs."""
    first = loss(gpu).workspace
    for stream in range(1, 1000):
        gpu.stream = stream
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
    new_workspace, allocations = launch._new_workspace, []

    def allocate(*arguments: Any) -> Any:
        allocations.append((threading.get_ident(), gpu.stream))
        return new_workspace(*arguments)

    monkeypatch.setattr(launch, "_new_workspace", allocate)
    gpu.stream = 7
    for _ in range(2):
        loss(gpu)
    ((thread, stream),) = allocations
    assert thread != threading.get_ident()
    assert stream == 7


def test_one_thread_compiles_at_a_time() -> None:
    meeting = threading.Barrier(2)

    def warmup(**_: Any) -> None:
        meeting.wait(timeout=0.5)

    def load() -> str:
        kernel: Any = SimpleNamespace(warmup=warmup)
        code = launcher.Code(launcher.gpu_of(torch.device("cpu")), kernel, tuple, 4)
        with pytest.raises(NoKernelError) as caught:
            code._load(())
        return str(caught.value)

    with ThreadPoolExecutor() as pool:
        told = [pool.submit(load) for _ in range(2)]
    assert all("BrokenBarrierError" in one.result() for one in told), "two of them met"


def test_no_workspace(gpu: FakeGpu) -> None:
    """Where there is nothing to add up: one program, one loss an element, gradients alone."""
    loss(gpu, 1024)
    launch.forward(_problem(_pair(), reduce=False), NO_NEEDS)
    several, upstream = _problem(_pair()), torch.empty((), device="cuda:0")
    launch.recompute(several, launch.backward(several, upstream, INPUT), upstream, INPUT)
    assert [asked.workspace for asked in gpu.launches] == [(id(None), id(None))] * 4
    assert not launch._kept_workspace.cache_info().currsize


@on_each
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_grid(dtype: torch.dtype, ask: Ask, gpu: FakeGpu) -> None:
    """A program for each tile, until they fill the GPU; 64 bits if the last tile's end needs it."""
    tile = min(4096 // dtype.itemsize, 1024 if ask is loss else 4096)
    for numel, programs in [(1, 1), (tile, 1), (tile + 1, 2), (MOST * tile, MOST), (2**31, MOST)]:
        asked = ask(gpu, numel, (dtype, dtype))
        arguments = asked.arguments
        assert (asked.programs, arguments["numel"], arguments["BLOCK"]) == (programs, numel, tile)
    for numel, index in [(2**31 - 1 - tile, "int32"), (2**31 - tile, "int64"), (2**31, "int64")]:
        assert str(ask(gpu, numel, (dtype, dtype)).arguments["INDEX"]) == index


@pytest.mark.parametrize("narrow", FLOATS, ids=str)
def test_narrowest_decides(narrow: torch.dtype, gpu: FakeGpu) -> None:
    """Of dense operands, and of gradients: it is accessed as wide as the others."""
    for dtypes in [(DOUBLE, narrow), (narrow, DOUBLE)]:
        assert loss(gpu, SEVERAL, dtypes).arguments["LANES"] == 16 // narrow.itemsize
        assert product(gpu, SEVERAL, dtypes).arguments["BLOCK"] == 4096 // narrow.itemsize


@pytest.mark.parametrize("device", ["cuda:0", "xpu:0"])
def test_size_of_a_gpu(device: str, gpu: FakeGpu) -> None:
    """What a multiprocessor is called differs from vendor to vendor."""
    assert launcher.gpu_of(torch.device(device)).multiprocessors == MULTIPROCESSORS


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
    launches = _scaled(gpu, gradients, upstream)
    assert [len(launches), gradients[-1]._version] == ([1, 0] if is_kernel else [0, 1])
    for asked in launches:
        assert asked.arguments["COMPUTE"] == launch.TRITON_DTYPES[upstream]
        assert asked.arguments["gradients"] == (*gradients, None)[:2]


@support.needs_no_gpu
@support.on_kernel
@pytest.mark.parametrize("masked", [False, True])
def test_upstream_gradient_of_1(masked: bool) -> None:
    """What the forward pass computed is left as it is: nothing but this number is read for it."""
    weights = values(9, 1)
    operands = boxes(9, weights > 0 if masked else weights, grad=2)
    for upstream in (1.0, 2.0):
        total = smooth_l1_loss(*operands, reduction="sum")
        torch.autograd.grad(total, operands[:2], torch.tensor(upstream))
        is_all = {*events} == {("load", "operands[5]" if masked else "upstream_ptr")}
        assert is_all == (upstream == 1.0)


@support.needs_no_gpu
@support.on_kernel
@pytest.mark.parametrize("place", [2, 3], ids=["inside", "outside"])
def test_what_masks_exclude_is_not_loaded(place: int) -> None:
    operands = [*boxes(9), None, None]
    operands[place] = torch.zeros(9, 1, dtype=torch.bool)
    smooth_l1_loss(*operands, beta=torch.ones(9, 1))
    assert {name for kind, name in events if kind == "load"} == {f"operands[{place}]"}


@support.needs_no_gpu
@support.on_kernel
def test_order_around_the_ticket() -> None:
    """Each partial sum is stored, then there is a barrier, then the ticket is drawn.

    Newer versions of Triton put a barrier there by themselves, older ones do not.
    """
    smooth_l1_loss(*boxes(2500))
    program = [("store", "partials_ptr"), ("barrier", ""), ("atomic", "ticket_ptr")]
    last = [("load", "partials_ptr"), ("store", "loss_ptr"), ("store", "ticket_ptr")]
    names = {name for _, name in program + last}
    assert [event for event in events if event[1] in names] == program * 8 + last
