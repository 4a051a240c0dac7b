"""torch.export: strict and not, with a dynamic batch, and a round trip through a file."""

import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fused_smoothl1 import SmoothL1Loss
from tests.test_compile import OPERATOR
from tests.variants import detached, make


class _Step(nn.Module):
    """A model that hands out its loss."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.head = nn.Linear(4, 4)
        self.criterion = SmoothL1Loss(**options)

    def forward(self, x: Tensor, target: Tensor, inside: Tensor, outside: Tensor) -> Tensor:
        loss: Tensor = self.criterion(self.head(x), target, inside, outside)
        return loss


def _operands(rows: int, device: str) -> tuple[Tensor, ...]:
    input, target, _, _ = detached(make("plain", rows, device=device)[0])
    mask = make("bool_rows", rows, device=device)[0][2]
    return input, target, mask, torch.full((1, 4), 0.5, device=device)


def _exported(module: nn.Module, strict: bool, device: str) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch", min=2)
    rows = {0: batch}
    return torch.export.export(
        module, _operands(6, device), dynamic_shapes=(rows, rows, rows, None), strict=strict
    )


def _targets(program: torch.export.ExportedProgram) -> list[str]:
    return [str(node.target) for node in program.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize("reduction", ["none", "mean", "batchmean"])
@pytest.mark.parametrize("strict", [False, True])
def test_round_trip(strict: bool, reduction: str, backend: str, device: str) -> None:
    """Saved, loaded, and called with another batch: the result of the module itself."""
    module = _Step(sigma=3.0, reduction=reduction).to(device)
    program = _exported(module, strict, device)
    assert (OPERATOR in _targets(program)) == (backend == "triton")
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file)
    for rows in (6, 11):
        operands = _operands(rows, device)
        expected = module(*operands)
        for one in (program, loaded):
            torch.testing.assert_close(one.module()(*operands), expected)


@pytest.mark.parametrize("strict", [False, True])
def test_graph_contains_the_kernel(strict: bool, triton_backend: str, device: str) -> None:
    assert _targets(_exported(_Step(beta=0.5).to(device), strict, device)).count(OPERATOR) == 1


def test_graph_of_eager_pytorch_runs_without_the_package(eager_backend: str, device: str) -> None:
    """It consists of PyTorch's own operators."""
    names = _targets(_exported(_Step(beta=0.5).to(device), False, device))
    assert all(name.startswith(("aten.", "<built-in")) for name in names), names


@pytest.mark.parametrize("shape", [(4,), ()])
@pytest.mark.parametrize("strict", [False, True])
def test_weights_do_not_constrain_the_batch(
    strict: bool, shape: tuple[int, ...], backend: str, device: str
) -> None:
    """A dimension that only aligns with another by its place in a tuple is none of its kind."""
    module = _Step(sigma=2.0).to(device)
    weights = torch.full(shape, 0.5, device=device)
    rows = {0: torch.export.Dim("batch", min=1, max=64)}
    program = torch.export.export(
        module,
        (*_operands(6, device)[:3], weights),
        dynamic_shapes=(rows, rows, rows, None),
        strict=strict,
    )
    for count in (1, 4, 9):
        operands = (*_operands(count, device)[:3], weights)
        torch.testing.assert_close(program.module()(*operands), module(*operands))


def test_decompositions(backend: str, device: str) -> None:
    """As a compiler behind torch.export takes a program."""
    module = _Step(sigma=2.0).to(device)
    program = _exported(module, False, device).run_decompositions()
    operands = _operands(9, device)
    torch.testing.assert_close(program.module()(*operands), module(*operands))


def test_normalizer(backend: str, device: str) -> None:
    """The count of positives is an input of the program: nothing reads it while tracing."""

    class Normalized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.criterion = SmoothL1Loss(sigma=3.0, reduction="sum")

        def forward(self, x: Tensor, target: Tensor, mask: Tensor) -> Tensor:
            count = mask.sum().clamp(min=1)
            loss: Tensor = self.criterion(x, target, mask, None, count)
            return loss

    module = Normalized()
    operands = _operands(6, device)[:3]
    program = torch.export.export(module, operands, strict=False)
    torch.testing.assert_close(program.module()(*operands), module(*operands))


@pytest.mark.parametrize("reduction", ["none", "mean", "batchmean"])
def test_operator_takes_numbers(reduction: str, triton_backend: str, device: str) -> None:
    """No symbol of a size: AOTInductor writes out only what is a number."""
    program = _exported(_Step(sigma=3.0, reduction=reduction).to(device), False, device)
    (node,) = (node for node in program.graph.nodes if str(node.target) == OPERATOR)
    inputs = [argument.meta["val"] for argument in node.all_input_nodes]
    assert all(isinstance(value, Tensor) for value in inputs)


@pytest.mark.parametrize("reduction", ["none", "mean", "batchmean"])
def test_traced_again(reduction: str, backend: str, device: str) -> None:
    """torch.jit.trace of an exported graph."""
    module, operands = _Step(sigma=3.0, reduction=reduction).to(device), _operands(6, device)
    exported = torch.export.export(module, operands).module()
    traced = torch.jit.trace(exported, operands, check_trace=False)
    torch.testing.assert_close(traced(*operands), module(*operands))


@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="waits for a CUDA GPU: on a CPU it takes a minute of C++"
)
def test_aot_inductor(backend: str, device: str, tmp_path: Any) -> None:
    """Compiled ahead of time to a library, loaded from its package."""
    module = _Step(sigma=2.0).to(device)
    program = _exported(module, False, device)
    package = torch._inductor.aoti_compile_and_package(
        program, package_path=str(tmp_path / "step.pt2")
    )
    loaded = torch._inductor.aoti_load_package(package)
    operands = _operands(9, device)
    torch.testing.assert_close(loaded(*operands), module(*operands))
