"""torch.compile(fullgraph=True): no break in the graph, the numbers of eager PyTorch, few graphs.

Most tests run what Dynamo and AOTAutograd captured as it stands ("aot_eager"): they decide what is
in the graph, and they are quick. A few go through Inductor, to generated code.

A compiler puts a symbol in the place of a number or a size at its second value. What it makes of
symbols is where it goes wrong, or compiles anew for every value until it gives up.
"""

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch._functorch._aot_autograd.utils import make_boxed_func
from torch._functorch.compilers import nop
from torch.testing import assert_close

from fused_smoothl1 import SmoothL1Loss, smooth_l1_loss
from tests import support
from tests.composed import composed
from tests.support import CALLS, DEVICE, KINDS, REDUCTIONS, Loss, boxes, call, results

pytestmark = support.on_both


def compiled(function: Loss = smooth_l1_loss, backend: Any = "aot_eager", **options: Any) -> Loss:
    return torch.compile(function, backend=backend, fullgraph=True, **options)


def recorder(nodes: list[Any]) -> Callable[..., Any]:
    """Return a compiler that tells which calls are in a graph."""

    def record(graph: torch.fx.GraphModule, _: Any) -> Any:
        nodes.extend(node for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    return record


@pytest.mark.parametrize("name", [*CALLS, "empty"])
def test_against_the_oracle(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Masks exclude NaN, and what is not finite above; float16 is rounded once, at the end."""
    monkeypatch.setattr(support, "smooth_l1_loss", compiled())
    operands, options = (boxes(0), {}) if name == "empty" else call(name, 33)
    for upstream in (1 / 3, torch.inf):
        support.check(*operands, **options, upstream=upstream)


@pytest.mark.parametrize(
    ("compiler", "dynamic", "reduction"),
    [
        ("aot_eager", True, "none"),
        ("aot_eager", True, "batchmean"),
        ("aot_eager", None, "mean"),
        ("inductor", True, "mean"),
    ],
)
def test_sizes(compiler: str, dynamic: bool | None, reduction: str) -> None:
    """One graph serves every size; by Dynamo's default, every size but the first."""

    def step(function: Loss, x: Tensor, *operands: Tensor) -> Tensor:
        return 2 * function(x.tanh(), *operands, reduction=reduction)

    counter, counts = CompileCounterWithBackend(compiler), []
    loss = compiled(partial(step, smooth_l1_loss), counter, dynamic=dynamic)
    for rows in (6, 9, 13, 6):
        operands = boxes(rows, (rows, 1), (4,), grad=2)
        assert_close(*(results(f, operands, 1.5) for f in (loss, partial(step, composed))))
        counts.append(counter.frame_count)
    assert 0 < counts[0 if dynamic else 1] == counts[-1]


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_graph(reduction: str, backend: str) -> None:
    """One kernel, or else operations, which a compiler can fuse; no gradient is asked for."""
    operands, options = call(KINDS[0], reduction=reduction)
    nodes: list[Any] = []
    with torch.no_grad():
        compiled(backend=recorder(nodes))(*operands, **options)
    kernels = [node for node in nodes if "smooth" in str(node.target)]
    assert len(kernels) == (backend == "triton")
    for kernel in kernels:
        assert str(kernel.target) == "fused_smoothl1.forward.default"
        assert tuple(kernel.args[-5:]) == (False,) * 5
    assert nodes


@support.on_kernel
def test_one_launch_and_a_product(launches: list[str]) -> None:
    """The gradient came with the loss; in the backward pass nothing is computed anew."""
    nodes: list[Any] = []

    def of_backward(*graph: Any) -> Any:
        return make_boxed_func(recorder(nodes)(*graph))

    loss = compiled(backend=aot_autograd(fw_compiler=nop, bw_compiler=of_backward))(*boxes(6))
    assert launches == ["smooth_l1_kernel"]
    loss.backward()
    assert launches == ["smooth_l1_kernel"]
    assert {str(node.target) for node in nodes} == {"aten.detach.default", "aten.mul.Tensor"}


@pytest.mark.filterwarnings("error:Dynamo")
@pytest.mark.parametrize("mode", ["no_grad", "train", "transform"])
def test_runs_as_it_stands_where_the_compiler_gives_up(mode: str) -> None:
    """Otherwise Dynamo would go on into this package's own functions, down to the launch."""
    x, target = boxes(6, grad=mode == "train")
    nodes: list[Any] = []

    def step(count: Any) -> Any:
        loss = partial(smooth_l1_loss, target=target, reduction="sum", normalizer=count)
        if mode == "transform":
            return torch.func.grad(loss)(x)
        with torch.set_grad_enabled(mode == "train"):
            value = loss(x)
        return torch.autograd.grad(value, x)[0] if mode == "train" else value

    partly = torch.compile(step, backend=recorder(nodes))
    # (As an argument of a compiled function, one of NumPy's numbers is an array.)
    for count in (np.float32(3), np.float64(5), np.int64(7)):
        assert_close(partly(count), step(int(count)))
    traces = " ".join(node.stack_trace or "" for node in nodes)
    assert set(re.findall(r"fused_smoothl1.(\w+)\.py", traces)) <= {"functional"}


def test_a_wrong_value_among_others_raises() -> None:
    loss: Loss = torch.compile(smooth_l1_loss, backend="aot_eager")
    for name, message in {
        "beta": r"beta must be in \[0, inf\), got -1\.0",
        "sigma": r"sigma must be in \(0, inf\], got -1\.0",
        "normalizer": "normalizer must be a finite number above 0, got -1",
    }.items():
        for value in (0.5, 0.7):
            loss(*boxes(6), reduction="sum", **{name: value})
        with pytest.raises(Exception, match=message):
            loss(*boxes(6), reduction="sum", **{name: -1.0})


def _everywhere(f: Loss, x: Tensor, n: Any) -> Tensor:
    """Every number that a call can have, with every reduction."""
    losses = [f(x, outside_weights=n, sigma=n + 3, reduction="sum", normalizer=n + 2)]
    for reduction in REDUCTIONS:
        losses.append(f(x, outside_weights=n + 1, sigma=n + 5, reduction=reduction).sum())
    return torch.stack(losses)


def _under_vmap(f: Loss, x: Tensor, n: Any) -> Tensor:
    options = {"sigma": n + 2, "reduction": "sum", "normalizer": n + 1}
    return torch.vmap(lambda x: f(x, outside_weights=n, **options))(torch.stack([x, -x]))


# Calls with a number in them, of the library's function and of the composition.
ALONE: dict[str, Callable[[Loss, Tensor, Any], Tensor]] = {
    "beta": lambda f, x, n: f(x, beta=n),
    "sigma": lambda f, x, n: f(x, sigma=n, reduction="none"),
    "outside": lambda f, x, n: f(x, outside_weights=n, reduction="none"),
    "normalizer": lambda f, x, n: f(x, reduction="sum", normalizer=n),
    "two": lambda f, x, n: f(x, beta=n) + f(x, sigma=n + 1),
}
TOGETHER: dict[str, Callable[[Loss, Tensor, Any], Tensor]] = {
    "special": lambda f, x, n: f(x, beta=n) + f(x, outside_weights=n),
    "everywhere": _everywhere,
    "under vmap": _under_vmap,
}
FLOATS, INTEGERS = (0.2, 0.5, 1.0, 3.0, 0.7, 1.3), (3, 5, 7, 2, 1, 13)
# Those of L1, and those for which weights and divisors are left out, are among others.
SPECIAL = (0.5, 0.7, 0.0, 0.9, 1.0, 2.0, 0.0)
NUMBERS: list[tuple[str, Any, str, dict[str, Any]]] = [
    *((name, FLOATS, "mask", {}) for name in (*ALONE, "everywhere", "under vmap")),
    *((name, INTEGERS, "rows", {}) for name in ALONE),
    ("special", SPECIAL, "rows", {}),
    # Generated code has been wrong with symbols where what was captured is right.
    ("everywhere", FLOATS[:5], "mask", {"compiler": "inductor"}),
    ("two", FLOATS[:5], "rows", {"compiler": "inductor"}),
    # A tensor in a number's place neither promotes 16 bits nor has fewer than the arithmetic.
    *(
        (name, FLOATS, "mask", {"dtype": dtype})
        for name in ("outside", "sigma")
        for dtype in (torch.bfloat16, torch.float64)
    ),
]


@pytest.mark.parametrize(("name", "numbers", "weights", "options"), NUMBERS)
def test_numbers_that_change(
    name: str, numbers: Any, weights: str, options: dict[str, Any]
) -> None:
    """Right, and in few graphs: one of the first number, and one or two of all others."""
    x, target, rows = boxes(6, (6, 1), dtype=options.get("dtype", torch.float32))
    inside = rows > 0 if weights == "mask" else rows

    def step(function: Loss, x: Tensor, number: Any) -> Tensor:
        f = partial(function, target=target, inside_weights=inside)
        return (ALONE | TOGETHER)[name](f, x, number)

    counter = CompileCounterWithBackend(options.get("compiler", "aot_eager"))
    loss = compiled(partial(step, smooth_l1_loss), counter)
    for number in numbers:
        assert_close(*(results(f, [x, number], 1.5) for f in (loss, partial(step, composed))))
    assert counter.frame_count <= 3


def test_attribute_of_a_module() -> None:
    """Warm-up of beta on one module, then other modules through the same compiled function."""
    operands, counter = boxes(64), CompileCounterWithBackend("inductor")
    loss = compiled(lambda criterion: criterion(*operands), counter)
    kept = SmoothL1Loss()
    modules = (*[kept] * 4, *(SmoothL1Loss() for _ in range(3)))
    for module, beta in zip(modules, (0.2, 0.5, 1.0, 3.0, 0.3, 2.0, 4.0), strict=True):
        module.beta = beta
        assert_close(loss(module), composed(*operands, beta=beta))
    assert counter.frame_count <= 4


@pytest.mark.parametrize(("name", "number"), [("sigma", 1e-20), ("beta", 1e39)])
def test_numbers_beyond_the_largest(name: str, number: float) -> None:
    """An infinite difference has an infinite loss, also if a symbol stands for such a beta."""
    x, loss = torch.tensor([3e38, 1.0, -torch.inf], device=DEVICE), compiled()
    for factor in (1, 2, 3):
        options: dict[str, Any] = {"reduction": "none", name: factor * number}
        assert_close(loss(x, -x, **options), smooth_l1_loss(x, -x, **options))


# Calls of predictions, targets and a mask of rows, of which come indices, a count and a number.
DATA_DEPENDENT: dict[str, Callable[..., Tensor]] = {
    "rows": lambda f, x, t, m, i, n, a: f(x[i], t[i]),
    # Two sizes that are the same, which only the data know.
    "rows, twice": lambda f, x, t, m, i, n, a: f(x[i], t[m]),
    # (PyTorch 2.9 does not compile x[:n].)
    "first rows": lambda f, x, t, m, i, n, a: f(x.narrow(0, 0, n), t.narrow(0, 0, n)),
    "weights": lambda f, x, t, m, i, n, a: f(x[i], t[i], t[i, :1], x[i] > 0),
    "outside number": lambda f, x, t, m, i, n, a: f(x, t, None, a),
    # Of a sum alone.
    "integer": lambda f, x, t, m, i, n, a: f(x, t, m[:, None], normalizer=n),
    "float": lambda f, x, t, m, i, n, a: f(x, t, normalizer=a),
    "beta": lambda f, x, t, m, i, n, a: f(x, t, beta=a),
    "sigma": lambda f, x, t, m, i, n, a: f(x, t, sigma=a),
}
captures_data = torch._dynamo.config.patch(
    capture_dynamic_output_shape_ops=True, capture_scalar_outputs=True
)


@pytest.mark.parametrize("name", DATA_DEPENDENT)
@captures_data
def test_sizes_and_numbers_that_depend_on_data(name: str) -> None:
    """With every reduction in one graph, except where there is no other or it takes long."""

    def step(function: Loss, x: Tensor, t: Tensor, m: Tensor) -> Tensor:
        given = x, t, m, m.nonzero().squeeze(1), m.sum().item(), t.abs().mean().item()
        each = ["sum"] if name in ("integer", "float", "beta", "sigma") else REDUCTIONS
        losses = (DATA_DEPENDENT[name](partial(function, reduction=r), *given) for r in each)
        return torch.stack([loss.sum() for loss in losses])

    loss = compiled(partial(step, smooth_l1_loss))
    for rows in (6, 9):
        operands = [*boxes(rows), torch.arange(rows, device=DEVICE) % 3 == 0]
        assert_close(*(results(f, operands, 1.5) for f in (loss, partial(step, composed))))


@pytest.mark.parametrize("wrong", ["target", "weights"])
@captures_data
def test_sizes_that_turn_out_to_differ(wrong: str) -> None:
    """Which nobody knows before the data are there: an error then, not a read past the end."""

    def step(x: Tensor, t: Tensor, m: Tensor, other: Tensor) -> Tensor:
        target = t[other if wrong == "target" else m]
        return smooth_l1_loss(x[m], target, t[other, :1], reduction="sum")

    loss, (x, t), row = compiled(step), boxes(6), torch.arange(6, device=DEVICE)
    assert_close(*(results(f, [x, t, row < 4, row > 1]) for f in (loss, step)))
    with pytest.raises(RuntimeError, match=r"assertion|Eq"):
        loss(x, t, row < 4, row < 2)


@captures_data
def test_an_empty_selection_is_0() -> None:
    """In a graph that serves any number of rows, also divided by their number."""
    loss: Loss = compiled(
        lambda x, t, m: smooth_l1_loss(x[m], t[m], reduction="sum", normalizer=m.sum())
    )
    operands = boxes(6)
    for selected in (True, False):
        value, gradient = results(loss, [*operands, torch.full((6,), selected, device=DEVICE)])
        assert bool(value != 0) == selected
        assert gradient.isfinite().all()
