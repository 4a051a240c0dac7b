"""What records a call instead of running it, or runs it before the data are known.

`torch.jit.trace`, `torch.fx.symbolic_trace`, and `torch.compile` with sizes and numbers that depend
on data: each records what works for other data and other sizes, as of the composition.
"""

import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from fused_smoothl1 import SmoothL1Loss, smooth_l1_loss
from tests.composed import composed
from tests.support import coin, gaussian
from tests.variants import REDUCTIONS

Function = Callable[..., Tensor]


def _operands(rows: int, device: str) -> tuple[Tensor, ...]:
    """Return an input, a target, a weight and a mask for each row."""
    return (
        gaussian(rows, 4, seed=rows, device=device, requires_grad=True),
        gaussian(rows, 4, seed=rows + 1, device=device),
        gaussian(rows, 1, seed=rows + 2, device=device),
        coin(rows, 1, seed=rows + 3, device=device),
    )


def _step(function: Function, weights: str | None, **options: Any) -> Function:
    def step(input: Tensor, target: Tensor, rows: Tensor, mask: Tensor) -> Tensor:
        inside = {None: None, "rows": rows, "mask": mask}[weights]
        return function(input, target, inside, beta=0.6, **options)

    return step


def _assert_same(found: Function, expected: Function, operands: tuple[Tensor, ...]) -> None:
    loss, wanted = found(*operands), expected(*operands)
    above = torch.arange(1.0, 1 + wanted.numel(), device=wanted.device).view(wanted.shape)
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(
        torch.autograd.grad(loss, operands[0], above),
        torch.autograd.grad(wanted, operands[0], above),
    )


@pytest.mark.parametrize("example", [0, 6])
@pytest.mark.parametrize("weights", [None, "rows", "mask"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_jit_trace(
    reduction: str, weights: str | None, example: int, backend: str, device: str
) -> None:
    """Deprecated, and still used to export models; with an example of no rows at all, too."""
    step = _step(smooth_l1_loss, weights, reduction=reduction)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its deprecation, and of checks of shapes
        traced = torch.jit.trace(step, _operands(example, device))
    for rows in (6, 9):
        _assert_same(traced, _step(composed, weights, reduction=reduction), _operands(rows, device))


def test_a_trace_of_no_rows_holds_no_product_of_single_numbers(backend: str, device: str) -> None:
    """On a GPU PyTorch's fuser fails on one (pytorch#144965)."""
    step = _step(smooth_l1_loss, "rows", reduction="sum")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced: Any = torch.jit.trace(step, _operands(0, device))
    products = [node for node in traced.graph.nodes() if node.kind() == "aten::mul"]
    assert len(products) > 3
    for node in products:
        assert any(operand.type().dim() for operand in node.inputs()), node


class _Model(nn.Module):
    def __init__(self, criterion: nn.Module) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.criterion = criterion

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        loss: Tensor = self.criterion(self.layer(x), target)
        return loss


def test_symbolic_trace_of_a_model(backend: str, device: str) -> None:
    """One node for the loss, as for nn.SmoothL1Loss, and no word of its inside."""
    model = _Model(SmoothL1Loss(sigma=2.0)).to(device)
    traced = torch.fx.symbolic_trace(model)
    nodes = [str(node.target) for node in traced.graph.nodes]
    reference = torch.fx.symbolic_trace(_Model(nn.SmoothL1Loss()))
    assert len(nodes) == len(reference.graph.nodes)
    x, target = gaussian(5, 4, seed=1, device=device), gaussian(5, 4, seed=2, device=device)
    torch.testing.assert_close(traced(x, target), model(x, target))


def test_symbolic_trace_of_the_function(backend: str, device: str) -> None:
    """With a weight and a normalizer that the trace computes."""

    def step(input: Tensor, target: Tensor, rows: Tensor, mask: Tensor) -> Tensor:
        count = mask.sum().clamp(min=1)
        return smooth_l1_loss(input, target, mask, 2 * rows, reduction="sum", normalizer=count)

    _assert_same(torch.fx.symbolic_trace(step), step, _operands(7, device))


def test_functions_that_override_it() -> None:
    """A subclass may answer in this function's place, as with PyTorch's own functions."""
    asked: list[Any] = []

    class Answers(Tensor):
        @classmethod
        def __torch_function__(
            cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            asked.append((func, len(args), kwargs))
            return "answered"

    input: Any = torch.zeros(3, 4).as_subclass(Answers)
    other = torch.zeros(3, 4)
    for operands in ((input, other), (other, other, input), (other, other, None, input)):
        result: Any = smooth_l1_loss(*operands, sigma=2.0)
        assert result == "answered"
    result = smooth_l1_loss(other, other, reduction="sum", normalizer=input)
    assert result == "answered"
    assert asked[0][0] is smooth_l1_loss
    assert asked[0][2]["sigma"] == 2.0


def test_sizes_in_the_place_of_numbers(backend: str, device: str) -> None:
    """Symbols, where shapes are symbolic: weights, transition points and normalizers."""

    def step(f: Function, x: Tensor, t: Tensor) -> Tensor:
        rows, columns = x.shape
        first = f(x, t, None, rows, beta=columns / 8, reduction="sum", normalizer=rows)
        return first + f(x, t, None, columns / 4, sigma=columns)

    x, t, *_ = _operands(6, device)
    with torch.no_grad():
        traced = make_fx(partial(step, smooth_l1_loss), tracing_mode="symbolic")(x, t)
        for rows in (6, 9):
            x, t, *_ = _operands(rows, device)
            torch.testing.assert_close(traced(x, t), step(composed, x, t))


def test_wrong_shapes_that_depend_on_data(backend: str, device: str) -> None:
    """The message is the same, without a hint that would ask for the data."""

    def step(x: Tensor, t: Tensor, m: Tensor) -> Tensor:
        rows = m.nonzero().squeeze(1)
        return smooth_l1_loss(x[rows], t[rows][:, None])

    x, t, _, mask = _operands(6, device)
    with pytest.raises(ValueError, match=r"target must have input's shape, got .*\)$"):
        make_fx(step, tracing_mode="symbolic")(x.detach(), t, mask[:, 0])


def test_export_with_a_count_that_depends_on_data(backend: str, device: str) -> None:
    """Of which nobody knows yet that it is positive."""

    class Step(nn.Module):
        def forward(self, x: Tensor, t: Tensor, mask: Tensor) -> Tensor:
            count = mask.sum().item()
            return smooth_l1_loss(x, t, mask, reduction="sum", normalizer=count)

    x, t = (tensor.detach() for tensor in _operands(6, device)[:2])
    row = torch.arange(6, device=device)[:, None]
    graph = torch.export.export(Step(), (x, t, row < 4)).module()
    for count in (4, 2):
        torch.testing.assert_close(
            graph(x, t, row < count),
            composed(x, t, row < count, reduction="sum", normalizer=count),
        )


def _selected_rows(f: Function, reduction: str, x: Tensor, t: Tensor, m: Tensor) -> Tensor:
    index = m.nonzero().squeeze(1)
    return f(x[index], t[index], beta=0.6, reduction=reduction)


def _selected_twice(f: Function, reduction: str, x: Tensor, t: Tensor, m: Tensor) -> Tensor:
    """Two sizes that are the same, which only the data know."""
    return f(x[m.nonzero().squeeze(1)], t[m], beta=0.6, reduction=reduction)


def _first_rows(f: Function, reduction: str, x: Tensor, t: Tensor, m: Tensor) -> Tensor:
    n = int(m.sum().item())
    # (PyTorch 2.9 does not compile x[:n].)
    return f(x.narrow(0, 0, n), t.narrow(0, 0, n), beta=0.6, reduction=reduction)


def _selected_weights(f: Function, reduction: str, x: Tensor, t: Tensor, m: Tensor) -> Tensor:
    index = m.nonzero().squeeze(1)
    weights = t[index, :1]
    return f(x[index], t[index], weights, x[index] > 0, beta=0.6, reduction=reduction)


def _count(f: Function, reduction: str, x: Tensor, t: Tensor, m: Tensor) -> Tensor:
    """The number of positives as an integer, and a sum of weights as a float."""
    first = f(x, t, m[:, None], reduction="sum", normalizer=m.sum().item())
    return first + f(x, t, beta=0.6, reduction="sum", normalizer=t.abs().sum().item())


def _weight(f: Function, reduction: str, x: Tensor, t: Tensor, m: Tensor) -> Tensor:
    return f(x, t, None, t.abs().sum().item(), beta=0.6, reduction=reduction)


DATA_DEPENDENT = (
    _selected_rows,
    _selected_twice,
    _first_rows,
    _selected_weights,
    _count,
    _weight,
)


@pytest.fixture
def _captures_data() -> Iterator[None]:
    torch._dynamo.reset()
    with torch._dynamo.config.patch(
        capture_dynamic_output_shape_ops=True, capture_scalar_outputs=True
    ):
        yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_captures_data")
@pytest.mark.parametrize("call", DATA_DEPENDENT, ids=lambda call: call.__name__[1:])
def test_sizes_and_numbers_that_depend_on_data(call: Function, backend: str, device: str) -> None:
    """With every reduction, in one graph."""

    def step(function: Function, *operands: Tensor) -> Tensor:
        losses = [call(function, reduction, *operands).sum() for reduction in REDUCTIONS]
        return torch.stack(losses)

    compiled = torch.compile(partial(step, smooth_l1_loss), fullgraph=True, backend="aot_eager")
    for rows in (6, 9):
        operands = (*_operands(rows, device)[:2], torch.arange(rows, device=device) % 3 == 0)
        _assert_same(compiled, partial(step, composed), operands)


@pytest.mark.usefixtures("_captures_data")
@pytest.mark.parametrize("option", ["beta", "sigma"])
def test_a_transition_point_that_depends_on_data(option: str, backend: str, device: str) -> None:
    """Which the composition cannot be compiled with: it is compared as it stands."""

    def call(f: Function, x: Tensor, t: Tensor) -> Tensor:
        return f(x, t, **{option: t.abs().mean().item()})

    compiled = torch.compile(
        lambda *operands: call(smooth_l1_loss, *operands), fullgraph=True, backend="aot_eager"
    )
    for rows in (6, 9):
        _assert_same(compiled, lambda *o: call(composed, *o), _operands(rows, device)[:2])


@pytest.mark.usefixtures("_captures_data")
@pytest.mark.parametrize("wrong", ["target", "weights"])
def test_sizes_that_turn_out_to_differ(wrong: str, backend: str, device: str) -> None:
    """Which nobody knows before the data are there: an error then, not a read past the end."""

    def step(x: Tensor, t: Tensor, m: Tensor, other: Tensor) -> Tensor:
        target = t[other if wrong == "target" else m]
        return smooth_l1_loss(x[m], target, t[other, :1], reduction="sum")

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    x, t, *_ = _operands(6, device)
    row = torch.arange(6, device=device)
    _assert_same(compiled, step, (x, t, row < 4, row > 1))
    with pytest.raises(RuntimeError, match=r"assertion|Eq"):
        compiled(x, t, row < 4, row < 2)


@pytest.mark.usefixtures("_captures_data")
def test_an_empty_selection_is_0(backend: str, device: str) -> None:
    """Compiled for any number of rows; none are selected at the second call."""

    def step(x: Tensor, t: Tensor, m: Tensor) -> Tensor:
        x, t, count = x[m], t[m], m.sum()
        return smooth_l1_loss(x, t) + smooth_l1_loss(x, t, reduction="sum", normalizer=count)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    x, t, *_ = _operands(6, device)
    for selected in (True, False):
        loss = compiled(x, t, torch.full((6,), selected, device=device))
        assert bool(loss > 0) == selected
        (gradient,) = torch.autograd.grad(loss, x)
        assert gradient.isfinite().all()
