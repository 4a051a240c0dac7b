"""The registered operators: what torch.library asks of one, tracing without data, and export.

`torch.library.opcheck` runs the operator real, fake and under AOTAutograd with static and dynamic
shapes, and compares; that it mutates nothing and returns no alias is part of it.
"""

from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fused_smoothl1 import ops, smooth_l1_loss
from fused_smoothl1.functional import Reduction
from fused_smoothl1.problem import (
    NO_NEEDS,
    OPERANDS,
    Problem,
    gradient_in_forward,
    make_problem,
)
from tests.support import assert_same, backend_set, coin, gaussian
from tests.variants import REDUCTIONS, VARIANTS, make, trained

FORWARD = torch.ops.fused_smoothl1.forward.default
BACKWARD = torch.ops.fused_smoothl1.backward.default


def _problem(
    *,
    dtype: torch.dtype = torch.float32,
    inside: Any = None,
    outside: Any = None,
    beta: tuple[int, ...] | None = None,
    reduce: bool = True,
    tensor_divisor: bool = False,
    requires_grad: str = "input",
    device: str,
) -> Problem:
    wanted = requires_grad.split()

    def values(name: str, *shape: int, seed: int) -> Tensor:
        return gaussian(*shape, seed=seed, dtype=dtype, device=device, requires_grad=name in wanted)

    def weights(name: str, own: Any, seed: int) -> Tensor | None:
        if isinstance(own, tuple):
            return values(name, *own, seed=seed)
        return own if isinstance(own, Tensor) else None

    transition = None if beta is None else values("", *beta, seed=8).abs()
    return make_problem(
        values("input", 6, 4, seed=1),
        values("target", 6, 4, seed=2),
        weights("inside", inside, 3),
        weights("outside", outside, 4),
        None if transition is None else transition.requires_grad_("beta" in wanted),
        divisor=torch.tensor(3.0, device=device) if reduce and tensor_divisor else None,
        outside_number=outside if isinstance(outside, float) else 1.0,
        divisor_number=24 if reduce and not tensor_divisor else 1.0,
        beta_number=0.5 if beta is None else 1.0,
        reduce=reduce,
    )


PROBLEMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "nothing requires a gradient": {"requires_grad": ""},
    "both gradients": {"requires_grad": "input target", "inside": (6, 1)},
    "target alone": {"requires_grad": "target", "outside": (4,)},
    "outside weights alone": {"outside": (4,), "requires_grad": "outside"},
    "row mask": {"inside": "rows"},
    "uint8 mask": {"inside": (4,), "outside": "uint8"},
    "trained weights": {
        "inside": (1, 4),
        "outside": (),
        "beta": (6, 1),
        "requires_grad": "input target inside outside beta",
    },
    "beta": {"beta": (), "outside": (6, 1)},
    "beta alone": {"beta": (4,), "inside": "rows", "reduce": False, "requires_grad": "beta"},
    "weights alone": {"inside": (6, 4), "outside": (6, 1), "requires_grad": "inside outside"},
    "normalizer": {"tensor_divisor": True, "outside": -2.0},
    "none": {"reduce": False, "requires_grad": "input target"},
    "none with trained weights": {
        "reduce": False,
        "inside": (6, 1),
        "requires_grad": "input inside",
    },
    "float16": {"dtype": torch.float16, "requires_grad": "input target"},
    "bfloat16": {
        "dtype": torch.bfloat16,
        "outside": (6, 4),
        "requires_grad": "input target",
    },
    "bfloat16 none": {"dtype": torch.bfloat16, "reduce": False, "outside": (6, 1)},
    "float64": {"dtype": torch.float64, "inside": (6, 1), "tensor_divisor": True},
    "float64 weights": {"inside": "float64", "reduce": False},
}


def _named(name: str, device: str) -> Problem:
    settings = dict(PROBLEMS[name])
    for weights in ("inside", "outside"):
        if settings.get(weights) == "rows":
            settings[weights] = coin(6, 1, seed=5, device=device)
        elif settings.get(weights) == "uint8":
            settings[weights] = coin(6, 4, seed=6, device=device).to(torch.uint8)
        elif settings.get(weights) == "float64":
            settings[weights] = gaussian(6, 1, seed=7, dtype=torch.float64, device=device)
    return _problem(**settings, device=device)


def _forward_arguments(problem: Problem) -> tuple[Any, ...]:
    needs = ops.needs_of(problem)
    return *problem, *(needs if gradient_in_forward(problem, needs) else NO_NEEDS)


def _backward_arguments(problem: Problem) -> tuple[Any, ...]:
    shape = () if problem.reduce else tuple(problem.input.shape)
    upstream = gaussian(
        *shape, seed=9, dtype=problem.loss_dtype, device=problem.input.device.type
    ).requires_grad_()
    return upstream, *problem, *ops.needs_of(problem)


def _assert_all_green(results: dict[str, str]) -> None:
    assert len(results) >= 4
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("name", PROBLEMS)
def test_opcheck_forward(name: str, triton_backend: str, device: str) -> None:
    problem = _named(name, device)
    _assert_all_green(torch.library.opcheck(FORWARD, _forward_arguments(problem)))


@pytest.mark.parametrize("name", [n for n in PROBLEMS if n != "nothing requires a gradient"])
def test_opcheck_backward(name: str, triton_backend: str, device: str) -> None:
    problem = _named(name, device)
    _assert_all_green(torch.library.opcheck(BACKWARD, _backward_arguments(problem)))


@pytest.mark.parametrize("name", ["both gradients", "uint8 mask"])
def test_opcheck_in_eager_pytorch(name: str, eager_backend: str, device: str) -> None:
    """The operator computes on any device; what traces through it is the same code."""
    problem = _named(name, device)
    _assert_all_green(torch.library.opcheck(FORWARD, _forward_arguments(problem)))
    _assert_all_green(torch.library.opcheck(BACKWARD, _backward_arguments(problem)))


def test_schema_mutates_nothing() -> None:
    for operator in (FORWARD, BACKWARD):
        assert not operator._schema.is_mutable
        assert all(result.alias_info is None for result in operator._schema.returns)


def _layouts(device: str) -> dict[str, Tensor]:
    base = gaussian(2, 4, 3, 5, seed=1, device=device)
    return {
        "contiguous": base,
        "channels_last": base.to(memory_format=torch.channels_last),
        "transposed": base.transpose(1, 3),
        "sliced": base[:, ::2, :, 1:],
        "expanded": base[:, :1].expand(2, 4, 3, 5),
        "empty": base.new_zeros(2, 0, 3, 5),
        "scalar": base[0, 0, 0, 0],
    }


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("layout", list(_layouts("cpu")))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_fake_tensors_match_real_ones(
    dtype: torch.dtype, layout: str, reduction: Reduction, backend: str, device: str
) -> None:
    """Shape, dtype and strides of the loss and of the gradient are known without any data."""
    input = _layouts(device)[layout].to(dtype)
    target = torch.zeros_like(input)

    def step(input: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        input = input.detach().requires_grad_()
        loss = smooth_l1_loss(input, target, None, 0.5, sigma=2.0, reduction=reduction)
        return loss, torch.autograd.grad(loss, input, torch.ones_like(loss))[0]

    real = step(input, target)
    mode = FakeTensorMode()
    fake_operands = [mode.from_tensor(tensor) for tensor in (input, target)]
    with mode:
        fake = step(*fake_operands)
    for one, other in zip(fake, real, strict=True):
        assert one.shape == other.shape
        assert one.dtype == other.dtype
        assert one.device == other.device
        assert one.stride() == other.stride()


@pytest.mark.parametrize("layout", [*_layouts("cpu"), "empty channels_last"])
def test_memory_format(layout: str, backend: str, device: str) -> None:
    """Of the operator itself, which a compiler calls: as its trace has promised."""
    layouts = _layouts(device)
    layouts["empty channels_last"] = layouts["channels_last"][:0]
    input = layouts[layout]
    problem = make_problem(input, torch.zeros_like(input), beta_number=0.5, reduce=False)
    loss = FORWARD(*problem, *NO_NEEDS)[0]
    assert loss.stride() == torch.empty_like(input).stride()


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_meta_tensors(variant: str, reduction: Reduction, backend: str, device: str) -> None:
    operands, options = make(variant, device=device)
    loss = smooth_l1_loss(*operands, **options, reduction=reduction)
    real = torch.autograd.grad(loss, trained(operands), torch.ones_like(loss))

    def on_meta(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.detach().to("meta").requires_grad_(value.requires_grad)

    metas = [on_meta(operand) for operand in operands]
    options = {name: on_meta(value) for name, value in options.items()}
    meta_loss = smooth_l1_loss(*metas, **options, reduction=reduction)
    found = torch.autograd.grad(meta_loss, trained(metas), torch.ones_like(meta_loss))
    for one, other in zip((meta_loss, *found), (loss, *real), strict=True):
        assert one.is_meta
        assert (one.shape, one.dtype, one.stride()) == (other.shape, other.dtype, other.stride())


@pytest.mark.parametrize("name", PROBLEMS)
def test_gradients_of_the_operator(name: str, backend: str, device: str) -> None:
    """Through the registered autograd rule as through the plain path."""
    problem = _named(name, device)
    sources = [t for t in problem[:OPERANDS] if isinstance(t, Tensor) and t.requires_grad]
    loss = FORWARD(*_forward_arguments(problem))[0]
    with backend_set("eager"):
        expected = _plain(problem)
    tolerance = 1e-12 if loss.dtype == torch.float64 else 1e-6
    torch.testing.assert_close(loss, expected, rtol=tolerance, atol=tolerance)
    if sources:
        upstream = torch.full_like(loss, 1 / 3)  # Which in 16 bits is another number.
        found = torch.autograd.grad(loss, sources, upstream)
        for one, other in zip(found, torch.autograd.grad(expected, sources, upstream), strict=True):
            if one.dtype.itemsize == 2:
                assert_same("gradient", one, other)
                # Were it rounded first, every other element would be another number.
                assert (one != other).sum() <= 0.2 * one.numel()
            else:
                torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def _plain(problem: Problem) -> Tensor:
    outside, beta, divisor = (
        cast(Any, number if tensor is None else tensor)
        for tensor, number in zip(problem[3:6], problem[6:9], strict=True)
    )
    return smooth_l1_loss(
        *(problem.input, problem.target, problem.inside, outside),
        beta=beta,
        reduction="sum" if problem.reduce else "none",
        normalizer=divisor if problem.reduce else None,
    )


@pytest.mark.parametrize("upstream", [1.5, float("inf"), float("nan")])
@pytest.mark.parametrize("name", ["row mask", "uint8 mask"])
def test_masks_exclude_whatever_arrives(
    name: str, upstream: float, backend: str, device: str
) -> None:
    """A saved gradient of 0 would become NaN."""
    problem = _named(name, device)
    loss = FORWARD(*_forward_arguments(problem))[0]
    (gradient,) = torch.autograd.grad(loss, problem.input, torch.full_like(loss, upstream))
    mask = problem.inside if name == "row mask" else problem.outside
    assert isinstance(mask, Tensor)
    assert torch.equal(gradient == 0, (mask == 0).expand_as(gradient))


@pytest.mark.parametrize("beta", [0.0, 0.5])
@pytest.mark.parametrize("reduce", [False, True])
def test_beta_on_the_device(reduce: bool, beta: float, backend: str, device: str) -> None:
    """As a tensor, which the host does not read, what it is as a number; differences of 0 too."""
    problem = _problem(reduce=reduce, inside=(6, 1), device=device)
    input = problem.input.detach().clone()
    input[:2] = problem.target[:2]
    problem = problem._replace(input=input.requires_grad_())
    as_tensor = problem._replace(beta=torch.tensor(beta, device=device), beta_number=1.0)
    found, expected = (
        FORWARD(*_forward_arguments(one)) for one in (as_tensor, problem._replace(beta_number=beta))
    )
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        *(torch.autograd.grad(r[0], input, torch.full_like(r[0], 1.5)) for r in (found, expected))
    )


@pytest.mark.parametrize("requires_grad", ["input", "input target inside outside"])
@pytest.mark.parametrize("reduce", [False, True])
def test_second_order(reduce: bool, requires_grad: str, backend: str, device: str) -> None:
    """A gradient penalty needs the graph of the gradient: the saved one has none."""
    problem = _problem(
        dtype=torch.float64,
        inside=(6, 1),
        outside=(4,),
        reduce=reduce,
        requires_grad=requires_grad,
        device=device,
    )
    sources = [t for t in problem[:OPERANDS] if isinstance(t, Tensor) and t.requires_grad]

    def second(loss: Tensor) -> tuple[Tensor, ...]:
        first = torch.autograd.grad(loss, sources, torch.full_like(loss, 0.7), create_graph=True)
        penalty = torch.stack([(g * g).sum() for g in first]).sum()
        return torch.autograd.grad(penalty, sources)

    found = second(FORWARD(*_forward_arguments(problem))[0])
    with backend_set("eager"):
        expected = second(_plain(problem))
    torch.testing.assert_close(found, expected)
    assert all(bool(g.abs().sum() > 0) and not g.requires_grad for g in found)


def test_what_is_not_wanted_is_empty(backend: str, device: str) -> None:
    """An operator has no optional results: these cost neither memory nor a launch."""
    problem = _named("trained weights", device)
    upstream, *_ = _backward_arguments(problem)
    _, *gradients = FORWARD(*problem, *(False, True, False, False, False))
    gradients += BACKWARD(upstream, *problem, *(False, True, False, True, True))
    sizes = [gradient.numel() for gradient in gradients]
    assert sizes == [0, 24, 0, 24, 0, 1, 6]


def test_gradgradcheck(triton_backend: str, device: str) -> None:
    """Small, for a launch in the interpreter costs milliseconds and there are hundreds."""
    input, target, inside, outside = (
        gaussian(*shape, seed=seed, dtype=torch.float64, device=device, requires_grad=True)
        for seed, shape in enumerate([(2, 2), (2, 2), (2, 1), (2,)])
    )

    def loss(input: Tensor, inside: Tensor, outside: Tensor) -> Tensor:
        problem = make_problem(
            *(input, target.detach(), inside, outside), divisor_number=4, beta_number=0.5
        )
        result: Tensor = FORWARD(*problem, *NO_NEEDS)[0]
        return result

    assert torch.autograd.gradcheck(loss, (input, inside, outside))
    assert torch.autograd.gradgradcheck(loss, (input, inside, outside), fast_mode=True)


def test_shares_no_workspace(device: str, triton_backend: str) -> None:
    """What torch.compile records in a graph must not use memory that is kept for other calls."""
    from fused_smoothl1 import launch

    input, target = (gaussian(20_011, seed=seed, device=device) for seed in (1, 2))
    problem = make_problem(input, target, divisor_number=20_011)
    launch._kept_workspace.cache_clear()
    found = FORWARD(*problem, *(True, False, False, False, False))
    assert not launch._kept_workspace.cache_info().currsize
    expected = launch.forward(problem, (True, False, False, False, False))
    assert launch._kept_workspace.cache_info().currsize, (
        "it takes one, where calls follow each other on a stream"
    )
    torch.testing.assert_close(found[:2], (expected[0], expected[1][0]), rtol=0, atol=0)
