"""What records a call instead of running it: torch.export, torch.jit.trace, torch.fx.

Each records what works for other data and other sizes.
"""

import io
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing import assert_close

from fused_smoothl1 import SmoothL1Loss, smooth_l1_loss
from tests import support
from tests.composed import composed
from tests.support import DEVICE, OPERANDS, REDUCTIONS, Loss, boxes, coin, results

pytestmark = support.on_both


class Step(nn.Module):
    """A model that hands out its loss; a sum is divided by the number of positives."""

    def __init__(self, reduction: Any = "mean") -> None:
        super().__init__()
        self.head = nn.Linear(4, 4, device=DEVICE)
        self.criterion = SmoothL1Loss(sigma=3.0, reduction=reduction)

    def forward(self, x: Tensor, target: Tensor, mask: Tensor, outside: Tensor) -> Tensor:
        count = mask.sum().item() if self.criterion.reduction == "sum" else None
        return self.criterion(self.head(x), target, mask, outside, count)


def operands_of(rows: int) -> tuple[Tensor, ...]:
    mask = torch.arange(rows, device=DEVICE)[:, None] % 3 == 0
    return *boxes(rows, grad=0), mask, torch.full((4,), 0.5, device=DEVICE)


def exported(module: nn.Module, strict: bool = False) -> Any:
    rows = {0: torch.export.Dim("batch", min=1, max=64)}
    shapes = rows, rows, rows, None
    return torch.export.export(module, operands_of(6), dynamic_shapes=shapes, strict=strict)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_export(reduction: str, strict: bool, backend: str) -> None:
    """Also saved and loaded, decomposed as for a compiler, and traced.

    The weights do not fix the batch's size, nor need the count be known to be positive.
    """
    module, file = Step(reduction), io.BytesIO()
    program = exported(module, strict)
    # All other nodes run without this package.
    kernels = [node for node in program.graph.nodes if "smooth" in str(node.target)]
    assert len(kernels) == (backend == "triton")
    for kernel in kernels:
        assert str(kernel.target) == "fused_smoothl1.forward.default"
        # (AOTInductor writes out no symbols of sizes.)
        assert all(isinstance(node.meta["val"], Tensor) for node in kernel.all_input_nodes)
    torch.export.save(program, file)
    file.seek(0)
    for one in (program, torch.export.load(file), program.run_decompositions()):
        for rows in (1, 4, 9):
            operands = operands_of(rows)
            assert_close(one.module()(*operands), module(*operands))
    operands = operands_of(6)
    traced = torch.jit.trace(program.module(), operands, check_trace=False)
    assert_close(traced(*operands), module(*operands))


def ahead_of_time(path: str) -> None:
    """Compile to a library, and load it from its package."""
    module, operands = Step(), operands_of(9)
    package = torch._inductor.aoti_compile_and_package(exported(module), package_path=path)
    assert_close(torch._inductor.aoti_load_package(package)(*operands), module(*operands))


@support.needs_gpu  # On a CPU it takes a minute of C++.
def test_aot_inductor(backend: str, tmp_path: Any) -> None:
    """In a process of its own, as it has crashed."""
    code = f"from tests import test_export; test_export.ahead_of_time('{tmp_path}/step.pt2')"
    support.run_python("-c", code, gpu=True, FUSED_SMOOTHL1_BACKEND=backend)


@pytest.mark.parametrize("weights", ["none", "rows", "mask"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_jit_trace(reduction: str, weights: str) -> None:
    """Deprecated, and still used to export models; with an example of no rows at all, too."""

    def step_of(function: Loss) -> Loss:
        def step(x: Tensor, target: Tensor, rows: Tensor) -> Tensor:
            inside = {"none": None, "rows": rows, "mask": rows > 0}[weights]
            return function(x, target, inside, beta=0.6, reduction=reduction)

        return step

    for example in (0, 6):
        traced: Any = torch.jit.trace(step_of(smooth_l1_loss), boxes(example, (example, 1)))
        for rows in (6, 9):
            operands = boxes(rows, (rows, 1))
            assert_close(*(results(f, operands, 1.5) for f in (traced, step_of(composed))))
        # On a GPU PyTorch's fuser fails on a product of single numbers (pytorch#144965).
        if example == 0 and reduction == "sum":
            products = [node for node in traced.graph.nodes() if node.kind() == "aten::mul"]
            assert products
            assert all(any(v.type().dim() for v in node.inputs()) for node in products)


def test_symbolic_trace() -> None:
    """One node for the loss, as for PyTorch's own, and no word of its inside."""
    module = Step("sum")
    traced = torch.fx.symbolic_trace(module)
    calls = [node.target for node in traced.graph.nodes if node.op.startswith("call")]
    assert calls == ["sum", "item", "head", smooth_l1_loss]
    operands = operands_of(7)
    assert_close(traced(*operands), module(*operands))


def test_functions_that_override_it() -> None:
    """A subclass may answer in this function's place, as with PyTorch's own functions."""

    class Answers(Tensor):
        @classmethod
        def __torch_function__(
            cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            return function, len(args), kwargs

    x, target = boxes(3, grad=0)
    for name in (*OPERANDS, "normalizer"):
        operands: Any = {"input": x, "target": target, name: x.as_subclass(Answers)}
        function, positional, options = smooth_l1_loss(**operands, reduction="sum")
        assert (function, positional) == (smooth_l1_loss, 4)
        assert options.keys() == {"sigma", "beta", "reduction", "normalizer"}
        assert options["reduction"] == "sum"


def test_sizes_in_the_place_of_numbers() -> None:
    """Symbols, where shapes are symbolic: weights, transition points and normalizers."""

    def step(f: Loss, x: Tensor, target: Tensor) -> Tensor:
        rows, columns = x.shape
        first = f(x, target, None, rows, beta=columns / 8, reduction="sum", normalizer=rows)
        return first + f(x, target, None, columns / 4, sigma=columns)

    def gradient(f: Loss, *operands: Tensor) -> list[Tensor]:
        return results(partial(step, f), operands)

    traced = make_fx(partial(gradient, smooth_l1_loss), tracing_mode="symbolic")(*boxes(6))
    for rows in (6, 9):
        operands = boxes(rows)
        assert_close(traced(*operands), gradient(composed, *operands))


def test_wrong_shapes_that_depend_on_data() -> None:
    """The message is the same, without a hint that would ask for the data."""

    def step(x: Tensor, target: Tensor, mask: Tensor) -> Tensor:
        rows = mask.nonzero().squeeze(1)
        return smooth_l1_loss(x[rows], target[rows][:, None])

    with pytest.raises(ValueError, match=r"target must have input's shape, got .*\)$"):
        make_fx(step, tracing_mode="symbolic")(*boxes(6, grad=0), coin(6))
