"""One kernel launch forward, at most one backward, whatever the call; and the host reads nothing.

The launches counted are those of every Triton kernel there is, under the interpreter or compiled.
"""

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_smoothl1 import smooth_l1_loss
from tests import support
from tests.support import CALLS, REDUCTIONS, boxes, call, requiring_grad

pytestmark = support.on_kernel


def _counts(
    launches: list[str], operands: list[Any], upstream: float, **options: Any
) -> tuple[int, int]:
    """Return the number of launches of a call, and the most of either of two backward passes."""
    launches.clear()
    loss = smooth_l1_loss(*operands, **options)
    above, forward, backward = torch.full_like(loss, upstream), len(launches), 0
    for _ in range(2 if loss.requires_grad else 0):
        launches.clear()
        torch.autograd.grad(loss, requiring_grad(operands, options), above, retain_graph=True)
        backward = max(backward, len(launches))
    return forward, backward


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", CALLS)
def test_every_kind_of_call(
    name: str, reduction: str, launches: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the kernel needs of a normalizer, a mask or an upstream gradient, it loads itself."""
    operands, options = call(name, 300, reduction=reduction)

    def read(self: Tensor, *_: Any) -> Any:
        raise AssertionError("the host reads a tensor")

    for method in ("item", "tolist", "cpu", "__float__", "__int__", "__bool__", "__index__"):
        monkeypatch.setattr(Tensor, method, read)
    for upstream in (1.0, 2.0):
        forward, backward = _counts(launches, operands, upstream, **options)
        assert forward == 1
        assert backward <= 1


@pytest.mark.parametrize("needs", list(product([False, True], repeat=4)), ids=str)
@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_any_gradients(reduction: str, needs: tuple[bool, ...], launches: list[str]) -> None:
    operands = boxes(9, (9, 1), (4,), grad=needs)
    forward, backward = _counts(launches, operands, 1.0, reduction=reduction)
    assert forward == 1
    assert backward <= any(needs)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [(0,), (0, 4), (3, 0)], ids=str)
def test_empty(shape: tuple[int, ...], reduction: str, launches: list[str]) -> None:
    assert _counts(launches, boxes(shape), 1.0, reduction=reduction) == (0, 0)


def test_no_grad(launches: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Autograd, which costs host time, takes no part."""
    monkeypatch.setattr("fused_smoothl1.functional.apply", None)
    with torch.no_grad():
        assert not smooth_l1_loss(*boxes(9, (9, 4), (9, 4), grad=4)).requires_grad
    assert len(launches) == 1


def test_no_number_is_compiled_in() -> None:
    """One kernel serves every value: Triton passes what is a float64 by its type."""
    from fused_smoothl1.kernel import smooth_l1_kernel

    for name in ("beta", "inverse_beta", "inverse_divisor", "outside_number"):
        assert str(smooth_l1_kernel.fn.__annotations__[name]) == "fp64"
