"""What the launcher asks of a GPU: the right device, stream, grid, integers and workspace.

No GPU is needed for that, and most of it the interpreter, which has one device, cannot show.
"""

import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_smoothl1 import smooth_l1_loss
from fused_smoothl1.problem import NO_NEEDS, make_problem
from tests.conftest import HAS_TRITON, on_interpreter
from tests.fake_gpu import MULTIPROCESSORS, FakeGpu, Launch, fake_gpu
from tests.support import gaussian

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="waits for a machine with Triton")

INPUT = (True, False, False, False, False)
SEVERAL = 100_000  # elements, of several programs


@pytest.fixture
def gpu() -> Iterator[FakeGpu]:
    with fake_gpu() as gpu:
        yield gpu


def _launch() -> Any:
    from fused_smoothl1 import launch

    return launch


def _problem(*shape: int, device: str = "cuda:0", reduce: bool = True, **options: Any) -> Any:
    input, target = (torch.empty(shape, device=device, **options) for _ in range(2))
    return make_problem(input, target, divisor_number=3.0, beta_number=0.5, reduce=reduce)


def _forward(gpu: FakeGpu, *shape: int, may_be_replayed: bool = False, **options: Any) -> Launch:
    """Return the launch of a loss with the input's gradient."""
    _launch().forward(_problem(*shape, **options), INPUT, may_be_replayed=may_be_replayed)
    return gpu.launches[-1]


def _workspace(launch: Launch) -> tuple[Any, Any]:
    return launch.arguments["partials_ptr"], launch.arguments["ticket_ptr"]


def _scale(gpu: FakeGpu, *gradients: Tensor, dtype: torch.dtype = torch.float32) -> Launch | None:
    """Return the launch of a product with an upstream gradient, if it is one."""
    gpu.launches.clear()
    padded = (*gradients, *[None] * (4 - len(gradients)))
    upstream = torch.empty((), dtype=dtype, device=gradients[0].device)
    found = _launch().scale(padded, upstream)
    assert all(one is other for one, other in zip(found, padded, strict=True))
    return gpu.launches[0] if gpu.launches else None


def test_device_of_the_operands(gpu: FakeGpu) -> None:
    """Triton launches to the current device, which need not be theirs."""
    for name in ("cuda:2", "cuda:0"):
        gpu.entered.clear()
        index = torch.device(name).index
        assert _forward(gpu, SEVERAL, device=name).device == index
        two = [torch.empty(SEVERAL, device=name) for _ in range(2)]
        product = _scale(gpu, *two)
        assert product is not None
        assert product.device == index
        assert gpu.current == 0
        # To change it costs host time, where it is the current one already.
        assert gpu.entered == [2] * (2 if index == 2 else 0)


def test_workspace_of_a_stream(gpu: FakeGpu) -> None:
    """Launches on one stream follow each other, and share one; no others do."""
    found: dict[tuple[str, int], tuple[Any, Any]] = {}
    for _ in range(2):
        for place in [("cuda:0", 0), ("cuda:0", 7), ("cuda:1", 0), ("cuda:1", 7)]:
            device, gpu.stream = place
            launch = _forward(gpu, SEVERAL, device=device)
            assert launch.stream == gpu.stream
            workspace = _workspace(launch)
            assert found.setdefault(place, workspace)[1] is workspace[1]
            assert found[place][0] is workspace[0]
            assert all(tensor.device == torch.device(device) for tensor in workspace)
    for part in range(2):
        assert len({id(workspace[part]) for workspace in found.values()}) == 4


def test_streams_come_and_go(gpu: FakeGpu) -> None:
    """What is kept for them does not grow without end, and the streams in use keep theirs."""
    first = _workspace(_forward(gpu, SEVERAL))
    for stream in range(1, 1000):
        gpu.stream = stream
        _forward(gpu, SEVERAL)
        gpu.stream = 0
        assert _workspace(_forward(gpu, SEVERAL))[1] is first[1]
    assert _launch()._kept_workspace.cache_info().currsize <= 256


def test_workspace_has_room(gpu: FakeGpu) -> None:
    """For all programs of any later launch."""
    small = _forward(gpu, 2 * 1024)
    large = _forward(gpu, 2**31 + 5)
    assert small.programs == 2
    partials, ticket = _workspace(large)
    assert partials is _workspace(small)[0]
    assert partials.shape == (large.programs,)
    assert (partials.dtype, ticket.dtype, ticket.shape) == (torch.float64, torch.int32, (1,))


@pytest.mark.parametrize("reason", ["captured", "recorded"])
def test_workspace_in_a_graph(reason: str, gpu: FakeGpu) -> None:
    """A graph may be replayed on any stream, so that its launches share nothing with others."""
    captured = reason == "captured"
    before = _workspace(_forward(gpu, SEVERAL))
    gpu.capturing = captured
    graph = [_forward(gpu, SEVERAL, may_be_replayed=not captured) for _ in range(2)]
    gpu.capturing = False
    workspaces = [before, *map(_workspace, graph)]
    for part in range(2):
        assert len({id(workspace[part]) for workspace in workspaces}) == 3
    for launch in graph:
        assert _workspace(launch)[0].shape == (launch.programs,)
    assert _workspace(_forward(gpu, SEVERAL))[1] is before[1]


def test_device_that_captures_nothing(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not every kind of device has graphs."""
    monkeypatch.delattr(FakeGpu, "is_current_stream_capturing")
    assert _workspace(_forward(gpu, SEVERAL))[1] is _workspace(_forward(gpu, SEVERAL))[1]


def test_workspace_is_allocated_by_another_thread(
    gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the caller's stream; whose own thread may be allocating from the memory of a graph."""
    launch = _launch()
    new_workspace = launch._new_workspace
    allocations: list[tuple[bool, int]] = []
    caller = threading.get_ident()

    def allocate(*arguments: Any) -> Any:
        allocations.append((threading.get_ident() == caller, gpu.stream))
        return new_workspace(*arguments)

    monkeypatch.setattr(launch, "_new_workspace", allocate)
    gpu.stream = 7
    for _ in range(2):
        _forward(gpu, SEVERAL)
    assert allocations == [(False, 7)]


def test_no_workspace(gpu: FakeGpu) -> None:
    """Where there is nothing to add up: one program, one loss an element, gradients alone."""
    launch = _launch()
    launch.forward(_problem(1024), INPUT)
    launch.forward(_problem(SEVERAL, reduce=False), NO_NEEDS)
    several, upstream = _problem(SEVERAL), torch.empty((), device="cuda:0")
    launch.recompute(several, launch.backward(several, upstream, INPUT), upstream, INPUT)
    assert [_workspace(asked) for asked in gpu.launches] == [(None, None)] * 4
    assert not launch._kept_workspace.cache_info().currsize


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_grid(dtype: torch.dtype, gpu: FakeGpu) -> None:
    """A program for each tile, until they fill the GPU."""
    tile = {torch.float64: 512}.get(dtype, 1024)
    most = 8 * MULTIPROCESSORS
    for numel, programs in [(1, 1), (tile, 1), (tile + 1, 2), (most * tile, most), (2**31, most)]:
        launch = _forward(gpu, numel, dtype=dtype)
        assert (launch.programs, launch.arguments["BLOCK"]) == (programs, tile)


@pytest.mark.parametrize("narrow", [torch.float16, torch.bfloat16, torch.float64])
def test_narrowest_operand_decides(narrow: torch.dtype, gpu: FakeGpu) -> None:
    """Or the narrowest output: it is accessed as wide as the others, if all are dense."""
    dtypes = (torch.float64, narrow)
    for one, other in [dtypes, dtypes[::-1]]:
        input = torch.empty(SEVERAL, device="cuda:0", dtype=one)
        target = torch.empty(SEVERAL, device="cuda:0", dtype=other)
        problem = make_problem(input, target, divisor_number=3.0, beta_number=0.5)
        _launch().forward(problem, NO_NEEDS)
        assert gpu.launches[-1].arguments["LANES"] == 16 // narrow.itemsize


def test_grid_of_a_product(gpu: FakeGpu) -> None:
    """Its tile is that of the narrower gradient."""
    most = 8 * MULTIPROCESSORS
    for numel, programs in [(1, 1), (2048, 1), (2049, 2), (most * 2048, most), (2**31, most)]:
        wide = torch.empty(numel, device="cuda:0")
        narrow = torch.empty(numel, device="cuda:0", dtype=torch.bfloat16)
        for pair in [(wide, narrow), (narrow, wide)]:
            launch = _scale(gpu, *pair)
            assert launch is not None
            assert (launch.programs, launch.arguments["BLOCK"]) == (programs, 2048)


@pytest.mark.parametrize(
    ("device", "properties"),
    [("cuda:0", {"multi_processor_count": 132}), ("xpu:0", {"max_compute_units": 132})],
)
def test_size_of_a_grid_on_every_vendor(
    device: str, properties: dict[str, int], gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a multiprocessor is called differs."""
    from fused_smoothl1 import launcher

    monkeypatch.setattr(FakeGpu, "get_device_properties", lambda *_: SimpleNamespace(**properties))
    assert launcher.gpu_of(torch.device(device)).multiprocessors == 132


@pytest.mark.parametrize(("warp_size", "warps"), [(32, 4), (64, 2)])
def test_128_threads(warp_size: int, warps: int) -> None:
    with fake_gpu(warp_size) as gpu:
        product = _scale(gpu, *(torch.empty(SEVERAL, device="cuda:0") for _ in range(2)))
        assert product is not None
        for launch in (_forward(gpu, SEVERAL), product):
            # (Fused multiply-add gains nothing: bench/RESULTS.md. Triton's default for it changes.)
            assert launch.options == {"num_warps": warps, "enable_fp_fusion": False}


@pytest.mark.parametrize(
    ("numel", "is_long"), [(2**31 - 1025, False), (2**31 - 1024, True), (2**31, True)]
)
def test_integers_of_the_loss(numel: int, is_long: bool, gpu: FakeGpu) -> None:
    index = _forward(gpu, numel).arguments["INDEX"]
    assert str(index) == ("int64" if is_long else "int32")


@pytest.mark.parametrize(
    ("numel", "is_long"), [(2**31 - 2049, False), (2**31 - 2048, True), (2**31, True)]
)
def test_integers_of_a_product(numel: int, is_long: bool, gpu: FakeGpu) -> None:
    """The last tile reaches beyond the last element."""
    launch = _scale(gpu, torch.empty(numel, device="cuda:0", dtype=torch.bfloat16))
    assert launch is not None
    assert launch.arguments["numel"] == numel
    assert str(launch.arguments["INDEX"]) == ("int64" if is_long else "int32")


FLOAT, HALF = torch.float32, torch.bfloat16


@pytest.mark.parametrize(
    ("dtypes", "numel", "upstream", "is_kernel"),
    [
        ([FLOAT], 2**20 - 1, FLOAT, False),
        ([FLOAT], 2**20, FLOAT, True),
        ([torch.float64], 4, torch.float64, False),
        ([FLOAT, FLOAT], 4, FLOAT, True),
        ([HALF], 4, FLOAT, True),
        ([FLOAT], 4, torch.float64, True),
    ],
    ids=str,
)
def test_product_by_pytorch_or_by_a_kernel(
    dtypes: list[torch.dtype],
    numel: int,
    upstream: torch.dtype,
    is_kernel: bool,
    gpu: FakeGpu,
) -> None:
    """PyTorch's is quicker on the host where it is small, and alone if the dtypes are the same."""
    gradients = [torch.empty(numel, device="cuda:0", dtype=dtype) for dtype in dtypes]
    launch = _scale(gpu, *gradients, dtype=upstream)
    assert (launch is not None) == is_kernel
    assert [gradient._version for gradient in gradients] == [0 if is_kernel else 1] * len(dtypes)
    if launch is not None:
        assert launch.arguments["COMPUTE"] == _launch().TRITON_DTYPES[upstream]


def test_product_of_the_targets_gradient_alone(gpu: FakeGpu) -> None:
    gradient = torch.empty(4, device="cuda:0", dtype=HALF)
    _launch().scale((None, gradient, None, None), torch.empty((), device="cuda:0"))
    (launch,) = gpu.launches
    assert launch.arguments["gradients"] == (None, gradient)


@on_interpreter
@pytest.mark.parametrize("masked", [False, True])
def test_upstream_gradient_of_1(masked: bool, triton_backend: str) -> None:
    """What the forward pass computed is left as it is: nothing but this number is read for it."""
    from tests.interpreter import recorded

    pair = gaussian(9, 4, seed=1, requires_grad=True), gaussian(9, 4, seed=2, requires_grad=True)
    weights = gaussian(9, 1, seed=3)
    argument = "operands[5]" if masked else "upstream_ptr"
    for upstream in (1.0, 2.0):
        loss = smooth_l1_loss(*pair, weights > 0 if masked else weights, reduction="sum")
        with recorded() as events:
            torch.autograd.grad(loss, pair, torch.tensor(upstream))
        assert (set(events) == {("load", argument)}) == (upstream == 1.0)


@on_interpreter
@pytest.mark.parametrize("place", [2, 3], ids=["inside", "outside"])
def test_what_masks_exclude_is_not_loaded(place: int, triton_backend: str) -> None:
    from tests.interpreter import recorded

    operands = [gaussian(9, 4, seed=1), gaussian(9, 4, seed=2), None, None]
    operands[place] = torch.zeros(9, 1, dtype=torch.bool)
    with recorded() as events:
        smooth_l1_loss(*operands, beta=torch.ones(9, 1))  # type: ignore[arg-type]
    loaded = {event.argument for event in events if event.kind == "load"}
    assert loaded == {f"operands[{place}]"}


@on_interpreter
def test_order_around_the_ticket(triton_backend: str) -> None:
    """Each partial sum is stored, then there is a barrier, then the ticket is drawn.

    Newer versions of Triton put a barrier there by themselves, older ones do not.
    """
    from tests.interpreter import recorded

    launch = _launch()
    input, target = gaussian(10_000, seed=1), gaussian(10_000, seed=2)
    problem = make_problem(input, target, divisor_number=3.0, beta_number=0.5)
    with recorded() as events:
        launch.forward(problem, NO_NEEDS)
    names = {"partials_ptr", "ticket_ptr", "loss_ptr", ""}
    told = [tuple(event) for event in events if event.argument in names]
    program = [("store", "partials_ptr"), ("barrier", ""), ("atomic", "ticket_ptr")]
    last = [("load", "partials_ptr"), ("store", "loss_ptr"), ("store", "ticket_ptr")]
    assert told == program * 8 + last
