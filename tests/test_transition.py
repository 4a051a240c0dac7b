"""A transition point that is a tensor: one for all elements, or for each row, channel or element.

A number that is not allowed raises. A tensor is not read by the host, so there the loss and the
gradients of an element are NaN: nobody trains with a wrong transition unawares.
"""

import copy
import functools
import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from fused_smoothl1 import SmoothL1Loss, smooth_l1_loss
from fused_smoothl1.problem import FLOAT_DTYPES
from tests.composed import composed
from tests.support import check, coin, gaussian, gradient_unless_modified
from tests.variants import REDUCTIONS

NAMES = ("sigma", "beta")
SHAPES = [(), (1,), (4,), (1, 4), (6, 1), (6, 4)]
# Beside those that both refuse as numbers.
REFUSED = {"sigma": [0.0, -0.0], "beta": [math.inf]}
BAD = [(name, bad) for name in NAMES for bad in (-1.0, -1e-40, -math.inf, math.nan, *REFUSED[name])]


def _operands(device: str, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Return input, target, a weight for each row and one for each element; all are trained."""
    return [
        gaussian(*shape, seed=seed, dtype=dtype, device=device, requires_grad=True)
        for seed, shape in enumerate([(6, 4), (6, 4), (6, 1), (6, 4)])
    ]


def _positive(
    *shape: int, device: str, dtype: torch.dtype = torch.float32, requires_grad: bool = True
) -> Tensor:
    values = gaussian(*shape, seed=10, device=device).abs() + 0.1
    return values.to(dtype).requires_grad_(requires_grad)


def _losses_and_gradients(function: Any, operands: list[Tensor], beta: Any, **options: Any) -> Any:
    loss = function(*operands, beta=beta, **options)
    sources = [t for t in (*operands, beta) if isinstance(t, Tensor) and t.requires_grad]
    return [loss, *torch.autograd.grad(loss, sources, torch.full_like(loss, 1.5))]


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_against_the_oracle(
    name: str, shape: tuple[int, ...], reduction: str, backend: str, device: str
) -> None:
    """Also where it alone is trained, or input and target alone, as the forward pass may do."""
    value, operands = _positive(*shape, device=device), _operands(device)
    check(*operands, **{name: value}, reduction=reduction, upstream=1.5)
    check(*(t.detach() for t in operands), **{name: value}, reduction=reduction, upstream=-2.0)
    for upstream in (1.0, 3.7):
        check(*operands[:2], **{name: value.detach()}, reduction=reduction, upstream=upstream)


@pytest.mark.parametrize(
    "view",
    [
        lambda: gaussian(2, 1, 1, 1, seed=1),
        lambda: gaussian(4, 1, 1, seed=1),
        lambda: gaussian(2, 1, 3, 8, seed=1),
        lambda: gaussian(2, 4, 3, 8, seed=1),
        lambda: gaussian(2, 4, 3, 8, seed=1).to(memory_format=torch.channels_last),
        lambda: gaussian(2, 4, 3, 16, seed=1)[..., ::2],
        lambda: gaussian(8, 3, 4, 2, seed=1).permute(3, 2, 1, 0),
        lambda: gaussian(2, 1, 3, 1, seed=1).expand(2, 4, 3, 8),
    ],
)
@pytest.mark.parametrize("channels_last", [False, True])
def test_layouts(
    view: Callable[[], Tensor], channels_last: bool, backend: str, device: str
) -> None:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    input, target = (
        gaussian(2, 4, 3, 8, seed=seed, device=device).to(memory_format=layout) for seed in (2, 3)
    )
    beta = view().to(device).abs()
    for reduction in ("none", "mean"):
        check(input.requires_grad_(), target, beta=beta.requires_grad_(), reduction=reduction)
        check(input, target, beta=beta.detach(), reduction=reduction)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("own", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_dtypes(name: str, own: torch.dtype, dtype: torch.dtype, backend: str, device: str) -> None:
    """It is an operand like all others: it promotes the loss, and its gradient has its dtype."""
    value = _positive(6, 1, dtype=own, device=device)
    for reduction in ("none", "sum"):
        check(*_operands(device, dtype), **{name: value}, reduction=reduction, upstream=0.5)


def test_gradients_are_summed_before_they_are_rounded(backend: str, device: str) -> None:
    """To the dtype of a beta in 16 bits, from which float16 would lose most here."""
    input = 1e-2 * gaussian(1250, 4, seed=1, device=device)
    beta = torch.tensor(1.0, dtype=torch.float16, device=device, requires_grad=True)
    check(input, torch.zeros_like(input), beta=beta, reduction="mean", upstream=8.0)


@pytest.mark.parametrize("beta", [0.0, 2.0**-40, 0.25, 2.0, 3.0, 10.0, 2.0**100])
def test_bits_of_a_number(beta: float, triton_backend: str, device: str) -> None:
    """One for all gives the same bits as the number, where float32 holds that."""
    operands = _operands(device)
    operands[0].data[:2] = operands[1].data[:2]
    results = [
        _losses_and_gradients(smooth_l1_loss, operands, value, reduction="sum")
        for value in (beta, torch.tensor(beta, device=device))
    ]
    torch.testing.assert_close(*results, rtol=0, atol=0)


def _special(device: str) -> Tensor:
    """Return differences in rows: of 0, least and largest numbers, inf and NaN."""
    tiny = torch.finfo(torch.float32).tiny
    row = [0.0, -0.0, 2.0**-149, -tiny, 1e-3, -1.0, 3e38, -math.inf, math.nan]
    return torch.tensor([row], device=device)


@pytest.mark.parametrize("beta", [0.0, -0.0, 2.0**-149, 1e-37, 1e-3, 1.0, 1e30, 3e38])
@pytest.mark.parametrize("shape", [(), (2, 1), (2, 9)], ids=str)
def test_special_values(shape: tuple[int, ...], beta: float, backend: str, device: str) -> None:
    """L1 where it is 0; and its own gradient is -1/2 there, also of a difference of 0."""
    input = _special(device).repeat(2, 1).requires_grad_()
    values = torch.full(shape, beta, device=device)
    if len(shape) > 1:
        values[1] = 0.0
    for trained in (False, True):
        check(
            input,
            torch.zeros_like(input),
            beta=values.requires_grad_(trained),
            reduction="none",
            upstream=2.0,
        )


@pytest.mark.parametrize("sigma", [math.inf, 1e30, 1e3, 1e-10, 1e-30])
def test_extreme_sigma(sigma: float, backend: str, device: str) -> None:
    """Infinity is L1. One whose square float32 does not hold is allowed, as it is for a number."""
    input, target = _operands(device)[:2]
    as_tensor = torch.tensor(sigma, device=device, requires_grad=True)
    results, losses = [], []
    for value in (sigma, as_tensor):
        losses.append(smooth_l1_loss(input, target, sigma=value))
        gradients = torch.autograd.grad(losses[-1], [input, target], retain_graph=True)
        results.append([losses[-1], *gradients])
    torch.testing.assert_close(*results)
    assert torch.autograd.grad(losses[-1], as_tensor)[0].isfinite()


@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize(("name", "bad"), BAD)
@pytest.mark.parametrize("shape", [(6, 1), (6, 4)], ids=str)
def test_values_that_a_number_may_not_have(
    shape: tuple[int, ...], name: str, bad: float, reduction: str, backend: str, device: str
) -> None:
    """They are NaN in the loss and every gradient of the element, at 0 too, and in no other."""
    operands = _operands(device)
    operands[0].data[2] = operands[1].data[2]
    value = _positive(*shape, device=device)
    value.data[1:3] = bad
    found = check(*operands, **{name: value}, reduction=reduction, upstream=1.5)
    if reduction == "none":
        for result in found.values():
            assert result[1:3].isnan().all()
            assert not result[[0, 3, 4, 5]].isnan().any()
    # The forward pass computes these with the loss, if it is a sum.
    check(*operands[:2], **{name: value.detach()}, reduction=reduction)
    check(*operands[:2], **{name: torch.tensor(bad, device=device)}, reduction=reduction)


@pytest.mark.parametrize(("name", "bad"), BAD)
@pytest.mark.parametrize("side", ["inside_weights", "outside_weights"])
@pytest.mark.parametrize("shape", [(6, 1), (6, 4)], ids=str)
def test_masks_exclude_it_whatever_it_is(
    shape: tuple[int, ...], side: str, name: str, bad: float, backend: str, device: str
) -> None:
    operands, mask = _operands(device)[:2], coin(6, 1, seed=9, device=device)
    value = _positive(*shape, device=device)
    value.data[~mask.expand(shape)] = bad
    for reduction in ("none", "sum"):
        options: dict[str, Any] = {side: mask, name: value, "reduction": reduction}
        results = check(*operands, **options, upstream=1.5)
        check(*operands, **{**options, name: value.detach()})
        for result in results.values():
            assert result.isfinite().all()
        assert (results[name][~mask.expand(shape)] == 0).all()


@pytest.mark.parametrize("upstream", [1.0, math.inf, math.nan])
def test_masks_exclude_it_from_graphs_too(upstream: float, backend: str, device: str) -> None:
    """Where operations are seen, by a transform or for another derivative, whatever arrives."""
    mask, beta = coin(6, 1, seed=9, device=device), _positive(6, 1, device=device)
    beta.data[~mask] = math.nan
    input, target = (t.detach() for t in _operands(device)[:2])

    def loss(beta: Tensor) -> Tensor:
        return upstream * smooth_l1_loss(input, target, mask, beta=beta, reduction="sum")

    (graphed,) = torch.autograd.grad(loss(beta), beta, create_graph=True)
    for gradient in (graphed, grad(loss)(beta)):
        assert (gradient[~mask] == 0).all()
        assert (gradient[mask].isfinite() == (upstream == 1.0)).all()


@pytest.mark.parametrize("shape", [None, (), (6, 1)], ids=str)
def test_anomaly_detection_finds_none_in_l1(shape: Any, backend: str, device: str) -> None:
    """Nor in the operations that a mode or a second derivative sees."""
    operands = _operands(device)
    operands[0].data[:2] = operands[1].data[:2]
    beta: Any = 0.0 if shape is None else torch.zeros(shape, device=device, requires_grad=True)
    sources = operands if shape is None else [*operands, beta]
    with FlopCounterMode(display=False), torch.autograd.detect_anomaly(check_nan=True):
        loss = smooth_l1_loss(*operands, beta=beta)
        first = torch.autograd.grad(loss, sources, create_graph=True)
        torch.stack([g.square().sum() for g in first]).sum().backward()
    assert all(t.grad is not None and t.grad.isfinite().all() for t in sources)


class _Overridden(Tensor):
    """Answers for whatever function is given one."""

    @classmethod
    def __torch_function__(cls, function: Any, *arguments: Any) -> Any:
        return "overridden" if function is smooth_l1_loss else NotImplemented


@pytest.mark.parametrize("name", NAMES)
def test_subclasses_override_the_function(name: str, device: str) -> None:
    value = torch.ones((), device=device).as_subclass(_Overridden)
    answer: Any = smooth_l1_loss(*_operands(device), **{name: value})  # type: ignore[arg-type]
    assert answer == "overridden"


def test_few_rows_of_many(eager_backend: str, device: str) -> None:
    """Where a mask selects few rows, eager PyTorch computes these alone."""
    rows = 1 << 15
    input, target = (gaussian(rows, 4, seed=seed, device=device) for seed in (1, 2))
    mask = (torch.arange(rows, device=device) % 50 == 7)[:, None]
    for shape in [(), (rows, 1), (4,)]:
        beta = _positive(*shape, device=device, requires_grad=False)
        check(input.requires_grad_(), target, mask, beta=beta, reduction="sum")


def test_in_parts(eager_backend: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where eager PyTorch splits a sum, it splits what has rows."""
    monkeypatch.setattr("fused_smoothl1.eager.PART", 12)
    input = gaussian(6, 6, seed=1, device=device, requires_grad=True)
    target, mask = gaussian(6, 6, seed=2, device=device), coin(6, 1, seed=9, device=device)
    for shape in [(), (6,), (1, 6), (6, 1), (6, 6)]:
        beta = _positive(*shape, device=device, requires_grad=False)
        for weights in (None, mask):
            check(input, target, weights, beta=beta, reduction="mean", upstream=1.5)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.parametrize("shape", [(), (6, 1)], ids=str)
def test_one_compilation_for_all_values(
    shape: tuple[int, ...], compiler: str, backend: str, device: str
) -> None:
    """As an argument and as a buffer, also of values that are not allowed."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(compiler)
    criterion = SmoothL1Loss(beta=torch.ones(shape, device=device), reduction="sum")

    def step(input: Tensor, target: Tensor, rows: Tensor, outside: Tensor, beta: Tensor) -> Tensor:
        plain = smooth_l1_loss(input, target, rows, outside, beta=beta)
        kept: Tensor = criterion(input, target, rows)
        return plain + kept + smooth_l1_loss(input, target, sigma=beta + 0.5)

    compiled = torch.compile(step, backend=counter, fullgraph=True)
    for value in (1.0, 0.5, 0.0, 3.0, 0.7, -1.0, math.nan):
        criterion.beta.fill_(value)  # type: ignore[union-attr]
        operands = [*_operands(device), torch.full(shape, value, device=device, requires_grad=True)]
        found, expected = (
            [loss, *torch.autograd.grad(loss, operands)]
            for loss in (compiled(*operands), step(*operands))
        )
        torch.testing.assert_close(found, expected, equal_nan=True)
    assert counter.frame_count == 1
    torch._dynamo.reset()


def test_one_kernel_for_each_kind_of_broadcast(triton_backend: str, device: str) -> None:
    """Values and numbers of rows make no other, and one for all has one of its own."""
    from fused_smoothl1 import launch

    kinds: list[tuple[int, list[tuple[int, ...]]]] = [
        (1, [(), (1, 1)]),
        (2, [(32, 1), (48, 1), (2064, 1)]),  # One program, and several.
        (1, [(1, 4), (4,)]),
        (1, [(32, 4), (48, 4)]),
    ]
    for number, shapes in kinds:
        launch._loss_code.cache_clear()
        for shape in shapes:
            rows = max(32, *shape[:-1], 0)
            input, target = (gaussian(rows, 4, seed=s, device=device) for s in (1, 2))
            for value in (0.0, 0.5, -1.0):
                smooth_l1_loss(input, target, beta=torch.full(shape, value, device=device))
        assert launch._loss_code.cache_info().misses == number, shapes


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_transforms(name: str, shape: tuple[int, ...], backend: str, device: str) -> None:
    """torch.func and forward mode differentiate by it too, and batch it."""
    operands = [t.detach() for t in _operands(device, torch.float64)]
    value = _positive(*shape, dtype=torch.float64, device=device, requires_grad=False)

    def of(function: Any) -> Callable[..., Tensor]:
        def loss(*t: Tensor) -> Tensor:
            options = {name: t[4]}
            if function is composed and name == "sigma":
                options = {"beta": 1 / t[4] ** 2}
            result: Tensor = function(*t[:4], **options, reduction="none")
            return result

        return loss

    def mean(function: Any) -> Callable[..., Tensor]:
        return lambda *t: of(function)(*t).mean()

    five = *operands, value
    every = tuple(range(5))
    tangents = tuple(t.roll(1) for t in five)
    batch = torch.stack([value, 2 * value, value / 2])
    for transformed in (
        lambda f: grad(mean(f), argnums=every)(*five),
        lambda f: grad(lambda *t: grad(mean(f), argnums=4)(*t).sum(), argnums=every)(*five),
        lambda f: jvp(of(f), five, tangents),
        lambda f: jvp(grad(mean(f), argnums=4), five, tangents),
        lambda f: vmap(of(f), (None, None, None, None, 0))(*operands, batch),
        lambda f: vmap(grad(mean(f), argnums=4), (None, None, None, None, 0))(*operands, batch),
    ):
        torch.testing.assert_close(transformed(smooth_l1_loss), transformed(composed))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(value, torch.ones_like(value))
        duals = [forward_ad.unpack_dual(of(f)(*operands, dual)) for f in (smooth_l1_loss, composed)]
        torch.testing.assert_close(*(list(pair) for pair in duals))


@pytest.mark.parametrize("pre_dispatch", [False, True])
@pytest.mark.parametrize("tracing_mode", ["real", "fake"])
@pytest.mark.parametrize("name", NAMES)
def test_captured_with_its_gradient(
    name: str, tracing_mode: Any, pre_dispatch: bool, backend: str, device: str
) -> None:
    """A graph of make_fx serves other values than those that it was made with."""
    input, target = (t.detach() for t in _operands(device)[:2])
    value = _positive(6, 1, device=device, requires_grad=False)

    def step(input: Tensor, target: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        value = value.detach().requires_grad_()
        options: Any = {name: value}
        loss = smooth_l1_loss(input, target, **options)
        return loss, *torch.autograd.grad(loss, value)

    captured = make_fx(step, tracing_mode=tracing_mode, pre_dispatch=pre_dispatch)
    graph = captured(input, target, value)
    others = input + 1, target, value / 2
    torch.testing.assert_close(graph(*others), step(*others))


@pytest.mark.parametrize("beta", [0.0, 2e-38, 1e-25, 1e-15, 1e15, 1e25, 1e38])
def test_extreme_betas_everywhere(beta: float, backend: str, device: str) -> None:
    """No context squares what overflows: those that see operations compute as plain calls do."""
    torch._dynamo.reset()
    factors = torch.tensor([0.0, 0.5, -0.75, 2.0, math.nan], device=device)
    input = torch.where(factors == 2.0, 2 * max(beta, 1e-30), factors * beta)
    values = torch.full((5,), beta, device=device, requires_grad=True)

    def loss(values: Tensor) -> Tensor:
        return smooth_l1_loss(input, torch.zeros_like(input), beta=values, reduction="sum")

    (plain,) = torch.autograd.grad(loss(values), values)
    expected = torch.tensor([0.0, -0.125, -0.28125, -0.5, math.nan], device=device)
    if beta == 0:
        expected[:4] = -0.5
    torch.testing.assert_close(plain, expected, equal_nan=True, rtol=1e-5, atol=0)
    torch.testing.assert_close(grad(loss)(values), plain, equal_nan=True, rtol=1e-5, atol=0)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for traced in (compiled(values), loss(values)):
        (found,) = torch.autograd.grad(traced, values, create_graph=True)
        torch.testing.assert_close(found, plain, equal_nan=True, rtol=1e-5, atol=0)
    with FlopCounterMode(display=False):
        (found,) = torch.autograd.grad(loss(values), values)
    torch.testing.assert_close(found, plain, equal_nan=True, rtol=1e-5, atol=0)


def test_module_keeps_a_tensor(backend: str, device: str) -> None:
    """A buffer, which moves, is saved and loaded, and may be changed between steps."""
    loss: Any = functools.partial(smooth_l1_loss, reduction="sum")
    for name in NAMES:
        value = _positive(1, 4, device=device, requires_grad=False)
        criterion = SmoothL1Loss(**{name: value}, reduction="sum")
        assert dict(criterion.named_buffers()).keys() == {name}
        assert not list(criterion.parameters())
        assert repr(criterion) == f"SmoothL1Loss({name}=tensor of shape (1, 4), reduction='sum')"
        file = io.BytesIO()
        torch.save(criterion.state_dict(), file)
        file.seek(0)
        other = SmoothL1Loss(**{name: torch.ones(1, 4, device=device)}, reduction="sum")
        other.load_state_dict(torch.load(file))
        operands = _operands(device)
        expected = loss(*operands, **{name: value})
        for module in (criterion, other, copy.deepcopy(criterion), criterion.to(device)):
            torch.testing.assert_close(module(*operands), expected, rtol=0, atol=0)
        kept = getattr(criterion, name)
        kept.fill_(2.0)
        torch.testing.assert_close(criterion(*operands), loss(*operands, **{name: 2.0}))
        assert getattr(criterion.double(), name).dtype == torch.float64


def test_module_keeps_a_buffer_as_it_is() -> None:
    """One that is not to be saved is not."""
    criterion = SmoothL1Loss(beta=nn.Buffer(torch.tensor(0.5), persistent=False))
    assert dict(criterion.named_buffers()).keys() == {"beta"}
    assert not criterion.state_dict()


def test_module_trains_a_parameter(backend: str, device: str) -> None:
    """And a functional call puts another in its place."""
    input, target = _operands(device)[:2]
    for name in NAMES:
        parameter = nn.Parameter(torch.tensor(0.5, device=device))
        options: dict[str, Any] = {name: parameter}
        criterion = SmoothL1Loss(**options)
        assert list(criterion.parameters()) == [parameter]
        assert not list(criterion.buffers())
        loss = criterion(input.detach(), target.detach())
        loss.backward()
        assert parameter.grad is not None
        expected = torch.tensor(0.5, device=device, requires_grad=True)
        options = {name: expected}
        smooth_l1_loss(input.detach(), target.detach(), **options).backward()
        torch.testing.assert_close(parameter.grad, expected.grad)
        other = torch.tensor(0.7, device=device)
        replaced = functional_call(criterion, {name: other}, (input, target))
        options = {name: 0.7}
        torch.testing.assert_close(replaced, smooth_l1_loss(input, target, **options))


def test_export(backend: str, device: str) -> None:
    """A buffer stays one, which may be changed in the exported program's module."""
    criterion = SmoothL1Loss(beta=torch.tensor([[0.5, 1.0, 2.0, 0.0]], device=device))
    input, target = (t.detach() for t in _operands(device)[:2])
    module = torch.export.export(criterion, (input, target)).module()
    for factor in (1.0, 0.3):
        for one in (criterion, module):
            one.get_buffer("beta").mul_(factor)
        torch.testing.assert_close(module(input + 1, target), criterion(input + 1, target))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_modified_in_place(dtype: torch.dtype, backend: str, device: str) -> None:
    """After the forward pass it is needed again, or it is not: never is a wrong number computed."""
    input, target = _operands(device, dtype)[:2]
    for upstream in (1.0, 2.0):
        beta = _positive(6, 1, device=device, requires_grad=False)
        loss = smooth_l1_loss(input, target, beta=beta) * upstream
        expected = torch.autograd.grad(loss, input, retain_graph=True)[0].clone()
        loss = smooth_l1_loss(input, target, beta=beta) * upstream
        beta.add_(1.0)
        found = gradient_unless_modified(loss, input)
        assert (found is None) == (dtype == torch.float16)
        if found is not None:
            torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_no_gradient_is_asked_for(backend: str, device: str) -> None:
    """What does not require a gradient gets none, whoever else does."""
    beta = _positive(device=device, requires_grad=False)
    loss = smooth_l1_loss(*_operands(device), beta=beta)
    loss.backward()
    assert beta.grad is None
