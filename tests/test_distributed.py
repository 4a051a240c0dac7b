"""Two processes with gloo: DDP, FSDP2 and DTensor give what one process gives.

A process costs seconds, so two of them run all checks of a backend. The tensors are on the CPU,
with Triton's interpreter for the kernel, on machines with a GPU too: what is tested is the
communication around the loss.
"""

import copy
import faulthandler
import math
import os
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.testing import assert_close
from torch.utils._pytree import tree_map_only

from fused_smoothl1 import smooth_l1_loss
from tests import support
from tests.support import KINDS, Loss, call, coin, results, values

RANKS = 2
SECONDS = 120
pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="waits for PyTorch with gloo"
)

WEIGHTS, MASK = "float32 row and column weights, all gradients", "float32 element mask"
ddp = nn.parallel.DistributedDataParallel


def fsdp2(head: nn.Module) -> nn.Module:
    for module in [*head.children(), head]:
        fully_shard(module)
    return head


def data_parallel(wrap: Callable[..., nn.Module], positives: str, mesh: DeviceMesh) -> None:
    """Hold the gradients of the README's loss against those of one process with the whole batch."""
    head = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    features, target, positive = values(12, 8), values(12, 4), coin(12, 1, p=0.8)
    positive[6:] = coin(6, 1, p=0.3) if positives == "many" else False
    if positives == "one":  # fewer than ranks
        positive &= positive.cumsum(0) == 1
    batch = features, target.masked_fill(~positive, math.nan), positive
    whole, count = copy.deepcopy(head), positive.sum()
    smooth_l1_loss(whole(features), *batch[1:], reduction="sum", normalizer=count).backward()

    features, *others = (tensor.chunk(RANKS)[dist.get_rank()] for tensor in batch)
    model = wrap(head)
    support.from_readme("box_loss")(model(features), *others).backward()
    for found, expected in zip(head.parameters(), whole.parameters(), strict=True):
        assert isinstance(found.grad, DTensor if wrap is fsdp2 else Tensor)
        gradient = found.grad.full_tensor() if isinstance(found.grad, DTensor) else found.grad
        assert_close(gradient, expected.grad)


def dtensors(
    case: Callable[[], tuple[list[Any], dict[str, Any]]],
    dim: int | None,
    shards_weights: bool,
    mesh: DeviceMesh,
    function: Loss = smooth_l1_loss,
) -> None:
    """Hold loss and gradients of DTensors against those of the tensors that they are made of.

    The input is sharded on `dim`, or replicated. Weights and beta are sharded with it where they
    do not broadcast, or replicated: then their gradients sum up what every rank has.
    """
    operands, options = case()
    input, target, *_ = operands
    on_dim: Any = Replicate() if dim is None else Shard(dim % input.dim())

    def place(tensor: Tensor) -> Tensor:
        placement: Any = Replicate()
        if dim is not None and (shards_weights or tensor is input or tensor is target):
            own = on_dim.dim - input.dim() + tensor.dim()
            if own >= 0 and tensor.shape[own] == input.shape[dim]:
                placement = Shard(own)
        placed = distribute_tensor(tensor.detach(), mesh, [placement])
        return placed.requires_grad_(tensor.requires_grad)

    def whole(*operands: Any, **options: Any) -> Tensor:
        loss: Any = function(*operands, **options)
        if dim is None or options["reduction"] == "none":
            assert loss.placements == (on_dim,)
        elif options["reduction"] == "sum" and options.get("normalizer") is None:
            assert loss.placements == (Partial("sum"),)
        return loss.full_tensor()  # type: ignore[no-any-return]

    with support.backend_set("eager"), torch.compiler.set_stance("force_eager"):
        upstream = values(*function(*operands, **options).shape)
        expected = results(function, operands, upstream, **options)
    operands, options = tree_map_only(Tensor, place, (operands, options))
    found: list[Any] = results(whole, operands, upstream, **options)
    if len(input) > 1:  # One row could be broadcast: PyTorch replicates it.
        assert found[1].placements == (on_dim,)
    assert_close([found[0], *(gradient.full_tensor() for gradient in found[1:])], expected)


def counted(*operands: Any, **options: Any) -> Tensor:
    """Return a sum divided by the number of selected elements, which the ranks add up."""
    return smooth_l1_loss(*operands, **options | {"normalizer": operands[2].sum()})


def numbers_that_change(mesh: DeviceMesh) -> None:
    """Of which torch.compile makes tensors, that every rank has."""
    step = torch.compile(smooth_l1_loss, backend="aot_eager")
    for number in (0.5, 0.7, 0.9):
        case = partial(call, WEIGHTS, reduction="sum", sigma=number, normalizer=number + 1)
        dtensors(case, 0, False, mesh, step)


CHECKS: list[Callable[[DeviceMesh], None]] = [
    *(partial(data_parallel, ddp, positives) for positives in ("many", "none on one rank", "one")),
    partial(data_parallel, fsdp2, "many"),
    *(
        partial(dtensors, partial(call, name, reduction=reduction), dim, shards_weights)
        for name, dim, shards_weights, reduction in product(
            KINDS, (0, -1), (True, False), ("none", "sum", "mean")
        )
    ),
    *(  # in uneven shards, of which one may be empty
        partial(dtensors, partial(call, name, rows, reduction=reduction), 0, True)
        for name, rows, reduction in product((WEIGHTS, MASK), (7, 1), ("mean", "batchmean"))
    ),
    partial(dtensors, partial(call, WEIGHTS), None, False),
    partial(dtensors, partial(call, WEIGHTS, reduction="sum", normalizer=3.0), 0, True),
    partial(  # (The 1, which is replaced, says that the result is no plain sum.)
        dtensors, partial(call, MASK, reduction="sum", normalizer=1), 0, True, function=counted
    ),
    numbers_that_change,
]


def run_checks(rank: int, folder: str) -> None:
    """Run all checks, as one of the processes; tell how any failed."""
    torch.set_num_threads(1)
    faulthandler.enable()
    if os.environ["FUSED_SMOOTHL1_BACKEND"] == "triton":
        from tests.interpreter import make_strict

        make_strict()
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", store, timedelta(seconds=20), RANKS, rank)
    mesh, failures = init_device_mesh("cpu", (RANKS,)), 0
    for check in CHECKS:
        torch.manual_seed(0)  # All ranks draw the same values.
        try:
            check(mesh)
        except Exception:
            failures += 1
            print(f"{check} on rank {rank}:\n{traceback.format_exc()}", flush=True)
    # A process was once seen to abort as it ended: a thread of gloo's that asks for the interpreter
    # while that shuts down. There is nothing to clean up, so leave at once, as soon as the other
    # process is through with its checks too.
    Path(folder, f"through{rank}").touch()
    while len(list(Path(folder).glob("through*"))) < RANKS:
        time.sleep(0.01)
    os._exit(failures > 0)


@pytest.mark.parametrize("on", ["eager", pytest.param("triton", marks=support.needs_interpreter)])
def test_two_processes(on: str, tmp_path: Path) -> None:
    def run(rank: int) -> str:
        code = f"from tests import test_distributed as t; t.run_checks({rank}, '{tmp_path}')"
        options: Any = {"FUSED_SMOOTHL1_BACKEND": on, "TRITON_INTERPRET": "1"}
        return support.run_python("-c", code, timeout=SECONDS, **options)

    with ThreadPoolExecutor(RANKS) as threads:
        list(threads.map(run, range(RANKS)))
