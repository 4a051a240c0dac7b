"""The loss amid all that PyTorch puts around a call: it gives what the composition gives there.

Autograd, its compiler and torch.func run backward passes, each in its own way. A graph may be
captured in one context and used in another: with the kernel it holds a registered operator, which
must then do all that the operations of the composition do.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo import compiled_autograd
from torch.autograd import forward_ad
from torch.autograd.graph import saved_tensors_hooks
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing import assert_close
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint

from fused_smoothl1 import functional, smooth_l1_loss
from tests import support
from tests.composed import composed
from tests.support import DEVICE, KINDS, REDUCTIONS, Loss, boxes, call

pytestmark = support.on_both

# The next two are made in `bound`; all other kinds are calls of the catalogue.
WIDER_TARGET = "float64 target, weights of NaN where the mask excludes"
NO_DIMENSIONS = "float32, no dimensions, numbers"
WEIGHTS = "float32 row and column weights, all gradients"
SHORTER_TARGET = "float32, bfloat16 dense, both gradients"
ALL_KINDS = (*KINDS, "float16 dense", SHORTER_TARGET, WIDER_TARGET, NO_DIMENSIONS)
# (Graphs take longer. L1 is left out: make_fx before autograd makes constants of what it saves.)
FEW_KINDS = (WEIGHTS, "float32 beta of rows, its gradient", SHORTER_TARGET, WIDER_TARGET)


class Bound(nn.Module):
    """A call as a function of the tensors that require a gradient; all else stays as it is."""

    def __init__(self, function: Loss, operands: list[Any], options: dict[str, Any]) -> None:
        super().__init__()
        self.function, self.operands, self.options = function, operands, options

    def forward(self, *sources: Tensor) -> Tensor:
        given = iter(sources)

        def place(value: Any) -> Any:
            return next(given) if isinstance(value, Tensor) and value.requires_grad else value

        operands = [place(value) for value in self.operands]
        return self.function(*operands, **{name: place(v) for name, v in self.options.items()})


def in_float32(*operands: Any, reduction: str, **options: Any) -> Tensor:
    """Return the composition in the contract's dtypes: 16 bits are computed with in float32."""
    wide = [v.float() if isinstance(v, Tensor) and v.dtype.itemsize == 2 else v for v in operands]
    dtype = support.loss_dtype(reduction, *operands, *options.values())
    if torch.is_autocast_enabled(DEVICE):
        dtype = torch.promote_types(dtype, torch.float32)
    # (A tangent without dimensions that has met a number is float64, unless the loss is converted.)
    return composed(*wide, reduction=reduction, **options).double().to(dtype)


def poisoned(x: Tensor, target: Tensor, mask: Tensor, weights: Tensor, **options: Any) -> Tensor:
    return smooth_l1_loss(x, target, mask, torch.where(mask, weights, torch.nan), **options)


def bound(kind: str, reduction: str) -> tuple[Bound, Bound, tuple[Tensor, ...]]:
    """Return the library's call, the composition's, and the values that they are functions of."""
    function: Loss = smooth_l1_loss
    options: dict[str, Any]
    if kind == WIDER_TARGET:
        function, options = poisoned, {"reduction": reduction}
        operands: Any = boxes(6, support.coin(6, 1), (6, 1), grad=(True, False, False, True))
        operands[1] = operands[1].double().requires_grad_()
    elif kind == NO_DIMENSIONS:
        operands, options = boxes((), (), 0.5, grad=3), {"beta": 0.6, "reduction": "none"}
        if reduction == "sum":
            options |= {"reduction": "sum", "normalizer": 2.5}
    else:
        operands, options = call(kind, reduction=reduction)
    sources = tuple(t.detach() for t in support.requiring_grad(operands, options))
    return Bound(function, operands, options), Bound(in_float32, operands, options), sources


def shifted(tensors: Sequence[Tensor], by: float = 1.0) -> tuple[Tensor, ...]:
    return tuple(t + by for t in tensors)


def leaves(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(t.clone().requires_grad_() for t in tensors)


def batches(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(torch.stack([t, t + 1, t + 0.5]) for t in tensors)


def joined(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.flatten() for t in tensors])


class Graph:
    """The graph of 2 * loss: the loss is sent a temporary, whose memory may be reused."""

    def __init__(self, f: Loss, sources: Sequence[Tensor]) -> None:
        self.leaves = leaves(sources)
        self.value = 2 * f(*self.leaves)
        above = torch.linspace(0.8, 2, self.value.numel())  # another for each element
        self.above = above.to(self.value).view(self.value.shape)

    def pullback(self, above: Tensor, **options: Any) -> tuple[Tensor, ...]:
        options = {"retain_graph": True, **options}
        return torch.autograd.grad(self.value, self.leaves, above, **options)


def _create_graph(g: Graph) -> Any:
    """Twice with a graph, then once without, then the gradient of the gradient."""
    first, second = (g.pullback(g.above, create_graph=True) for _ in range(2))
    third = g.pullback(g.above)
    penalty = (joined(first) * joined(second)).sum()
    options = {"retain_graph": True, "materialize_grads": True}
    return first, second, third, torch.autograd.grad(penalty, g.leaves, **options)  # type: ignore


def _dual_above(g: Graph) -> Any:
    """Only the upstream gradient has a tangent: the graph was made without forward mode."""
    with forward_ad.dual_level():
        duals = g.pullback(forward_ad.make_dual(g.above, 3 * g.above + 1))
        return [[part.clone() for part in forward_ad.unpack_dual(dual)] for dual in duals]


def _compiled_autograd(g: Graph, compiler: Any = lambda captured: captured) -> Any:
    """Unless a compiler is given, what it captures runs as it is."""
    with compiled_autograd._enable(compiler):
        return [g.pullback(g.above) for _ in range(2)]


BACKWARDS: dict[str, Callable[[Graph], Any]] = {
    "backward": lambda g: g.value,
    "backward thrice": lambda g: [g.pullback(g.above) for _ in range(3)],
    "create_graph": _create_graph,
    "is_grads_batched": lambda g: g.pullback(*batches([g.above]), is_grads_batched=True),
    "vmap of backward": lambda g: vmap(g.pullback)(*batches([g.above])),
    "jvp of backward": lambda g: jvp(g.pullback, (g.above,), (3 * g.above + 1,)),
    "dual number above": _dual_above,
    "make_fx of backward": lambda g: make_fx(lambda above: g.pullback(above))(g.above)(-g.above),
    "compiled autograd": _compiled_autograd,
    "autograd compiled, and what it calls": partial(
        _compiled_autograd, compiler=torch.compile(backend="aot_eager")
    ),
}


def backward(use: Callable[[Graph], Any], f: Loss, *sources: Tensor) -> Any:
    """Return the results of a use, and of a backward pass after it that must not overwrite them."""
    graph = Graph(f, sources)
    return use(graph), graph.pullback(graph.above, retain_graph=False)


plain_backward = partial(backward, BACKWARDS["backward"])


def _hooks(f: Loss, *s: Tensor) -> Any:
    with saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
        return backward(BACKWARDS["backward thrice"], f, *s)


def gradients(f: Loss) -> Callable[..., tuple[Tensor, ...]]:
    """Return the function of the gradients by all that a function takes."""
    return lambda *s: grad(lambda *s: f(*s).sin().sum(), tuple(range(len(s))))(*s)


def gradients_of_gradients(f: Loss) -> Callable[..., tuple[Tensor, ...]]:
    return gradients(lambda *s: joined(gradients(f)(*s)))


def _dual(f: Loss, *s: Tensor) -> Any:
    """Forward mode outside of torch.func, with a tangent of the first alone."""
    with forward_ad.dual_level():
        return tuple(forward_ad.unpack_dual(f(forward_ad.make_dual(s[0], s[0] + 1), *s[1:])))


def _dual_and_graph(f: Loss, *s: Tensor) -> Any:
    own = leaves(s)
    primal, tangent = _dual(f, *own)
    total = primal.sum() + tangent.sum()
    return primal, tangent, torch.autograd.grad(total, own, materialize_grads=True)


def in_autocast(f: Loss) -> Loss:
    def call(*s: Tensor) -> Tensor:
        with torch.autocast(DEVICE, torch.bfloat16):
            return f(*s)

    return call


def _without_graph(f: Loss, *s: Tensor) -> Any:
    """Without autograd, and with tensors that it can never see."""
    with torch.no_grad():
        ungraphed = f(*leaves(s))
    with torch.inference_mode():
        made = tuple(t.clone() for t in s)
        inferred = f(*made)
    return ungraphed, ungraphed.requires_grad, inferred, inferred.is_inference(), f(*made)


TRANSFORMS: dict[str, Callable[..., Any]] = {
    "grad": lambda f, *s: gradients(f)(*s),
    "grad of grad": lambda f, *s: gradients_of_gradients(f)(*s),
    "vjp": lambda f, *s: vjp(f, *s)[1](f(*s) + 1),
    "jvp": lambda f, *s: jvp(f, s, shifted(s)),
    "jvp of grad": lambda f, *s: jvp(gradients(f), s, shifted(s)),
    "dual": _dual,
    "dual and graph": _dual_and_graph,
    "vmap": lambda f, *s: vmap(lambda first: f(first, *s[1:]))(*batches(s[:1])),
    "vmap of grad": lambda f, *s: vmap(gradients(f))(*batches(s)),
    "jvp of vmap": lambda f, *s: jvp(vmap(f), batches(s), batches(shifted(s))),
    "jacfwd": lambda f, *s: jacfwd(f)(*s),
    "jacrev": lambda f, *s: jacrev(f)(*s),
    "hessian": lambda f, *s: hessian(lambda *s: f(*s).sin().sum())(*s),
    "checkpoint": lambda f, *s: plain_backward(partial(checkpoint, f, use_reentrant=False), *s),
    "saved_tensors_hooks": _hooks,
}
USES: dict[str, Callable[..., Any]] = {
    **{name: partial(backward, use) for name, use in BACKWARDS.items()},
    **TRANSFORMS,
    "autocast": lambda f, *s: plain_backward(in_autocast(f), *s),
    "vmap of autocast": lambda f, *s: TRANSFORMS["vmap"](in_autocast(f), *s),
    "without a graph": _without_graph,
}
SLOW = ("make_fx of backward", "compiled autograd", "autograd compiled, and what it calls")


def gradient(f: Loss) -> Loss:
    """Return the function of autograd's gradients by all that a function takes."""
    return lambda *s: joined(torch.autograd.grad(f(*s).sin().sum(), s))


def second_gradient(f: Loss) -> Loss:
    def second(*s: Tensor) -> Tensor:
        first = torch.autograd.grad(f(*s).sin().sum(), s, create_graph=True)
        return joined(torch.autograd.grad(joined(first).sin().sum(), s))

    return second


CAPTURES: dict[str, Callable[..., Any]] = {
    "make_fx": lambda f, s: make_fx(f)(*s),
    "make_fx before autograd": lambda f, s: make_fx(f, pre_dispatch=True)(*s),
    "gradient": lambda f, s: make_fx(gradient(f))(*s),
    "gradient of tensors without data": lambda f, s: make_fx(
        gradient(f), tracing_mode="fake", _allow_non_fake_inputs=True
    )(*s),
    "gradient before autograd": lambda f, s: make_fx(gradient(f), pre_dispatch=True)(*s),
    "export": lambda f, s: torch.export.export(f, s).module(),
}


def assert_alike(what: str, found: Any, expected: Any) -> None:
    assert_close(found, expected, msg=lambda text: f"{what}: {text}")


@pytest.mark.parametrize(
    ("use", "kind"),
    [(use, kind) for use in USES for kind in (FEW_KINDS if use in SLOW else ALL_KINDS)],
)
def test_call(use: str, kind: str) -> None:
    for reduction in REDUCTIONS:
        ours, theirs, sources = bound(kind, reduction)
        assert_alike(reduction, *(USES[use](f, *sources) for f in (ours, theirs)))


@pytest.mark.filterwarnings("error:.*batching rule")
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("kind", FEW_KINDS)
@pytest.mark.parametrize("capture", CAPTURES)
def test_graph(capture: str, kind: str, reduction: str) -> None:
    """Used with other values than those that it was made with."""
    ours, theirs, sources = bound(kind, reduction)
    graphs = [CAPTURES[capture](f, leaves(sources)) for f in (ours, theirs)]
    for name in (*TRANSFORMS, "jvp of backward", "vmap of backward"):
        assert_alike(name, *(USES[name](graph, *shifted(sources, 0.1)) for graph in graphs))


@pytest.mark.parametrize(
    ("capture", "of"),
    [
        ("make_fx", gradients),
        ("make_fx", gradients_of_gradients),
        ("make_fx", second_gradient),
        ("make_fx before autograd", second_gradient),
    ],
)
def test_graph_of_derivatives(capture: str, of: Any) -> None:
    """Transforms inside of the trace, and second gradients."""
    ours, theirs, sources = bound(WEIGHTS, "mean")
    graphs = [CAPTURES[capture](of(f), leaves(sources)) for f in (ours, theirs)]
    assert_alike(capture, *(graph(*leaves(shifted(sources))) for graph in graphs))


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_compiled(compiler: str) -> None:
    """Under transforms, and around them: compiled code cannot know if forward mode is on."""
    ours, theirs, sources = bound(WEIGHTS, "mean")
    compiled = torch.compile(ours, backend=compiler)
    for use in ("backward", "dual", "jvp", "backward thrice", "dual", "checkpoint"):
        assert_alike(use, *(USES[use](f, *sources) for f in (compiled, theirs)))
    for use in ("grad", "grad of grad", "vmap of grad", "jvp"):
        whole = torch.compile(partial(USES[use], ours), backend=compiler, fullgraph=True)
        assert_alike(use, whole(*sources), USES[use](theirs, *sources))


@pytest.mark.parametrize(
    "kind", ["float16 dense", "bfloat16 dense", "float64 dense, all gradients"]
)
def test_compiled_in_autocast(kind: str) -> None:
    """The loss is float32 or float64, with autocast inside the compiled code or around it."""
    ours, theirs, sources = bound(kind, "none")
    compiled = partial(torch.compile, backend="aot_eager", fullgraph=True)
    for loss in (compiled(in_autocast(ours)), in_autocast(compiled(ours))):
        pair = (plain_backward(f, *sources) for f in (loss, in_autocast(theirs)))
        assert_alike(kind, *pair)


@support.on_eager
def test_autocast_counts_for_its_own_device() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        found = {device: functional._is_autocast(device) for device in ("cpu", "cuda", "meta")}
    assert found == {"cpu": True, "cuda": False, "meta": False}


@pytest.mark.parametrize("dim", [0, -1])
@pytest.mark.parametrize("kind", KINDS)
def test_vmap_over_every_operand(kind: str, dim: int) -> None:
    """Masks, transition points and divisors too."""

    def loss(operands: list[Any], options: dict[str, Any]) -> Tensor:
        return smooth_l1_loss(*operands, **options)

    def batch(*own: Any) -> Any:
        return torch.stack(own, dim) if isinstance(own[0], Tensor) else own[0]

    for reduction in REDUCTIONS:
        samples = [call(kind, reduction=reduction) for _ in range(3)]
        dims = tree_map(lambda own: dim if isinstance(own, Tensor) else None, samples[0])
        found = vmap(loss, dims)(*tree_map(batch, *samples))
        assert_alike(reduction, found, torch.stack([loss(*sample) for sample in samples]))
