"""What the tests have in common: operands, the catalogue's calls, backends, and the comparison.

Tolerances are derived, not guessed. The package computes in the accumulator's dtype (float32, or
float64 where an operand is float64), so a value that is not a sum passes through at most ROUNDINGS
roundings of that dtype, each of half an epsilon, and the loss at most doubles the relative error
of x. A sum of n terms made as a tree, of any shape, adds no more than 2 log2(n) roundings of the
sum of the terms' absolute values. Storing in 16 bits adds half an epsilon, or one where a saved
gradient is multiplied by an upstream gradient afterwards.
"""

import importlib.util
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial, reduce
from pathlib import Path
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from bench.codegen.calls import Call, calls
from fused_smoothl1 import dispatch, smooth_l1_loss
from fused_smoothl1.functional import Reduction
from tests import oracle

ROOT = Path(__file__).parents[1]
# With a CUDA GPU every test runs on it with the compiled kernel, without one on the CPU with the
# same kernel under Triton's interpreter.
HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"

ROUNDINGS = 16
OPERANDS = ("input", "target", "inside_weights", "outside_weights", "sigma", "beta")
REDUCTIONS: tuple[Reduction, ...] = get_args(Reduction)
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
MASKS = (torch.bool, torch.uint8)

assert_equal = partial(assert_close, rtol=0, atol=0, equal_nan=True)

Shape = tuple[int, ...]
Loss = Callable[..., Tensor]


def _triton() -> tuple[int, ...]:
    """Return the first two numbers of Triton's version, or nothing without it.

    It is not imported: some of the processes that import this file must do so later.
    """
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        return ()
    (numbers,) = re.findall(r"^__version__ = .(\d+)\.(\d+)", Path(spec.origin).read_text(), re.M)
    return tuple(map(int, numbers))


TRITON_VERSION = _triton()
HAS_TRITON = bool(TRITON_VERSION)
# The interpreter of Triton 3.6 and older fails with NumPy 2.4 and newer. (Tests that run on the CPU
# need it on a machine with a GPU too.)
OLD_NUMPY = np.lib.NumpyVersion(np.__version__) < "2.4.0"
HAS_INTERPRETER = HAS_TRITON and (TRITON_VERSION >= (3, 7) or OLD_NUMPY)
NO_INTERPRETER = "waits for a Triton whose interpreter works with this NumPy"
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="waits for a machine with Triton")
needs_gpu = pytest.mark.skipif(not HAS_GPU, reason="waits for a CUDA GPU")
needs_interpreter = pytest.mark.skipif(not HAS_INTERPRETER, reason=NO_INTERPRETER)
needs_no_gpu = pytest.mark.skipif(HAS_GPU, reason="waits for a machine without a GPU")

# On which backends tests run: as `pytestmark` all of a file, as a decorator one that differs.
on_both = pytest.mark.backends("eager", "triton")
on_eager = pytest.mark.backends("eager")
on_kernel = pytest.mark.backends("triton")


def from_readme(name: str) -> Any:
    """Return a function that a block of the README defines."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (block,) = re.findall(rf"^```python\n((?:(?!```).)*def {name}\(.*?)^```", text, re.M | re.S)
    namespace: dict[str, Any] = {}
    exec(block, namespace)
    return namespace[name]


@contextmanager
def backend_set(name: str | None) -> Iterator[None]:
    """Choose a backend (None: leave the choice unset) as for a new process, which reads it once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FUSED_SMOOTHL1_BACKEND", name or "")
        if name is None:
            patch.delenv("FUSED_SMOOTHL1_BACKEND")
        dispatch._backends.clear()
        try:
            yield
        finally:
            dispatch._backends.clear()


def run_python(
    *arguments: str,
    status: Sequence[int] = (0,),
    gpu: bool = False,
    timeout: float = 600,
    **environment: str,
) -> str:
    """Return what a fresh interpreter prints, which must end with one of these statuses.

    None of this run's settings count in it, nor a GPU by default.
    """
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("TRITON_", "FUSED_"))}
    hidden = {} if gpu else {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**kept, **hidden, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode in status, done.stdout + done.stderr
    return done.stdout


def values(
    *shape: int,
    dtype: torch.dtype = torch.float32,
    scale: float = 1.0,
    grad: bool = False,
    seed: int | None = None,
) -> Tensor:
    """Return normally distributed values, the same on every device.

    Each call draws new ones, the same at every run of a test; with a seed always the same.
    """
    generator = torch.default_generator if seed is None else torch.Generator().manual_seed(seed)
    drawn = torch.randn(shape, generator=generator, dtype=torch.float64) * scale
    return drawn.to(dtype).to(DEVICE).requires_grad_(grad)


def coin(*shape: int, p: float = 0.5) -> Tensor:
    """Return a mask of independent throws with probability p, of which the first two differ."""
    mask = torch.rand(shape) < p
    if mask.numel() > 1 and 0 < p < 1:
        mask.view(-1)[:2] = torch.tensor([True, False])
    return mask.to(DEVICE)


def boxes(
    shape: int | Shape,
    *weights: Any,
    grad: int | Sequence[bool] = 1,
    dtype: torch.dtype = torch.float32,
    scale: float = 1.0,
) -> list[Any]:
    """Return predictions and targets, `shape` or (rows, 4), and the weights behind them.

    Weights are made if they are given by their shape. The first `grad` operands require a gradient,
    or those of which it says so.
    """
    size = (shape, 4) if isinstance(shape, int) else shape

    def made(i: int, operand: Any) -> Any:
        needed = i < grad if isinstance(grad, int) else grad[i]
        drawn = isinstance(operand, tuple)
        return values(*operand, dtype=dtype, scale=scale, grad=needed) if drawn else operand

    return [made(i, operand) for i, operand in enumerate((size, size, *weights))]


def catalogued(name: str, rows: int) -> Call:
    """Return the call of the catalogue that goes by this name, "float32 dense" for example."""
    (found,) = (one for one in calls(rows) if f"{one.dtype} {one.name}" == name)
    return found


def call(name: str, rows: int = 6, **options: Any) -> tuple[list[Any], dict[str, Any]]:
    """Return operands and options of a call of the catalogue.

    Where a mask does not select, NaN and inf stand in input and target. The options are changed as
    given; a normalizer is left out unless the reduction is a sum.
    """

    def make(*shape: int, dtype: str) -> Tensor:
        kind = getattr(torch, dtype)
        if not shape:
            return torch.tensor(7, dtype=kind, device=DEVICE)
        return coin(*shape).to(kind) if kind in MASKS else values(*shape, dtype=kind)

    operands, own = catalogued(name, rows).bind(make)
    for mask in operands[2:]:
        if mask.dtype in MASKS:
            excluded = (mask == 0).expand(operands[0].shape)
            operands[0].data[excluded], operands[1].data[excluded] = math.nan, math.inf
    own |= options
    if own["reduction"] != "sum":
        own["normalizer"] = None
    return operands, own


# Every call of the catalogue; and for what surrounds a call, one of every kind of operand.
CALLS = [f"{one.dtype} {one.name}" for one in calls(rows=1)]
KINDS = [
    f"float32 {name}"
    for name in (
        "dense",
        "row and column weights, all gradients",
        "row mask, int64 normalizer",
        "element mask",
        "two masks",
        "outside mask, gradient of channel weights",
        "unaligned, one program, a number",
        "every other column, transposed target, L1",
        "beta of rows, its gradient",
        "beta of channels, row mask",
    )
]


def requiring_grad(operands: Sequence[Any], options: dict[str, Any]) -> list[Tensor]:
    """Return the tensors that require a gradient."""
    return [t for t in (*operands, *options.values()) if isinstance(t, Tensor) and t.requires_grad]


def results(
    function: Loss, operands: Sequence[Any], upstream: Any = 1.0, **options: Any
) -> list[Tensor]:
    """Return a loss, and the gradient of each tensor that requires one.

    `upstream` is the gradient that arrives at the loss, or its value everywhere.
    """
    loss = function(*operands, **options)
    above = upstream if isinstance(upstream, Tensor) else torch.full_like(loss, upstream)
    wanted = requiring_grad(operands, options)
    return [loss.detach(), *(torch.autograd.grad(loss, wanted, above) if wanted else ())]


def accumulator(*operands: Any) -> torch.dtype:
    """Return the dtype of the arithmetic."""
    wide = any(isinstance(t, Tensor) and t.dtype == torch.float64 for t in operands)
    return torch.float64 if wide else torch.float32


def loss_dtype(reduction: str, *operands: Any) -> torch.dtype:
    """Return the dtype that the contract gives the loss."""
    if reduction != "none":
        return accumulator(*operands)
    floating = [t.dtype for t in operands if isinstance(t, Tensor) and t.is_floating_point()]
    return reduce(torch.promote_types, floating)


def assert_near(
    what: str,
    actual: Tensor,
    expected: npt.NDArray[np.float64],
    *,
    computed_in: torch.dtype,
    magnitude: npt.NDArray[np.float64] | None = None,
    terms: int = 1,
    storage_epsilons: float = 0.5,
) -> None:
    """Compare with the oracle: the same NaN, the same infinities, and the rest within bounds.

    `magnitude` is the sum of the absolute values of the terms where `expected` is a sum.
    """
    assert tuple(actual.shape) == expected.shape, f"{what}: shape {tuple(actual.shape)}"
    stored, computed = torch.finfo(actual.dtype), torch.finfo(computed_in)
    got = oracle.as_float64(actual)
    with np.errstate(all="ignore"):
        rounded = oracle.as_float64(torch.from_numpy(np.array(expected)).to(actual.dtype))
        special = ~np.isfinite(rounded)
        np.testing.assert_array_equal(got[special], rounded[special], err_msg=what)
        size = np.abs(expected) if magnitude is None else np.maximum(magnitude, np.abs(expected))
        bound = (ROUNDINGS + 2 * math.log2(max(terms, 1))) * 0.5 * computed.eps * size
        if stored.eps > computed.eps:
            bound += storage_epsilons * stored.eps * np.abs(expected)
        bound += stored.smallest_normal * stored.eps + computed.smallest_normal
        error = np.abs(got - expected)
    np.testing.assert_array_less(error[~special], bound[~special], err_msg=what)


def _magnitude(name: str, operands: dict[str, Any], **kwargs: Any) -> Any:
    """Return the sum of the absolute terms of a broadcast operand's gradient, and their number."""
    operand = operands[name]
    wide = {**operands, name: operand.detach().expand(operands["input"].shape)}
    terms = getattr(oracle.smooth_l1(**wide, **kwargs), name)
    with np.errstate(all="ignore"):
        sums = oracle.sum_to_shape(np.abs(terms), operand)
    return sums, max(terms.size // max(operand.numel(), 1), 1)


def _absolute(weights: Any) -> Any:
    is_mask = isinstance(weights, Tensor) and weights.dtype in MASKS
    return weights if weights is None or is_mask else abs(weights)


def check(
    input: Tensor,
    target: Tensor,
    inside_weights: Any = None,
    outside_weights: Any = None,
    *,
    sigma: Any = None,
    beta: Any = None,
    upstream: Any = 1.0,
    **options: Any,
) -> None:
    """Hold the loss, and the gradient of each operand that requires one, against the oracle.

    Also asserts what is true of every call: devices, dtypes, shapes, the input's memory format, and
    that no operand was written to.
    """
    given = (input, target, inside_weights, outside_weights, sigma, beta)
    operands = dict(zip(OPERANDS, given, strict=True))
    tensors = {name: t for name, t in operands.items() if isinstance(t, Tensor)}
    before = [(t.detach().clone(), t._version) for t in tensors.values()]
    reduction = options.get("reduction", "mean")

    loss = smooth_l1_loss(**operands, **options)

    assert loss.dtype == loss_dtype(reduction, *given)
    assert loss.device == input.device
    layout = torch.empty_like(input).stride()
    assert loss.stride() in (layout, ())
    # As autograd hands it down, so that the oracle multiplies by the same rounded number.
    grad_output = torch.as_tensor(upstream, dtype=loss.dtype, device=loss.device)
    sources = {name: t for name, t in tensors.items() if t.requires_grad}
    gradients: dict[str, Tensor] = {}
    if sources:
        above = grad_output.expand(loss.shape)
        found = torch.autograd.grad(loss, list(sources.values()), above)
        gradients = dict(zip(sources, found, strict=True))

    settings: Any = {"reduction": reduction, "normalizer": options.get("normalizer")}
    settings["upstream"] = grad_output
    expected = oracle.smooth_l1(**operands, **settings)
    computed_in = accumulator(*given)
    if reduction == "none":
        assert_near("loss", loss, expected.loss, computed_in=computed_in)
    else:
        positive = {**operands, "outside_weights": _absolute(outside_weights)}
        absolute = oracle.smooth_l1(**positive, **settings).loss
        summed: Any = {"magnitude": absolute, "terms": input.numel()}
        assert_near("loss", loss, expected.loss, computed_in=computed_in, **summed)
    for name, gradient in gradients.items():
        operand = operands[name]
        assert gradient.dtype == operand.dtype, f"{name}: gradient in {gradient.dtype}"
        magnitude, terms = None, 1
        if name in OPERANDS[:2]:
            assert gradient.stride() == layout, f"{name}: gradient with strides {gradient.stride()}"
        else:
            magnitude, terms = _magnitude(name, operands, **settings)
        assert_near(
            f"gradient of {name}",
            gradient,
            getattr(expected, name),
            computed_in=computed_in,
            magnitude=magnitude,
            terms=terms,
            # A saved gradient is rounded, multiplied by the upstream gradient and rounded again.
            # Not in float16: its values must meet the upstream gradient first.
            storage_epsilons=0.51 if operand.dtype == torch.float16 else 1.01,
        )
    for tensor, (value, version) in zip(tensors.values(), before, strict=True):
        assert tensor._version == version, "an operand was written to"
        assert_equal(tensor.detach(), value)
