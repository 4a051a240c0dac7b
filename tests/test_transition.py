"""A transition point that is a tensor: one for all elements, or for each row, channel or element.

A number that is not allowed raises. A tensor is not read by the host, so there the loss and the
gradients of an element are NaN: nobody trains with a wrong transition unawares. (Layouts and dtypes
of it are drawn in `test_properties.py`, and what surrounds a call in `test_contexts.py`.)
"""

import copy
import io
import math
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import functional_call, grad, jvp
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from fused_smoothl1 import SmoothL1Loss, smooth_l1_loss
from tests import support
from tests.support import DEVICE, REDUCTIONS, Loss, Shape, boxes, check, coin, values

pytestmark = support.on_both

# (Options that go by the name of a variable have no types.)
loss_of: Loss = smooth_l1_loss
module: Callable[..., SmoothL1Loss] = SmoothL1Loss
by_name = pytest.mark.parametrize("name", ["sigma", "beta"])
# Those that no number may have.
BAD = [("sigma", 0.0), ("sigma", -0.0), ("beta", math.inf)]
BAD += product(("sigma", "beta"), (-1.0, -1e-40, -math.inf, math.nan))


def positive(*shape: int, grad: bool = True) -> Tensor:
    return (values(*shape).abs() + 0.1).requires_grad_(grad)


def full(value: float, shape: Shape = ()) -> Tensor:
    return torch.full(shape, value, device=DEVICE, requires_grad=True)


def weighted() -> list[Tensor]:
    """Return operands that are all trained; the differences of two rows are 0."""
    operands = boxes(6, (6, 1), (6, 4), grad=4)
    operands[0].data[1:3] = operands[1].data[1:3]
    return operands


def gradient_of(loss: Loss, value: Tensor, **options: Any) -> Tensor:
    return torch.autograd.grad(loss(value).sum(), value, **options)[0]


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [(), (1,), (4,), (1, 4), (6, 1), (6, 4)], ids=str)
@by_name
def test_against_the_oracle(name: str, shape: Shape, reduction: str) -> None:
    """Also where it alone is trained, or input and target alone, as the forward pass may do."""
    value, operands = positive(*shape), weighted()
    check(*operands, **{name: value}, reduction=reduction, upstream=1.5)
    check(*(t.detach() for t in operands), **{name: value}, reduction=reduction, upstream=-2.0)
    for upstream in (1.0, 3.7):
        check(*operands[:2], **{name: value.detach()}, reduction=reduction, upstream=upstream)


@pytest.mark.parametrize(("name", "bad"), BAD)
@pytest.mark.parametrize("shape", [(6, 1), (6, 4)], ids=str)
def test_values_that_a_number_may_not_have(shape: Shape, name: str, bad: float) -> None:
    """Loss and gradients of the element are NaN, and of no other, unless a mask excludes it."""
    value, operands, mask = positive(*shape), weighted(), torch.ones(6, 1, device=DEVICE) > 0
    value.data[1:4], mask[1:4] = bad, False
    for result in check(*operands, **{name: value}, reduction="none").values():
        assert torch.equal(result.isnan(), ~mask.expand_as(result))
    # The forward pass computes some gradients with the loss, if it is a sum.
    for given, reduction in product((value, value.detach()), ("none", "sum")):
        for own in (operands, operands[:2], [*operands[:2], mask], [*operands[:2], None, mask]):
            check(*own, **{name: given}, reduction=reduction, upstream=1.5)
    check(*operands[:2], **{name: value.detach()[1, 0]}, reduction="sum")


def test_gradients_are_summed_before_they_are_rounded() -> None:
    """To the dtype of a beta in 16 bits, from which float16 would lose most here."""
    input, target = boxes(1250, scale=7e-3, grad=0)
    check(input, target, beta=full(1.0).detach().half().requires_grad_(), upstream=8.0)


NUMBERS = [("beta", beta) for beta in (0.0, 2.0**-40, 0.25, 2.0, 3.0, 10.0, 2.0**100)]
NUMBERS += [("sigma", sigma) for sigma in (math.inf, 1e30, 1e3, 1e-10, 1e-30)]


@pytest.mark.parametrize(("name", "number"), NUMBERS)
def test_one_for_all_is_a_number(name: str, number: float, backend: str) -> None:
    """Beta to the bit in the kernel; and float32 need not hold the square of a sigma."""
    operands, value = weighted(), full(number)
    tensor, expected = (
        support.results(smooth_l1_loss, operands, 1.5, **{name: v}, reduction="sum")
        for v in (value, number)
    )
    assert tensor.pop().isfinite()  # the gradient of the tensor
    same = support.assert_equal if (name, backend) == ("beta", "triton") else assert_close
    same(tensor, expected)


@pytest.mark.parametrize("beta", [0.0, -0.0, 2.0**-149, 1e-37, 1e-3, 1.0, 1e30, 3e38])
@pytest.mark.parametrize("shape", [(), (2, 1), (2, 9)], ids=str)
def test_special_values(shape: Shape, beta: float) -> None:
    """L1 where it is 0; and its own gradient is -1/2 there, also of a difference of 0."""
    row = [0.0, -0.0, 2.0**-149, -(2.0**-126), 1e-3, -1.0, 3e38, -math.inf, math.nan]
    input = torch.tensor([row, row], device=DEVICE, requires_grad=True)
    betas = full(beta, shape)
    if shape:
        betas.data[1] = 0.0
    for own in (betas, betas.detach()):
        check(input, torch.zeros_like(input), beta=own, reduction="none", upstream=2.0)


@pytest.mark.parametrize("upstream", [1.0, math.inf, math.nan])
def test_masks_exclude_them_from_graphs(upstream: float) -> None:
    """Where operations are seen, by a transform or for another derivative, whatever arrives."""
    beta, mask = positive(6, 1), coin(6, 1)
    operands = boxes(6, mask, grad=0)
    beta.data[~mask] = math.nan

    def loss(beta: Tensor) -> Tensor:
        return upstream * loss_of(*operands, beta=beta, reduction="sum")

    for gradient in (gradient_of(loss, beta, create_graph=True), grad(loss)(beta)):
        assert (gradient[~mask] == 0).all()
        assert (gradient[mask].isfinite() == (upstream == 1.0)).all()


@pytest.mark.parametrize("shape", [(), (6, 1)], ids=str)
def test_anomaly_detection_finds_none_in_l1(shape: Shape) -> None:
    """Nor in the operations that a mode or a second derivative sees."""
    operands, beta = weighted(), full(0.0, shape)
    sources = [*operands, beta]
    with FlopCounterMode(display=False), torch.autograd.detect_anomaly(check_nan=True):
        loss = smooth_l1_loss(*operands, beta=beta)
        first = torch.autograd.grad(loss, sources, create_graph=True)
        second = torch.autograd.grad([g.square().sum() for g in first], sources)
    assert all(gradient.isfinite().all() for gradient in second)


@support.on_eager
def test_few_rows_and_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eager PyTorch computes few selected rows alone, and splits of a sum what has rows."""
    rows = 1 << 15
    mask = (torch.arange(rows, device=DEVICE) % 50 == 7)[:, None]
    for shape in [(), (rows, 1), (4,)]:
        check(*boxes(rows, mask), beta=positive(*shape, grad=False), reduction="sum")
    monkeypatch.setattr("fused_smoothl1.eager.PART_NUMEL", 12)
    for shape, weights in product([(), (6,), (1, 6), (6, 1), (6, 6)], (None, coin(6, 1))):
        check(*boxes((6, 6), weights), beta=positive(*shape, grad=False), upstream=1.5)


def watched(loss: Loss, value: Tensor) -> Tensor:
    with FlopCounterMode(display=False):
        return gradient_of(loss, value)


def compiled(loss: Loss, value: Tensor) -> Tensor:
    torch._dynamo.reset()
    step = torch.compile(loss, backend="aot_eager", fullgraph=True)
    return gradient_of(step, value, create_graph=True)


def captured(loss: Loss, value: Tensor) -> Tensor:
    step = partial(gradient_of, loss)
    graph = make_fx(step, pre_dispatch=True)(full(0.7, (5, 1)))
    gradient: Tensor = graph(value)
    return gradient


CONTEXTS: dict[str, Callable[[Loss, Tensor], Tensor]] = {
    "plain": gradient_of,
    "another derivative": lambda loss, value: gradient_of(loss, value, create_graph=True),
    "watched": watched,
    "compiled": compiled,
    "captured with another value": captured,
    "torch.fx": lambda loss, value: gradient_of(torch.fx.symbolic_trace(loss), value),
    "torch.func": lambda loss, value: grad(lambda value: loss(value).sum())(value),
    "forward mode": lambda loss, value: jvp(loss, (value,), (torch.ones_like(value),))[1],
}


@pytest.mark.parametrize("beta", [0.0, 2e-38, 1e-25, 1e-15, 0.7, 1e15, 1e25, 1e38])
@pytest.mark.parametrize("context", CONTEXTS)
def test_extreme_values_everywhere(context: str, beta: float) -> None:
    """No context squares what overflows: those that see operations compute as plain calls do."""
    factors = torch.tensor([[0.0], [0.5], [-0.75], [2.0], [math.nan]], device=DEVICE)
    input = torch.where(factors == 2.0, 2 * max(beta, 1e-30), factors * beta)
    expected = torch.tensor([[0.0], [-0.125], [-0.28125], [-0.5], [math.nan]], device=DEVICE)
    if beta == 0:
        expected[:4] = -0.5
    same: Any = partial(assert_close, equal_nan=True, rtol=1e-5, atol=0)
    loss: Loss = partial(smooth_l1_loss, input, torch.zeros_like(input), reduction="none")
    same(CONTEXTS[context](lambda value: loss(beta=value), full(beta, (5, 1))), expected)
    if 1e-25 <= beta <= 1e25:
        sigma = full(beta**-0.5, (5, 1))
        expected = -2 * beta**1.5 * expected
        same(CONTEXTS[context](lambda value: loss(sigma=value), sigma), expected)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.parametrize("shape", [(), (6, 1)], ids=str)
def test_one_compilation_for_all_values(shape: Shape, compiler: str) -> None:
    """As an argument and as a buffer, also of values that are not allowed."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(compiler)
    criterion: Any = SmoothL1Loss(beta=torch.ones(shape, device=DEVICE), reduction="sum")

    def step(*operands: Tensor, beta: Tensor) -> Tensor:
        loss: Tensor = smooth_l1_loss(*operands, beta=beta) + criterion(*operands[:3])
        return loss + smooth_l1_loss(*operands[:2], sigma=beta + 0.5)

    compiled = torch.compile(step, backend=counter, fullgraph=True)
    for value in (1.0, 0.5, 0.0, 3.0, 0.7, -1.0, math.nan):
        criterion.beta.fill_(value)
        operands, beta = weighted(), full(value, shape)
        pair = (support.results(function, operands, beta=beta) for function in (compiled, step))
        assert_close(*pair, equal_nan=True)
    assert counter.frame_count == 1


@support.on_kernel
def test_one_kernel_for_each_kind_of_broadcast() -> None:
    """Values and numbers of rows make no other, and one for all has one of its own."""
    from fused_smoothl1 import launch

    rows: list[Shape] = [(32, 1), (48, 1), (2064, 1)]  # One program, and several.
    of_all, channels, elements = [(), (1, 1)], [(1, 4), (4,)], [(32, 4), (48, 4)]
    for kernels, shapes in ((1, of_all), (2, rows), (1, channels), (1, elements)):
        launch._loss_code.cache_clear()
        for shape, value in product(shapes, (0.0, 0.5, -1.0)):
            operands = boxes(max(32, *shape[:-1], 0), grad=0)
            smooth_l1_loss(*operands, beta=full(value, shape).detach())
        assert launch._loss_code.cache_info().misses == kernels, shapes


@by_name
def test_module_keeps_a_tensor(name: str) -> None:
    """A buffer, which moves, is saved and loaded, and may be changed between steps."""
    value, operands, file = positive(1, 4, grad=False), boxes(6), io.BytesIO()
    kept, other = (module(**{name: t.clone()}) for t in (value, torch.ones_like(value)))
    assert dict(kept.named_buffers()).keys() == {name}
    assert not list(kept.parameters())
    assert repr(kept) == f"SmoothL1Loss({name}=tensor of shape (1, 4), reduction='mean')"
    torch.save(kept.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file))
    copied, exportable = copy.deepcopy(kept), copy.deepcopy(kept)
    exported = torch.export.export(exportable, tuple(t.detach() for t in operands)).module()
    for one, factor in product((kept, other, copied, exported), (1.0, 2.0)):
        one.get_buffer(name).mul_(factor)
        assert_close(one(*operands), loss_of(*operands, **{name: factor * value}))
    assert kept.double().get_buffer(name).dtype == torch.float64
    unsaved = module(**{name: nn.Buffer(value, persistent=False)})  # kept as it is
    assert dict(unsaved.named_buffers()).keys() == {name}
    assert not unsaved.state_dict()


@by_name
def test_module_trains_a_parameter(name: str) -> None:
    """And a functional call puts another in its place."""
    operands, parameter, other = boxes(6), nn.Parameter(full(0.5)), full(0.7)
    criterion = module(**{name: parameter})
    assert list(criterion.parameters()) == [parameter]
    assert not list(criterion.buffers())
    _, _, expected = support.results(smooth_l1_loss, operands, **{name: parameter})
    criterion(*operands).backward()
    assert_close(parameter.grad, expected)
    replaced = functional_call(criterion, {name: other}, tuple(operands))
    assert_close(replaced, loss_of(*operands, **{name: other}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_modified_in_place(dtype: torch.dtype) -> None:
    """After the forward pass it is needed again, or it is not: never is a wrong number computed."""
    operands = boxes(6, dtype=dtype)
    for upstream in (1.0, 2.0):
        beta = positive(6, 1, grad=False)
        _, expected = support.results(smooth_l1_loss, operands, upstream, beta=beta.clone())
        loss = upstream * smooth_l1_loss(*operands, beta=beta)
        beta.add_(1.0)
        found = support.gradient_unless_modified(loss, operands[0])
        assert (found is None) == (dtype == torch.float16)
        if found is not None:
            support.assert_equal(found, expected)
