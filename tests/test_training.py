"""What a training loop puts around a loss: autocast, scaling, checkpoints, hooks, threads."""

import copy
import io
import pickle
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F  # noqa: N812 (the name PyTorch users know it by)
from torch.utils.checkpoint import checkpoint

from fused_smoothl1 import SmoothL1Loss, functional, smooth_l1_loss
from fused_smoothl1.functional import Reduction
from tests.support import check, coin, gaussian
from tests.variants import REDUCTIONS, VARIANTS, fresh, make, trained

MODULES = {
    "default": (SmoothL1Loss(), "SmoothL1Loss(beta=1.0, reduction='mean')"),
    "sigma": (SmoothL1Loss(sigma=3.0), "SmoothL1Loss(sigma=3.0, reduction='mean')"),
    "beta": (
        SmoothL1Loss(beta=0.0, reduction="batchmean"),
        "SmoothL1Loss(beta=0.0, reduction='batchmean')",
    ),
}


def _loss_and_gradients(operands: list[Any], **options: Any) -> list[Tensor]:
    loss = smooth_l1_loss(*operands, **options)
    gradients = torch.autograd.grad(loss, trained(operands), torch.full_like(loss, 1.5))
    return [loss.detach(), *gradients]


def _head(device: str) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).to(device)


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_autocast(reduction: Reduction, backend: str, device: str) -> None:
    """Activations in bfloat16 against float32 targets: the loss and the parameters are float32."""
    head, features = _head(device), gaussian(12, 8, seed=1, device=device)
    target, weights = gaussian(12, 4, seed=2, device=device), gaussian(12, 1, seed=3, device=device)
    with torch.autocast(device, torch.bfloat16):
        prediction = head(features)
        loss = smooth_l1_loss(prediction, target, weights, sigma=2.0, reduction=reduction)
    assert prediction.dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    loss.sum().backward()
    for parameter in head.parameters():
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_no_number(dtype: torch.dtype, backend: str, device: str) -> None:
    """The loss computes in float32 by itself; 16-bit operands alone give a float32 loss too."""
    operands, options = make("row_weights", dtype=dtype, device=device)
    expected = _loss_and_gradients(operands, **options)
    with torch.autocast(device, dtype):
        found = _loss_and_gradients(operands, **options)
    assert found[0].dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("how", ["plain", "compiled", "compiled with it", "vmap", "make_fx"])
def test_autocast_gives_each_element_in_float32(
    how: str, dtype: torch.dtype, backend: str, device: str
) -> None:
    """As PyTorch's own loss, and float64 in float64: what is small is not rounded to 0."""
    input = torch.full((3, 4), 1e-4, dtype=dtype, device=device, requires_grad=True)
    target = torch.zeros_like(input)

    def step(loss: Callable[..., Tensor], input: Tensor, target: Tensor) -> Tensor:
        with torch.autocast(device, torch.bfloat16):
            return loss(input, target, reduction="none")

    ours: Callable[..., Any] = partial(step, smooth_l1_loss)
    if how == "compiled":
        compiled = torch.compile(smooth_l1_loss, backend="aot_eager", fullgraph=True)
        ours = partial(step, compiled)
    elif how == "compiled with it":
        ours = torch.compile(ours, backend="aot_eager", fullgraph=True)
    elif how == "vmap":
        ours = torch.vmap(ours)
    elif how == "make_fx":
        ours = make_fx(ours)(input, target)
    found, expected = ours(input, target), step(F.smooth_l1_loss, input, target)
    assert found.dtype == expected.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(found, expected)
    assert found.count_nonzero() == 12
    above = torch.full_like(found, 1.5)
    for one, other in zip(
        torch.autograd.grad(found, input, above),
        torch.autograd.grad(expected, input, above),
        strict=True,
    ):
        assert one.dtype == other.dtype == dtype
        torch.testing.assert_close(one, other)
    outside = smooth_l1_loss(input, target, reduction="none")
    assert outside.dtype == dtype


def test_autocast_counts_for_its_own_device() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        found = {device: functional._is_autocast(device) for device in ("cpu", "cuda", "meta")}
    assert found == {"cpu": True, "cuda": False, "meta": False}


def test_grad_scaler(backend: str, device: str) -> None:
    """Scaled, unscaled and stepped, a float16 head learns; an overflow skips its step."""
    head = nn.Linear(8, 4).to(device)
    features, target = gaussian(64, 8, seed=1, device=device), gaussian(64, 4, seed=2).to(device)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.5)
    scaler = torch.amp.GradScaler(device, init_scale=65536.0, growth_interval=1000)

    def step(target: Tensor) -> float:
        optimizer.zero_grad()
        with torch.autocast(device, torch.float16):
            loss = smooth_l1_loss(head(features), target, sigma=2.0)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        return loss.item()

    losses = [step(target) for _ in range(20)]
    assert losses[-1] < 0.8 * losses[0]
    assert scaler.get_scale() == 65536.0
    before = [p.detach().clone() for p in head.parameters()]
    step(torch.full_like(target, float("nan")))
    assert scaler.get_scale() == 32768.0
    torch.testing.assert_close(list(head.parameters()), before, rtol=0, atol=0)


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing(
    use_reentrant: bool, reduction: Reduction, backend: str, device: str
) -> None:
    """The loss inside the part that is computed a second time."""
    head, features = _head(device), gaussian(12, 8, seed=1, device=device, requires_grad=True)
    target, mask = gaussian(12, 4, seed=2, device=device), coin(12, 1, seed=3, device=device)

    def step(features: Tensor) -> Tensor:
        return smooth_l1_loss(head(features), target, mask, sigma=2.0, reduction=reduction)

    def run(function: Callable[[], Tensor]) -> list[Tensor]:
        head.zero_grad()
        features.grad = None
        loss = function()
        loss.sum().backward()
        assert features.grad is not None
        return [loss.detach(), features.grad, *(p.grad for p in head.parameters())]

    expected = [tensor.clone() for tensor in run(lambda: step(features))]
    found = run(lambda: checkpoint(step, features, use_reentrant=use_reentrant))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("context", [torch.inference_mode, torch.no_grad])
def test_without_gradients(context: Any, variant: str, backend: str, device: str) -> None:
    for reduction in REDUCTIONS:
        operands, options = make(variant, device=device)
        expected = smooth_l1_loss(*operands, **options, reduction=reduction)
        with context():
            loss = smooth_l1_loss(*operands, **options, reduction=reduction)
        assert not loss.requires_grad
        assert loss.grad_fn is None
        torch.testing.assert_close(loss, expected.detach(), rtol=0, atol=0)


def test_operands_made_in_inference_mode(backend: str, device: str) -> None:
    with torch.inference_mode():
        input, target = gaussian(6, 4, seed=1, device=device), gaussian(6, 4, seed=2, device=device)
        inside = smooth_l1_loss(input, target)
        assert inside.is_inference()
    torch.testing.assert_close(smooth_l1_loss(input, target), inside.clone(), rtol=0, atol=0)


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("variant", ["row_weights", "trained_weights", "two_masks"])
def test_save_on_cpu(variant: str, reduction: str, backend: str, device: str) -> None:
    operands, options = make(variant, device=device)
    with torch.autograd.graph.save_on_cpu():
        check(*operands, **options, reduction=reduction, upstream=1.5)


def test_saved_tensor_hooks(backend: str, device: str) -> None:
    """What is saved for a second use of the operands goes through the hooks, and comes back."""
    operands, options = make("row_weights", device=device)
    files: list[bytes] = []

    def pack(tensor: Tensor) -> int:
        file = io.BytesIO()
        torch.save(tensor, file)
        files.append(file.getvalue())
        return len(files) - 1

    def unpack(index: int) -> Tensor:
        tensor: Tensor = torch.load(io.BytesIO(files[index]))
        return tensor

    expected = _loss_and_gradients(operands, **options, reduction="none")
    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        loss = smooth_l1_loss(*operands, **options, reduction="none")
    assert len(files) == 4, "input, target and both weights"
    found = torch.autograd.grad(loss, trained(operands), torch.full_like(loss, 1.5))
    torch.testing.assert_close([loss.detach(), *found], expected, rtol=0, atol=0)


def test_tensor_hooks_and_retained_gradients(backend: str, device: str) -> None:
    input = gaussian(6, 4, seed=1, device=device, requires_grad=True)
    prediction = input * 2
    prediction.retain_grad()
    prediction.register_hook(lambda gradient: gradient * 10)
    seen: list[Tensor] = []
    input.register_post_accumulate_grad_hook(lambda leaf: seen.append(leaf))
    loss = smooth_l1_loss(prediction, torch.zeros_like(input), beta=100.0, reduction="sum")
    loss.backward()
    torch.testing.assert_close(prediction.grad, prediction.detach() / 10)
    torch.testing.assert_close(input.grad, prediction.detach() / 5)
    assert len(seen) == 1


@pytest.mark.parametrize("name", MODULES)
def test_module_is_portable(name: str, backend: str, device: str) -> None:
    module, text = MODULES[name]
    assert repr(module) == text
    assert module.state_dict() == {}
    assert list(module.parameters()) == []
    input, target = gaussian(6, 4, seed=1, device=device), gaussian(6, 4, seed=2, device=device)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    twins = [
        copy.copy(module),
        copy.deepcopy(module),
        pickle.loads(pickle.dumps(module)),
        torch.load(file, weights_only=False),
        module.half().to(device).eval().train(),
    ]
    for twin in twins:
        assert repr(twin) == text
        assert torch.equal(twin(input, target), module(input, target))


def test_module_inside_of_a_model(backend: str, device: str) -> None:
    """As a child it adds no key to a checkpoint, and hooks and apply reach it."""
    model = nn.ModuleDict({"head": nn.Linear(4, 4), "loss": SmoothL1Loss(sigma=3.0)}).to(device)
    assert set(model.state_dict()) == {"head.weight", "head.bias"}
    called: list[nn.Module] = []
    model["loss"].register_forward_hook(lambda module, *_: called.append(module))
    input = gaussian(6, 4, seed=1, device=device)
    model["loss"](model["head"](input), input).backward()
    assert called == [model["loss"]]
    assert model["head"].weight.grad is not None
    assert "sigma=3.0" in repr(model)


def test_accumulated_gradients_and_learning(backend: str, device: str) -> None:
    """Four small batches are one large one, and its optimiser finds the boxes."""
    features, boxes = gaussian(32, 8, seed=1, device=device), gaussian(8, 4, seed=2, device=device)
    target, positive = features @ boxes, coin(32, 1, seed=3, p=0.7, device=device)
    target = target.masked_fill(~positive, float("nan"))
    count = positive.sum()
    whole, parts = nn.Linear(8, 4).to(device), nn.Linear(8, 4).to(device)
    parts.load_state_dict(whole.state_dict())

    def accumulate(model: nn.Module, size: int) -> float:
        total = 0.0
        for x, t, m in zip(
            features.split(size), target.split(size), positive.split(size), strict=True
        ):
            loss = smooth_l1_loss(model(x), t, m, sigma=1.0, reduction="sum", normalizer=count)
            loss.backward()
            total += loss.item()
        return total

    accumulate(whole, 32)
    accumulate(parts, 8)
    for one, other in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)
    optimizer = torch.optim.Adam(parts.parameters(), lr=0.1)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        losses.append(accumulate(parts, 16))
        optimizer.step()
    assert losses[-1] < 0.05 * losses[0]


def test_host_threads(eager_backend: str, device: str) -> None:
    """Calls of several threads at once, forward and backward, do not meet in anything shared.

    Triton's interpreter keeps the program that it runs in a global, so the kernel's own test with
    threads needs a GPU (test_streams_and_graphs.py).
    """
    cases = [make(variant, 50 + 40 * i, device=device) for i, variant in enumerate(VARIANTS)]
    expected = [_loss_and_gradients(operands, **options) for operands, options in cases]
    start = threading.Barrier(len(cases))
    failures: list[str] = []

    def work(index: int) -> None:
        operands, options = cases[index]
        operands = fresh(operands)
        start.wait()
        for _ in range(20):
            found = _loss_and_gradients(operands, **options)
            if not all(torch.equal(a, b) for a, b in zip(found, expected[index], strict=True)):
                failures.append(VARIANTS[index])

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(cases))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
        assert not thread.is_alive()
    assert failures == []
