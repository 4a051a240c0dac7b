"""What the launcher asks of a GPU: the right device, stream, grid, integers and workspace.

No GPU is needed for that, and most of it the interpreter, which has one device, cannot show.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import fake_tensor

from fused_smoothl1 import smooth_l1_loss
from fused_smoothl1.problem import NO_NEEDS, NoKernelError, Problem, make_problem
from tests import support
from tests.support import FLOATS, HAS_TRITON, boxes, coin, values

if HAS_TRITON:
    from fused_smoothl1 import launch, launcher
    from tests.interpreter import events

pytestmark = support.needs_triton

DOUBLE, FLOAT, BFLOAT = torch.float64, torch.float32, torch.bfloat16
INPUT = (True, False, False, False, False)
SEVERAL = 100_000  # elements, of several programs
MULTIPROCESSORS = 10
MOST = 8 * MULTIPROCESSORS


class FakeGpu(threading.local):
    """GPUs that are not there, as PyTorch's module for them; what they launch is written down.

    Each thread has a current device of its own, and a stream: a number, the same on all devices.
    """

    current = stream = 0
    capturing = False
    warp_size = 32

    def __init__(self, launches: list[Any], allocated: list[tuple[int, int]]) -> None:
        self.launches = launches  # the arguments, number of programs, options and place of each
        self.allocated = allocated  # the thread and the stream of each workspace

    def current_device(self) -> int:
        return self.current

    @contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        before, self.current = self.current, device.index
        yield
        self.current = before

    def current_stream(self, device: torch.device) -> Any:
        return SimpleNamespace(stream_id=self.stream, device_index=device.index)

    def set_stream(self, stream: Any) -> None:
        self.stream = stream.stream_id

    def is_current_stream_capturing(self) -> bool:
        return self.capturing

    def get_device_properties(self, device: torch.device) -> Any:
        name = "max_compute_units" if device.type == "xpu" else "multi_processor_count"
        return SimpleNamespace(**{name: MULTIPROCESSORS})

    # The next two are of Triton's driver.
    def get_current_target(self) -> Any:
        return SimpleNamespace(warp_size=self.warp_size, backend="cuda")

    def get_current_stream(self, device: int) -> int:
        return self.stream

    def launch(self, code: Any, programs: int, stream: int, *given: Any) -> None:
        """Stand in for `Code.launch`."""
        tensors, _, others = given
        arguments = zip(code.kernel.arg_names, (*code.grouped(tensors), *others), strict=True)
        asked = SimpleNamespace(programs=programs, device=self.current, stream=stream)
        vars(asked).update(arguments, options=code.options)
        self.launches.append(asked)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGpu]:
    """Let the launcher see as many GPUs as it asks for, and make all new tensors fake ones."""
    gpu, mode = FakeGpu([], []), fake_tensor.FakeTensorMode()
    new_workspace = launch._new_workspace

    def new_fake_workspace(device: torch.device, programs: int) -> Any:
        gpu.allocated.append((threading.get_ident(), gpu.stream))
        with mode:  # Also in the thread that has been started for it.
            return new_workspace(device, programs)

    def forget() -> None:
        for function in (launcher.gpu_of, launch._scalar, launch._kept_workspace):
            function.cache_clear()

    monkeypatch.setattr(torch, "get_device_module", lambda _: gpu)
    # On a machine with a GPU, fake tensors start the device up that they are said to be on.
    monkeypatch.setattr(fake_tensor, "init_gpu_context", lambda _: None)
    monkeypatch.setattr(fake_tensor.FakeTensor, "data_ptr", lambda self: 4096, raising=False)
    triton = SimpleNamespace(runtime=SimpleNamespace(driver=SimpleNamespace(active=gpu)))
    monkeypatch.setattr(launcher, "triton", triton)
    knobs = SimpleNamespace(runtime=SimpleNamespace(interpret=False))
    monkeypatch.setattr(launcher, "knobs", knobs)
    monkeypatch.setattr(launch, "_new_workspace", new_fake_workspace)
    monkeypatch.setattr(launcher.Code, "launch", lambda *arguments: gpu.launch(*arguments))
    forget()
    with mode:
        yield gpu
    forget()


def _pair(
    numel: int = SEVERAL, dtypes: Sequence[Any] = (FLOAT, FLOAT), device: str = "cuda:0"
) -> list[Any]:
    return [dtype and torch.empty(numel, dtype=dtype, device=device) for dtype in dtypes]


def _problem(pair: Sequence[Tensor], reduce: bool = True) -> Problem:
    return make_problem(pair[0], pair[1], divisor_number=3.0, beta_number=0.5, reduce=reduce)


def _workspace(asked: Any) -> tuple[int, int]:
    """Return which partial sums and which ticket a launch was given."""
    return id(asked.partials_ptr), id(asked.ticket_ptr)


def loss(gpu: FakeGpu, *size: Any, may_be_replayed: bool = False, **options: Any) -> Any:
    """Return the launch of a loss and the input's gradient."""
    launch.forward(_problem(_pair(*size, **options)), INPUT, may_be_replayed=may_be_replayed)
    return gpu.launches[-1]


def product(gpu: FakeGpu, *size: Any, **options: Any) -> Any:
    """Return the launch that multiplies two gradients."""
    gradients = _pair(*size, **options)
    above = torch.empty((), device=gradients[0].device)
    launch.scale((*gradients, None, None, None), above, has_masks=False)
    return gpu.launches[-1]


on_each = pytest.mark.parametrize("ask", [loss, product])
Ask = Callable[..., Any]


@on_each
def test_device_of_the_operands(ask: Ask, gpu: FakeGpu) -> None:
    """Triton launches to the current device, which need not be theirs."""
    for index in (2, 0):
        assert ask(gpu, device=f"cuda:{index}").device == index
        assert gpu.current == 0


def test_workspace_of_a_stream(gpu: FakeGpu) -> None:
    """Launches on one stream follow each other, and share one that has room for all; no others.

    Another thread allocates it, on that stream: the caller's own may be allocating from the memory
    of a graph.
    """
    found: dict[tuple[str, int], tuple[int, int]] = {}
    for numel in (2048, 2**31 + 5):
        for place in [("cuda:0", 0), ("cuda:0", 7), ("cuda:1", 0), ("cuda:1", 7)]:
            device, gpu.stream = place
            asked = loss(gpu, numel, device=device)
            assert asked.stream == gpu.stream
            assert found.setdefault(place, _workspace(asked)) == _workspace(asked)
            partials, ticket = asked.partials_ptr, asked.ticket_ptr
            assert str(partials.device) == str(ticket.device) == device
            assert (partials.dtype, ticket.dtype) == (torch.float64, torch.int32)
            assert (partials.shape, ticket.shape) == ((MOST,), (1,))
    assert len({part for workspace in found.values() for part in workspace}) == 8
    threads, streams = zip(*gpu.allocated, strict=True)
    assert threading.get_ident() not in threads
    assert streams == (0, 7, 0, 7)


def test_streams_come_and_go(gpu: FakeGpu) -> None:
    """What is kept for them does not grow without end, and the streams in use keep theirs."""
    first = _workspace(loss(gpu))
    for stream in range(1, 1000):
        gpu.stream = stream
        loss(gpu)
        gpu.stream = 0
        assert _workspace(loss(gpu)) == first
    assert launch._kept_workspace.cache_info().currsize <= 256


def test_workspace_in_a_graph(gpu: FakeGpu) -> None:
    """A graph may be replayed on any stream, so that its launches share nothing with others."""
    before = loss(gpu)
    graph = [loss(gpu, may_be_replayed=True) for _ in range(2)]
    gpu.capturing = True
    graph += [loss(gpu) for _ in range(2)]
    gpu.capturing = False
    assert len({part for asked in (before, *graph) for part in _workspace(asked)}) == 10
    assert all(asked.partials_ptr.shape == (asked.programs,) for asked in graph)
    assert _workspace(loss(gpu)) == _workspace(before)


def test_no_workspace(gpu: FakeGpu) -> None:
    """Where there is nothing to add up: one program, one loss an element, gradients alone."""
    loss(gpu, 1024)
    launch.forward(_problem(_pair(), reduce=False), NO_NEEDS)
    several, upstream = _problem(_pair()), torch.empty((), device="cuda:0")
    launch.recompute(several, launch.backward(several, upstream, INPUT), upstream, INPUT)
    assert [_workspace(asked) for asked in gpu.launches] == [(id(None), id(None))] * 4
    assert not gpu.allocated


def test_other_vendors(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """Intel has another word for a multiprocessor, and not always graphs; AMD has larger warps."""
    monkeypatch.delattr(FakeGpu, "is_current_stream_capturing")
    gpu.warp_size = 64
    for ask in (loss, product):
        asked = ask(gpu, 2**31, device="xpu:0")
        assert (asked.programs, asked.options["num_warps"]) == (MOST, 2)


@on_each
@pytest.mark.parametrize("narrow", FLOATS, ids=str)
def test_grid(narrow: torch.dtype, ask: Ask, gpu: FakeGpu) -> None:
    """A program for each tile, until they fill the GPU; 64 bits if the last tile's end needs it.

    The narrowest type decides how large a tile is: it is accessed as wide as the others.
    """
    lanes, tile = 16 // narrow.itemsize, 4096 // narrow.itemsize
    tile = min(tile, 1024) if ask is loss else tile
    for dtypes in [(narrow, narrow), (DOUBLE, narrow), (narrow, DOUBLE)]:
        for numel, programs in [(1, 1), (tile, 1), (tile + 1, 2), (MOST * tile, MOST)]:
            asked = ask(gpu, numel, dtypes)
            found = asked.programs, asked.numel, asked.BLOCK
            assert found == (programs, numel, tile)
            assert getattr(asked, "LANES", lanes) == lanes
            # (Fused multiply-add gains nothing: bench/RESULTS.md. Triton's default changes.)
            assert asked.options == {"num_warps": 4, "enable_fp_fusion": False}
        for numel, index in [(2**31 - 1 - tile, "int32"), (2**31 - tile, "int64")]:
            asked = ask(gpu, numel, dtypes)
            assert (asked.programs, str(asked.INDEX)) == (MOST, index)


def test_product_by_pytorch_or_by_a_kernel(gpu: FakeGpu) -> None:
    """By PyTorch's `mul_` for one small gradient of the upstream gradient's dtype."""
    cases: list[tuple[list[Any], int, torch.dtype, bool]] = [
        ([FLOAT, None], 2**20 - 1, FLOAT, False),
        ([FLOAT, None], 2**20, FLOAT, True),
        ([DOUBLE, None], 4, DOUBLE, False),
        ([FLOAT, FLOAT], 4, FLOAT, True),
        ([None, BFLOAT], 4, FLOAT, True),
        ([BFLOAT, None], 4, FLOAT, True),
        ([FLOAT, None], 4, DOUBLE, True),
    ]
    for dtypes, numel, upstream, is_kernel in cases:
        gpu.launches.clear()
        gradients: Any = (*_pair(numel, dtypes), None, None, None)
        above = torch.empty((), dtype=upstream, device="cuda:0")
        scaled: Any = launch.scale(gradients, above, has_masks=False)
        assert scaled is gradients
        versions = {gradient._version for gradient in gradients if gradient is not None}
        assert [len(gpu.launches), versions] == ([1, {0}] if is_kernel else [0, {1}])
        for asked in gpu.launches:
            found = asked.COMPUTE, asked.gradients
            assert found == (launch.TRITON_DTYPES[upstream], gradients[:2])


def test_one_thread_compiles_at_a_time() -> None:
    meeting = threading.Barrier(2)
    kernel: Any = SimpleNamespace(warmup=lambda **_: meeting.wait(timeout=0.5))

    def load(_: int) -> None:
        code = launcher.Code(launcher.gpu_of(torch.device("cpu")), kernel, tuple, 4)
        with pytest.raises(NoKernelError, match="BrokenBarrierError"):  # None came to meet it.
            code._load(())

    with ThreadPoolExecutor() as pool:
        list(pool.map(load, range(2)))


@support.needs_no_gpu
@support.on_kernel
@pytest.mark.parametrize("place", [2, 3], ids=["inside", "outside"])
def test_what_is_not_loaded(place: int) -> None:
    """What a mask excludes; and with an upstream gradient of 1, anything but that gradient."""
    operands = [*boxes(9, grad=2), None, None]
    operands[place] = torch.zeros(9, 1, dtype=torch.bool)
    smooth_l1_loss(*operands, beta=torch.ones(9, 1))
    assert {name for kind, name in events if kind == "load"} == {f"operands[{place}]"}
    # (A product reads it by a pointer, under masks a new computation reads it as an operand.)
    for weights, upstream in [(values(9, 1), "upstream_ptr"), (coin(9, 1), "operands[5]")]:
        operands[place] = weights
        for value in (1.0, 2.0):
            support.results(smooth_l1_loss, operands, value)
            is_all = {*events} == {("load", upstream)}
            assert is_all == (value == 1.0)


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
