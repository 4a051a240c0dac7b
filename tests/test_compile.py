"""torch.compile(fullgraph=True): no break in the graph, and the numbers of eager PyTorch.

Most tests run what Dynamo and AOTAutograd captured as it stands ("aot_eager"): they decide what is
in the graph, and they are quick. A few go through Inductor, to generated code.
"""

import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch._aot_autograd.utils import make_boxed_func
from torch._functorch.compilers import nop

import tests.support
from fused_smoothl1 import SmoothL1Loss, smooth_l1_loss
from fused_smoothl1.functional import Reduction
from tests.support import assert_near, check, coin, gaussian
from tests.variants import VARIANTS, fresh, make, trained

OPERATOR = "fused_smoothl1.forward.default"
Compiled = Callable[..., Any]


@pytest.fixture(autouse=True)
def _own_cache() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _compiled(
    function: Callable[..., Any] = smooth_l1_loss,
    *,
    dynamic: bool = False,
    backend: Any = "aot_eager",
) -> Compiled:
    return torch.compile(function, fullgraph=True, dynamic=dynamic, backend=backend)


def _gradients(loss: Tensor, operands: list[Any]) -> list[Tensor]:
    return list(torch.autograd.grad(loss, trained(operands), torch.full_like(loss, 1.5)))


def _captured(*operands: Any, **options: Any) -> list[str]:
    """Return what a graph of the loss alone calls, as Dynamo captures it."""
    names: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        names.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    _compiled(backend=backend)(*operands, **options)
    return names


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_against_the_oracle(
    reduction: str, variant: str, backend: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loss, gradients, dtypes and strides; masks exclude NaN as they do in eager PyTorch."""
    monkeypatch.setattr(tests.support, "smooth_l1_loss", _compiled())
    operands, options = make(variant, device=device)
    check(*operands, **options, reduction=reduction, upstream=1.5)


@pytest.mark.parametrize("divisor", ["sum", "batchmean", "number", "tensor"])
def test_divisors_against_the_oracle(
    divisor: str, backend: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tests.support, "smooth_l1_loss", _compiled())
    operands, options = make("row_weights", device=device)
    options["reduction"] = "batchmean" if divisor == "batchmean" else "sum"
    if divisor in ("number", "tensor"):
        number = 3.0
        options["normalizer"] = number if divisor == "number" else torch.tensor(number).to(device)
    check(*operands, **options, upstream=-2.0)


@pytest.mark.parametrize("reduction", ["none", "mean", "batchmean"])
def test_dynamic_shapes(reduction: Reduction, backend: str, device: str) -> None:
    """One graph serves every size, also where the size is the divisor."""
    graphs: list[torch.fx.GraphModule] = []

    def count(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    compiled = _compiled(dynamic=True, backend=count)
    counts = []
    for rows in (6, 9, 13):
        operands, options = make("row_weights", rows, device=device)
        got = compiled(*operands, **options, reduction=reduction)
        expected = smooth_l1_loss(*operands, **options, reduction=reduction)
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(_gradients(got, operands), _gradients(expected, operands))
        counts.append(len(graphs))
    assert counts[0] > 0
    assert counts == counts[:1] * 3


def test_static_then_dynamic(backend: str, device: str) -> None:
    """Dynamo's default: the first size is compiled for itself, the second for all that follow."""
    compiled = torch.compile(smooth_l1_loss, fullgraph=True, backend="aot_eager")
    for rows in (6, 9, 13, 6):
        operands, options = make("bool_rows", rows, device=device)
        got = compiled(*operands, **options)
        expected = smooth_l1_loss(*operands, **options)
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(_gradients(got, operands), _gradients(expected, operands))


@pytest.mark.parametrize(("variant", "dynamic"), [("row_weights", True), ("two_masks", False)])
def test_inductor(variant: str, dynamic: bool, backend: str, device: str) -> None:
    compiled = _compiled(dynamic=dynamic, backend="inductor")
    for rows in (6, 9) if dynamic else (6,):
        operands, options = make(variant, rows, device=device)
        got = compiled(*operands, **options)
        expected = smooth_l1_loss(*operands, **options)
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(_gradients(got, operands), _gradients(expected, operands))


def test_inductor_trains(backend: str, device: str) -> None:
    """A step with the loss and its graph in the middle, as training code has it."""
    head = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).to(device)
    twin = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).to(device)
    twin.load_state_dict(head.state_dict())
    criterion = SmoothL1Loss(sigma=3.0, reduction="sum")
    features, target = gaussian(12, 8, seed=1, device=device), gaussian(12, 4, seed=2).to(device)
    positive = coin(12, 1, seed=3, device=device)

    def step(model: nn.Module) -> Tensor:
        count = positive.sum().clamp(min=1)
        loss: Tensor = criterion(model(features), target, positive, None, count)
        return loss * 2

    def run(model: nn.Module, function: Callable[[nn.Module], Tensor]) -> list[float]:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        losses = []
        for _ in range(5):
            optimizer.zero_grad()
            loss = function(model)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    eager, compiled = run(twin, step), run(head, _compiled(step, backend="inductor"))
    assert compiled[-1] < compiled[0]
    torch.testing.assert_close(torch.tensor(compiled), torch.tensor(eager))
    for one, other in zip(head.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_graph_contains_the_kernel(reduction: str, triton_backend: str, device: str) -> None:
    operands, options = make("row_weights", device=device)
    names = _captured(*operands, **options, reduction=reduction)
    assert names.count(OPERATOR) == 1
    assert not any("smooth_l1_loss" in name for name in names)


def test_graph_of_eager_pytorch_contains_no_kernel(eager_backend: str, device: str) -> None:
    """The compiler sees what it can fuse: a composition, not an opaque call."""
    operands, options = make("row_weights", device=device)
    names = _captured(*operands, **options)
    assert names
    assert not any("fused_smoothl1" in name for name in names)


def test_compiled_graph_launches_the_kernel(device: str, launches: list[str]) -> None:
    operands, options = make("plain", device=device)
    loss = _compiled()(*operands, **options)
    assert launches == ["smooth_l1_kernel"]
    loss.backward()
    assert launches == ["smooth_l1_kernel"], "the gradient came with the loss"


def test_compiled_backward_is_a_product(triton_backend: str, device: str) -> None:
    """Of the saved gradient and what arrives: nothing is computed anew."""
    names: list[str] = []

    def record(graph: torch.fx.GraphModule, _: Any) -> Any:
        names.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return make_boxed_func(graph.forward)

    operands, options = make("plain", device=device)
    compiler = aot_autograd(fw_compiler=nop, bw_compiler=record)
    torch.compile(smooth_l1_loss, backend=compiler)(*operands, **options).backward()
    assert set(names) == {"aten.detach.default", "aten.mul.Tensor"}


@pytest.mark.filterwarnings("error:Dynamo")
@pytest.mark.parametrize("mode", ["no_grad", "train", "transform"])
def test_runs_as_it_stands_where_the_compiler_gives_up(
    mode: str, backend: str, device: str
) -> None:
    """It would go on with what the call is made of, down to the launch."""
    x = gaussian(6, 4, seed=1, device=device, requires_grad=mode == "train")
    target = gaussian(6, 4, seed=2, device=device)
    files: set[str] = set()

    def record(graph: torch.fx.GraphModule, _: Any) -> Any:
        for node in graph.graph.nodes:
            files.update(re.findall(r"fused_smoothl1.(\w+)\.py", node.stack_trace or ""))
        return graph.forward

    def step(count: Any) -> Any:
        if mode == "transform":
            return torch.func.grad(
                lambda x: smooth_l1_loss(x, target, reduction="sum", normalizer=count)
            )(x)
        with torch.set_grad_enabled(mode == "train"):
            loss = smooth_l1_loss(x, target, reduction="sum", normalizer=count)
        if mode == "train":
            loss.backward()
        return loss

    compiled = torch.compile(step, backend=record)
    for count in (3, 5, 7):
        # (As an argument of a compiled function, one of NumPy's numbers is an array.)
        torch.testing.assert_close(compiled(np.float32(count)), step(count))
    assert files <= {"functional"}


def test_no_grad_computes_no_gradient(triton_backend: str, device: str) -> None:
    wanted: list[Any] = []

    def record(graph: torch.fx.GraphModule, _: Any) -> Any:
        wanted.extend(node.args[-4:] for node in graph.graph.nodes if str(node.target) == OPERATOR)
        return graph.forward

    operands, options = make("plain", device=device)
    with torch.no_grad():
        loss = _compiled(backend=record)(*operands, **options)
    assert [tuple(needs) for needs in wanted] == [(False,) * 4]
    torch.testing.assert_close(loss, smooth_l1_loss(*operands, **options).detach())


def test_a_new_sigma_compiles_no_kernel(
    triton_backend: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of all arguments of a launch, only floats differ: Triton compiles nothing for their values.

    It does for constants, for an integer that is 1 or divides by 16, and for other dtypes.
    """
    from fused_smoothl1 import kernel, launcher

    launched: list[tuple[Any, ...]] = []
    parameters = inspect.signature(kernel.smooth_l1_kernel.fn).parameters
    names = [name for name, p in parameters.items() if "constexpr" not in str(p.annotation)]
    assert {"beta", "inverse_beta"} <= set(names) < set(parameters)

    def record(
        code: Any, programs: int, stream: int, tensors: Any, addresses: Any, others: Any
    ) -> None:
        launched.append((*code.grouped(tensors), *others))

    def leaves(values: tuple[Any, ...]) -> list[Any]:
        return [leaf for v in values for leaf in (leaves(v) if isinstance(v, tuple) else [v])]

    monkeypatch.setattr(launcher.Code, "launch", record)
    operands, _ = make("row_weights", device=device)
    for options in ({"sigma": 1}, {"sigma": 3.0}, {"beta": 16}, {"beta": 0}, {"beta": 1e-38}, {}):
        smooth_l1_loss(*operands, **options)
    for values in zip(*map(leaves, launched), strict=True):
        if not isinstance(values[0], Tensor):
            assert all(type(v) is float for v in values) or len(set(values)) == 1
    beta = list(parameters).index("beta")
    assert [arguments[beta] for arguments in launched] == [1, 1 / 9, 16, 0, 1e-38, 1]


@pytest.mark.parametrize("needed", [(0,), (1,), (0, 1)], ids=str)
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_float16(reduction: str, needed: tuple[int, ...], backend: str, device: str) -> None:
    """A GradScaler's upstream gradient is inside before the one rounding to float16."""
    n = 4096
    input, target = pair = [
        gaussian(
            n, seed=i, scale=1e-2, dtype=torch.float16, device=device, requires_grad=i in needed
        )
        for i in range(2)
    ]
    scale = 65536.0 if reduction == "mean" else 1.0
    weights = 2.0**-10
    loss = _compiled()(input, target, None, weights, reduction=reduction)
    assert loss.dtype == (torch.float32 if reduction == "mean" else torch.float16)
    sources = [pair[i] for i in needed]
    gradients = torch.autograd.grad(loss, sources, torch.full_like(loss, scale))
    # Quadratic all over: the gradient is the weighted difference, times the upstream gradient.
    divisor = n if reduction == "mean" else 1
    exact = (input.detach().double() - target.detach().double()) * weights * scale / divisor
    for i, gradient in zip(needed, gradients, strict=True):
        assert gradient.dtype == torch.float16
        expected = (-exact if i else exact).cpu().numpy()
        assert_near("gradient", gradient, expected, computed_in=torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(
    dtype: torch.dtype, backend: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tests.support, "smooth_l1_loss", _compiled())
    operands, options = make("trained_weights", dtype=dtype, device=device)
    check(*operands, **options)


def test_channels_last(backend: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tests.support, "smooth_l1_loss", _compiled())
    shape = (2, 4, 3, 5)
    input, target = (
        gaussian(*shape, seed=seed, device=device).to(memory_format=torch.channels_last)
        for seed in (1, 2)
    )
    check(input.requires_grad_(), target, coin(2, 1, 3, 5, seed=3, device=device))


@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_backward_twice(reduction: Reduction, backend: str, device: str) -> None:
    """What the first pass handed out is not written to by the second."""
    operands, options = make("row_weights", device=device)
    loss = _compiled()(*operands, **options, reduction=reduction)
    expected = smooth_l1_loss(*operands, **options, reduction=reduction)
    above = torch.full_like(loss, 1.5)
    first, second = (
        torch.autograd.grad(loss, trained(operands), above, retain_graph=True) for _ in range(2)
    )
    torch.testing.assert_close(list(first), _gradients(expected, operands))
    torch.testing.assert_close(first, second)


def test_empty(backend: str, device: str) -> None:
    input = torch.zeros(0, 4, device=device, requires_grad=True)
    loss = _compiled()(input, torch.zeros(0, 4, device=device))
    assert loss.item() == 0
    loss.backward()
    assert input.grad is not None
    assert input.grad.shape == (0, 4)


@pytest.mark.parametrize("shape", [(3, 4), (2,), (2, 4, 1), ()], ids=str)
def test_errors_stay_errors(shape: tuple[int, ...], backend: str, device: str) -> None:
    compiled = torch.compile(smooth_l1_loss, backend="aot_eager")
    match = rf"target must have input's shape.*{re.escape(str(shape))}.*\(2, 4\)"
    with pytest.raises(Exception, match=match):
        compiled(torch.zeros(2, 4, device=device), torch.zeros(shape, device=device))


def test_two_losses_in_one_graph(backend: str, device: str) -> None:
    """Classification aside, a detector has two box losses with settings of their own."""

    def step(one: list[Any], other: list[Any], sigma: float) -> Tensor:
        first = smooth_l1_loss(*one, sigma=sigma, reduction="batchmean")
        return first + 2 * smooth_l1_loss(*other, beta=0.5)

    one, other = make("bool_rows", device=device)[0], make("row_weights", 9, device=device)[0]
    compiled = _compiled(step)
    for sigma in (3.0, 1.0):
        got, expected = compiled(one, other, sigma), step(one, other, sigma)
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(_gradients(got, one + other), _gradients(expected, one + other))


def test_operands_are_left_alone(backend: str, device: str) -> None:
    operands, options = make("two_masks", device=device)
    before = fresh(operands)
    loss = _compiled()(*operands, **options)
    _gradients(loss, operands)
    torch.testing.assert_close(operands, before, rtol=0, atol=0, equal_nan=True)
