"""One kernel launch forward, at most one backward, whatever the call.

The launches counted are those of every Triton kernel there is, under the interpreter or compiled.
"""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_smoothl1 import smooth_l1_loss
from tests.support import coin, gaussian

REDUCTIONS = ["none", "sum", "mean", "batchmean"]
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def _launches_of(
    launches: list[str], operands: list[Any], upstream: float = 1.0, **options: Any
) -> tuple[int, int]:
    """Return the number of launches of a call, and of its backward pass."""
    launches.clear()
    loss = smooth_l1_loss(*operands, **options)
    forward = len(launches)
    if not loss.requires_grad:
        return forward, 0
    above = torch.full_like(loss, upstream)
    launches.clear()
    sources = [t for t in operands if isinstance(t, Tensor) and t.requires_grad]
    torch.autograd.grad(loss, sources, above, retain_graph=True)
    backward = len(launches)
    launches.clear()
    torch.autograd.grad(loss, sources, above)
    assert len(launches) <= 1, f"the second backward launched {launches}"
    return forward, backward


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("upstream", [1.0, 2.0])
def test_one_forward_one_backward(
    upstream: float, reduction: str, dtype: torch.dtype, device: str, launches: list[str]
) -> None:
    for needed in itertools.product([False, True], repeat=2):
        operands = [
            gaussian(9, 5, seed=i, dtype=dtype, device=device, requires_grad=n)
            for i, n in enumerate(needed)
        ]
        for weights in (
            [],
            [coin(9, 1, seed=3, device=device), gaussian(5, seed=4, device=device)],
        ):
            counts = _launches_of(launches, [*operands, *weights], upstream, reduction=reduction)
            assert counts[0] == 1
            assert counts[1] <= 1


@pytest.mark.parametrize("needed", list(itertools.product([False, True], repeat=4)), ids=str)
@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_weights_that_require_a_gradient(
    reduction: str, needed: tuple[bool, ...], device: str, launches: list[str]
) -> None:
    shapes = [(9, 5), (9, 5), (9, 1), (5,)]
    operands = [
        gaussian(*shape, seed=i, device=device, requires_grad=n)
        for i, (shape, n) in enumerate(zip(shapes, needed, strict=True))
    ]
    forward, backward = _launches_of(launches, operands, reduction=reduction)
    assert forward == 1
    assert backward <= int(any(needed))


def test_several_programs_are_one_launch(device: str, launches: list[str]) -> None:
    operands = [gaussian(20_001, seed=i, device=device, requires_grad=i == 0) for i in range(4)]
    for reduction in REDUCTIONS:
        forward, backward = _launches_of(launches, operands, 2.0, reduction=reduction)
        assert forward == 1
        assert backward <= 1


def test_any_layout_is_one_launch(device: str, launches: list[str]) -> None:
    input = gaussian(2, 3, 4, 5, seed=1, device=device).to(memory_format=torch.channels_last)
    target = gaussian(5, 4, 3, 2, seed=2, device=device).permute(3, 2, 1, 0)
    inside = gaussian(2, 1, 4, 10, seed=3, device=device)[..., ::2]
    outside = gaussian(3, 1, 1, seed=4, device=device)
    operands = [input.requires_grad_(), target, inside, outside]
    for reduction in REDUCTIONS:
        forward, backward = _launches_of(launches, operands, 2.0, reduction=reduction)
        assert forward == 1
        assert backward <= 1


@pytest.mark.parametrize("normalizer", [3, torch.tensor(3), torch.tensor(3.0)], ids=repr)
def test_normalizer_needs_no_launch(
    normalizer: float | Tensor, device: str, launches: list[str]
) -> None:
    if isinstance(normalizer, Tensor):
        normalizer = normalizer.to(device)
    operands = [gaussian(9, 5, seed=i, device=device, requires_grad=i == 0) for i in range(2)]
    counts = _launches_of(launches, operands, reduction="sum", normalizer=normalizer)
    assert counts[0] == 1
    assert counts[1] <= 1


def test_no_grad_launches_once(
    device: str, launches: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And autograd, which costs host time, takes no part."""
    monkeypatch.setattr("fused_smoothl1.functional.apply", None)
    operands = [gaussian(9, 5, seed=i, device=device, requires_grad=True) for i in range(4)]
    with torch.no_grad():
        loss = smooth_l1_loss(*operands)
    assert not loss.requires_grad
    assert len(launches) == 1


def test_empty_launches_nothing(device: str, launches: list[str]) -> None:
    for shape in ((0,), (0, 4), (3, 0)):
        input = torch.empty(shape, device=device, requires_grad=True)
        for reduction in REDUCTIONS:
            assert _launches_of(launches, [input, input.detach()], reduction=reduction) == (0, 0)


def test_new_sigma_is_the_same_kernel(device: str, launches: list[str]) -> None:
    """Neither sigma nor beta is part of what is compiled: only one cache entry for all values."""
    from fused_smoothl1.kernel import smooth_l1_kernel

    input, target = gaussian(9, 5, seed=1, device=device), gaussian(9, 5, seed=2, device=device)
    smooth_l1_loss(input, target, sigma=2.0)
    parameters = {p.name: p for p in getattr(smooth_l1_kernel, "params", [])}
    for name in ("beta", "sigma"):
        assert name not in parameters or not parameters[name].is_constexpr
    caches = getattr(smooth_l1_kernel, "device_caches", {})
    before = sum(len(cache[0]) for cache in caches.values())
    for beta in (1 / 9, 0.0, 1.0, 16.0):
        smooth_l1_loss(input, target, beta=beta)
    assert sum(len(cache[0]) for cache in caches.values()) == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_the_host_reads_no_tensor(
    masked: bool,
    dtype: torch.dtype,
    device: str,
    triton_backend: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What the kernel needs of a normalizer, a mask or an upstream gradient, it loads itself."""
    input = gaussian(300, 4, seed=1, dtype=dtype, device=device, requires_grad=True)
    target = gaussian(300, 4, seed=2, device=device)
    rows = coin(300, 1, seed=3, device=device)
    weights = rows if masked else rows.float()
    normalizer, upstream = rows.sum(), torch.tensor(3.0, device=device)

    def read(self: Tensor, *_: Any) -> Any:
        raise AssertionError("the host reads a tensor")

    for name in ("item", "tolist", "cpu", "__float__", "__int__", "__bool__", "__index__"):
        monkeypatch.setattr(Tensor, name, read)
    loss = smooth_l1_loss(input, target, weights, reduction="sum", normalizer=normalizer)
    for _ in range(2):
        torch.autograd.grad(loss, input, upstream, retain_graph=True)
    with pytest.raises(AssertionError, match="reads"):
        float(normalizer)
