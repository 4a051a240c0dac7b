"""What a training loop puts around a loss: autocast, scaling, checkpoints, hooks, threads."""

import copy
import math
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F  # noqa: N812 (the name PyTorch users know it by)
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from fused_smoothl1 import SmoothL1Loss, functional, smooth_l1_loss
from tests import support
from tests.support import (
    CALLS,
    DEVICE,
    KINDS,
    Loss,
    assert_equal,
    boxes,
    call,
    requiring_grad,
    results,
    values,
)

pytestmark = support.on_both

NAMES = [*KINDS, *(name for name in CALLS if "16 " in name or "elementwise" in name)]
AUTOCAST = torch.autocast(DEVICE, torch.bfloat16)


def _within(context: Any, loss: Loss, *operands: Tensor) -> Tensor:
    with context:
        return loss(*operands)


SURROUNDINGS: dict[str, Callable[..., Tensor]] = {
    "autocast": partial(_within, AUTOCAST),
    "saved on the CPU": partial(_within, torch.autograd.graph.save_on_cpu()),
    "checkpoint": partial(checkpoint, use_reentrant=False),
    "reentrant checkpoint": partial(checkpoint, use_reentrant=True),
    "no_grad": partial(_within, torch.no_grad()),
    "inference_mode": partial(_within, torch.inference_mode()),
}


@pytest.mark.parametrize("surroundings", SURROUNDINGS)
@pytest.mark.parametrize("name", NAMES)
def test_what_changes_no_number(name: str, surroundings: str) -> None:
    """Reduced losses of 16 bits, for one, are float32 under autocast and without it."""
    operands, options = call(name)
    wanted = (
        [] if surroundings in ("no_grad", "inference_mode") else requiring_grad(operands, options)
    )
    expected = results(smooth_l1_loss, operands, **options)
    loss = SURROUNDINGS[surroundings](partial(smooth_l1_loss, **options), *operands)
    assert loss.requires_grad == bool(wanted)
    if wanted:
        loss.backward(torch.ones_like(loss))
    found = [loss.detach(), *(tensor.grad for tensor in wanted)]
    assert_equal(found, expected[: len(found)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("how", ["plain", "compiled", "compiled with it", "vmap", "make_fx"])
def test_autocast_gives_each_element_in_float32(how: str, dtype: torch.dtype) -> None:
    """As PyTorch's own loss, and float64 in float64: what is small is not rounded to 0."""
    input = torch.full((3, 4), 1e-4, dtype=dtype, device=DEVICE, requires_grad=True)
    operands = [input, torch.zeros_like(input)]
    compiled = partial(torch.compile, backend="aot_eager", fullgraph=True)
    loss: Loss = partial(smooth_l1_loss, reduction="none")
    ours: Loss = partial(_within, AUTOCAST, compiled(loss) if how == "compiled" else loss)
    if how == "compiled with it":
        ours = compiled(ours)
    elif how == "vmap":
        ours = torch.vmap(ours)
    elif how == "make_fx":
        ours = make_fx(ours)(*operands)
    found = results(ours, operands, 1.5)
    theirs = partial(F.smooth_l1_loss, reduction="none")
    assert_close(found, results(partial(_within, AUTOCAST, theirs), operands, 1.5))
    assert found[0].count_nonzero() == 12
    assert loss(*operands).dtype == dtype


def test_autocast_counts_for_its_own_device() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        found = {device: functional._is_autocast(device) for device in ("cpu", "cuda", "meta")}
    assert found == {"cpu": True, "cuda": False, "meta": False}


def test_grad_scaler() -> None:
    """Scaled, unscaled and stepped, a float16 head learns; an overflow skips its step."""
    head, features, target = nn.Linear(8, 4).to(DEVICE), values(64, 8), values(64, 4)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.5)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=65536.0)
    losses = []
    for step in range(12):
        before = head.weight.detach().clone()
        optimizer.zero_grad()
        with torch.autocast(DEVICE, torch.float16):
            losses.append(smooth_l1_loss(head(features), target, sigma=2.0))
        scaler.scale(losses[-1] * (math.inf if step == 11 else 1)).backward()
        scaler.step(optimizer)
        scaler.update()
        assert head.weight.equal(before) == (step == 11)
    assert losses[-1] < 0.8 * losses[0]
    assert scaler.get_scale() == 32768.0


def test_operands_made_in_inference_mode() -> None:
    with torch.inference_mode():
        operands = boxes(6, (6, 1), grad=0)
        inside = smooth_l1_loss(*operands)
        assert inside.is_inference()
    assert_equal(smooth_l1_loss(*operands), inside.clone())


MODULES: dict[str, dict[str, Any]] = {
    "beta=1.0, reduction='mean'": {},
    "sigma=3.0, reduction='mean'": {"sigma": 3.0},
    "beta=0.0, reduction='batchmean'": {"beta": 0.0, "reduction": "batchmean"},
}


@pytest.mark.parametrize("text", MODULES)
def test_module(text: str) -> None:
    """It can be copied, saved and moved, adds nothing to a model's state, and knows hooks."""
    module, operands = SmoothL1Loss(**MODULES[text]), boxes(6)
    twins = [copy.copy(module), copy.deepcopy(module), pickle.loads(pickle.dumps(module))]
    for twin in (*twins, module.half().to(DEVICE).eval()):
        assert repr(twin) == f"SmoothL1Loss({text})"
        assert not twin.state_dict()
        assert not list(twin.parameters())
        assert_equal(twin(*operands), smooth_l1_loss(*operands, **MODULES[text]))
    module.register_forward_hook(lambda module, operands, loss: 2 * loss)
    assert_equal(module(*operands), 2 * smooth_l1_loss(*operands, **MODULES[text]))


@support.on_eager
def test_host_threads() -> None:
    """Calls of several threads at once, forward and backward, do not meet in anything shared.

    Triton's interpreter keeps the program that it runs in a global, so the kernel's own test with
    threads needs a GPU (test_streams_and_graphs.py).
    """
    cases = [call(name, 50 + 40 * i) for i, name in enumerate(KINDS)]
    start = threading.Barrier(len(cases), timeout=60)

    def work(case: tuple[list[Any], dict[str, Any]]) -> list[list[Tensor]]:
        operands, options = case
        start.wait()
        return [results(smooth_l1_loss, operands, **options) for _ in range(20)]

    with ThreadPoolExecutor(len(cases)) as pool:
        for case, found in zip(cases, pool.map(work, cases), strict=True):
            assert_equal(found, 20 * [results(smooth_l1_loss, case[0], **case[1])])
