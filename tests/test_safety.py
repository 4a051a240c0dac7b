"""The kernel reads nothing outside its operands into a result, and writes nothing outside outputs.

Every operand and every output lies inside a larger allocation filled with poison. An element read
from outside would make a result NaN or, masked out by luck, still differ from the same call on
plain tensors; an element written outside changes a guard. (Reads that reach no result are left to
compute-sanitizer on a GPU.)
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_smoothl1 import smooth_l1_loss
from tests.support import assert_same, coin, gaussian

# More than a tile of any type: what a wrong bound reaches lies inside the allocation.
GUARD = 8192
# Flat sizes around a wide access and around a tile, and several tiles with a tail.
SIZES = (1, 5, 1023, 1025, 3077)
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def _poison(dtype: torch.dtype) -> Any:
    """Return what no operand here holds and no computation here yields."""
    if dtype.is_floating_point:
        return torch.nan
    return True if dtype == torch.bool else torch.iinfo(dtype).max


def _around(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Return a tensor of the same shape, strides and values inside poison, and its allocation.

    Also what lies between the elements of a strided tensor is poison.
    """
    extent = 1 + sum(
        (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    allocation = torch.full(
        (GUARD + extent + GUARD,), _poison(tensor.dtype), dtype=tensor.dtype, device=tensor.device
    )
    inner = allocation.as_strided(tensor.shape, tensor.stride(), GUARD)
    # An expanded dimension is one place in memory.
    once = tuple(slice(1 if stride == 0 else None) for stride in tensor.stride())
    inner[once] = tensor[once]
    return inner, allocation


class Guards:
    """Every allocation that was handed out, and which of its elements belong to the tensor."""

    def __init__(self) -> None:
        self.pairs: list[tuple[Tensor, Tensor]] = []

    def guarded(self, tensor: Tensor) -> Tensor:
        """Return the tensor inside poison that `check` looks at."""
        inner, allocation = _around(tensor.detach())
        owned = torch.zeros_like(allocation, dtype=torch.bool)
        owned.as_strided(inner.shape, inner.stride(), GUARD).fill_(True)
        self.pairs.append((allocation, owned))
        return inner

    def check(self) -> None:
        """Assert that all poison is as it was laid out."""
        for allocation, owned in self.pairs:
            outside = allocation[~owned]
            poison = torch.full_like(outside, _poison(allocation.dtype))
            assert torch.equal(outside.nan_to_num(7.0), poison.nan_to_num(7.0))


@pytest.fixture
def guards(triton_backend: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Guards]:
    """Give guards, and lay every output of the launcher inside poison too."""
    from fused_smoothl1 import contract, launch

    guards = Guards()

    class GuardedTorch:
        """PyTorch for the package's modules, with guarded allocations."""

        def __getattr__(self, name: str) -> Any:
            original = getattr(torch, name)
            if name not in ("empty_like", "empty", "zeros"):
                return original
            return lambda *args, **kwargs: guards.guarded(original(*args, **kwargs))

    new_empty = Tensor.new_empty

    def guarded_new_empty(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return guards.guarded(new_empty(self, *args, **kwargs))

    monkeypatch.setattr(Tensor, "new_empty", guarded_new_empty)
    # A workspace that an earlier launch left behind would not be guarded.
    monkeypatch.setattr(launch, "_workspaces", {})
    for module in (contract, launch):
        monkeypatch.setattr(module, "torch", GuardedTorch())
    yield guards
    assert guards.pairs, "something was guarded"
    guards.check()


def _call(operands: list[Any], wanted: int, options: dict[str, Any]) -> list[Tensor]:
    """Return the loss and the gradients of the first operands, for an upstream of 3 and then 2."""
    sources = [operand.requires_grad_() for operand in operands[:wanted]]
    loss = smooth_l1_loss(*operands, sigma=1.5, **options)
    results = [loss.detach()]
    for upstream in (3.0, 2.0):
        above = torch.full_like(loss, upstream)
        results += torch.autograd.grad(loss, sources, above, retain_graph=True)
    return results


def _compare(guards: Guards, operands: list[Any], wanted: int = 1, **options: Any) -> None:
    """Assert the same bits with operands inside poison, none of it, and all of it still there."""
    inside = [guards.guarded(t) if isinstance(t, Tensor) else t for t in operands]
    results = _call(inside, wanted, options)
    plain = [t.detach().clone() if isinstance(t, Tensor) else t for t in operands]
    for one, other in zip(results, _call(plain, wanted, options), strict=True):
        assert other.isfinite().all()
        assert_same("inside poison", one, other)
    guards.check()


@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_sizes(dtype: torch.dtype, reduction: str, guards: Guards, device: str) -> None:
    for n in SIZES:
        operands = [gaussian(n, seed=i, dtype=dtype, device=device) for i in range(4)]
        _compare(guards, operands, reduction=reduction)


@pytest.mark.parametrize("dtype", FLOATS)
def test_all_gradients(dtype: torch.dtype, guards: Guards, device: str) -> None:
    operands = [gaussian(2051, seed=i, dtype=dtype, device=device) for i in range(4)]
    _compare(guards, operands, wanted=4)


@pytest.mark.parametrize("rows", [1, 257, 1025])
@pytest.mark.parametrize("width", [3, 4, 5])
def test_masks_of_rows_and_elements(rows: int, width: int, guards: Guards, device: str) -> None:
    boxes = [gaussian(rows, width, seed=i, device=device) for i in range(2)]
    row_mask = coin(rows, 1, seed=2, device=device)
    mask = coin(rows, width, seed=3, device=device)
    weights = gaussian(rows, 1, seed=4, device=device)
    _compare(guards, [*boxes, row_mask])
    _compare(guards, [*boxes, mask, weights])
    _compare(guards, [*boxes, weights, mask.to(torch.uint8)], reduction="none")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layouts(dtype: torch.dtype, guards: Guards, device: str) -> None:
    def maps(seed: int) -> Tensor:
        return gaussian(2, 3, 9, 31, seed=seed, dtype=dtype, device=device)

    def matrix(*shape: int, seed: int) -> Tensor:
        return gaussian(*shape, seed=seed, dtype=dtype, device=device)

    pixels, channels = coin(2, 1, 9, 31, seed=3, device=device), maps(4)[:1, :, :1, :1]
    last = torch.channels_last
    _compare(guards, [maps(1), maps(2), pixels, channels])
    _compare(guards, [maps(1).to(memory_format=last), maps(2), pixels, channels])
    _compare(guards, [maps(1).to(memory_format=last), maps(2).to(memory_format=last), channels])
    _compare(guards, [matrix(33, 65, seed=1), matrix(65, 33, seed=2).t()])
    _compare(guards, [matrix(33, 128, seed=1)[:, ::2], matrix(33, 68, seed=2)[:, :64]])
    _compare(guards, [matrix(1, 65, seed=1).expand(33, 65), matrix(33, 65, seed=2)])


def test_normalizer(guards: Guards, device: str) -> None:
    pair = [gaussian(2051, seed=i, device=device) for i in range(2)]
    normalizer = guards.guarded(torch.tensor(3.0, device=device))
    _compare(guards, pair, reduction="sum", normalizer=normalizer)
