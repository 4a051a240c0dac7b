"""Two processes with gloo: DDP, FSDP2 and DTensor give what one process gives.

A process costs seconds, so two of them run all checks of a backend, and each test looks up the
verdict of one. The tensors are on the CPU, with Triton's interpreter for the kernel, on machines
with a GPU too: what is tested is the communication around the loss.
"""

import faulthandler
import os
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.multiprocessing.spawn import spawn

from fused_smoothl1 import smooth_l1_loss
from fused_smoothl1.functional import Reduction
from tests.conftest import HAS_INTERPRETER, NO_INTERPRETER
from tests.support import backend_set, coin, gaussian
from tests.test_readme import BLOCKS

RANKS = 2
SECONDS = 120
NAN = float("nan")
pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="waits for PyTorch with gloo"
)


def _head() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))


def _batch() -> tuple[Tensor, Tensor, Tensor]:
    """Return features, boxes and positives: more of them in the first half, NaN elsewhere."""
    positive = coin(12, 1, seed=4, p=0.8)
    positive[6:] = coin(6, 1, seed=1, p=0.3)
    target = gaussian(12, 4, seed=3).masked_fill(~positive, NAN)
    return gaussian(12, 8, seed=4), target, positive


def _mine(rank: int, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(tensor.chunk(RANKS)[rank] for tensor in tensors)


def _global_count(positive: Tensor) -> Tensor:
    """Return the positives of all ranks, a tensor from beginning to end."""
    count = positive.sum().float()
    dist.all_reduce(count)
    return count.clamp(min=1)


def _expected_gradients(none_on_second: bool = False) -> dict[str, Tensor]:
    """Return the gradients of one process that has the whole batch."""
    head, (features, target, positive) = _head(), _batch()
    if none_on_second:
        positive[6:] = False
    count = positive.sum()
    loss = smooth_l1_loss(
        head(features), target, positive, sigma=2.0, reduction="sum", normalizer=count
    )
    loss.backward()
    return {name: p.grad for name, p in head.named_parameters() if p.grad is not None}


def _train_step(model: nn.Module, batch: tuple[Tensor, ...], sigma: float = 2.0) -> None:
    features, target, positive = batch
    # DDP and FSDP average over the ranks what is to be summed up.
    normalizer = _global_count(positive) / RANKS
    loss = smooth_l1_loss(
        model(features), target, positive, sigma=sigma, reduction="sum", normalizer=normalizer
    )
    loss.backward()


def _ddp(rank: int, mesh: Any) -> None:
    model = nn.parallel.DistributedDataParallel(_head())
    _train_step(model, _mine(rank, _batch()))
    for name, gradient in _expected_gradients().items():
        torch.testing.assert_close(model.module.get_parameter(name).grad, gradient)


def _ddp_with_the_readmes_loss(rank: int, mesh: Any) -> None:
    """With fewer positives than ranks, too: one."""
    (code,) = [block.code for block in BLOCKS if "def box_loss" in block.code]
    namespace: dict[str, Any] = {}
    exec(code, namespace)
    features, target, positive = _batch()
    positive = positive & (positive.cumsum(0) == 1)  # the first of them alone
    whole = _head()
    smooth_l1_loss(whole(features), target, positive, reduction="sum").backward()
    model = nn.parallel.DistributedDataParallel(_head())
    features, target, positive = _mine(rank, (features, target, positive))
    namespace["box_loss"](model(features), target, positive).backward()
    for name, parameter in whole.named_parameters():
        torch.testing.assert_close(model.module.get_parameter(name).grad, parameter.grad)


def _ddp_without_positives_on_one_rank(rank: int, mesh: Any) -> None:
    """The rank without any takes part in the step, with gradients of 0."""
    features, target, positive = _mine(rank, _batch())
    if rank == 1:
        positive = torch.zeros_like(positive)
    model = nn.parallel.DistributedDataParallel(_head())
    _train_step(model, (features, target, positive))
    for name, gradient in _expected_gradients(none_on_second=True).items():
        torch.testing.assert_close(model.module.get_parameter(name).grad, gradient)


def _fsdp2(rank: int, mesh: Any) -> None:
    from torch.distributed.fsdp import fully_shard

    head = _head()
    for layer in (head[0], head[2]):
        fully_shard(layer, mesh=mesh)
    fully_shard(head, mesh=mesh)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
    _train_step(head, _mine(rank, _batch()))
    for name, gradient in _expected_gradients().items():
        sharded = head.get_parameter(name).grad
        assert isinstance(sharded, DTensor)
        torch.testing.assert_close(sharded.full_tensor(), gradient)
    optimizer.step()


def _sharded(
    dim: int, reduction: Reduction, weights: str, rows: int = 6, **options: Any
) -> Callable[[int, Any], None]:
    """Return a check of DTensor operands that are sharded on one dimension."""

    def check(rank: int, mesh: Any) -> None:
        tensors = [gaussian(rows, 4, seed=1), gaussian(rows, 4, seed=2)]
        factor, mask = gaussian(rows, 1, seed=3), coin(rows, 4, seed=4)
        tensors[0][~mask] = NAN
        placement = [Shard(dim)]
        transitions: list[dict[str, Any]] = [{"sigma": 2.0}, {"sigma": 2.0}]
        input, target = (distribute_tensor(t, mesh, placement) for t in tensors)
        input.requires_grad_()
        if weights == "none":
            operands: list[Any] = [input, target, None, distribute_tensor(mask, mesh, placement)]
            plain: list[Any] = [*tensors, None, mask]
        else:
            split = weights == "sharded"
            of_rows = [Shard(0) if split and dim == 0 else Replicate()]
            beta = gaussian(rows, 1, seed=6).abs()
            transitions = [{"beta": distribute_tensor(beta, mesh, of_rows)}, {"beta": beta}]
            operands = [
                input,
                target,
                distribute_tensor(factor, mesh, of_rows),
                distribute_tensor(mask, mesh, placement if split else [Replicate()]),
            ]
            plain = [*tensors, factor, mask]
        if options.get("normalizer") == "tensor":
            chosen: dict[str, Any] = {"normalizer": operands[3].sum().clamp(min=1)}
            plain_chosen: dict[str, Any] = {"normalizer": mask.sum().clamp(min=1)}
        else:
            chosen = plain_chosen = dict(options)
        chosen, plain_chosen = {**chosen, **transitions[0]}, {**plain_chosen, **transitions[1]}
        loss = smooth_l1_loss(*operands, reduction=reduction, **chosen)

        with backend_set("eager"):
            plain[0] = plain[0].clone().requires_grad_()
            expected = smooth_l1_loss(*plain, reduction=reduction, **plain_chosen)
            upstream = gaussian(*expected.shape, seed=5)
            (gradient,) = torch.autograd.grad(expected, plain[0], upstream)
        assert isinstance(loss, DTensor)
        if reduction == "none":
            assert loss.placements == (Shard(dim),), loss.placements
        elif reduction == "sum" and "normalizer" not in chosen:
            assert loss.placements == (Partial("sum"),), loss.placements
        whole = loss.full_tensor()
        torch.testing.assert_close(whole, expected)
        whole.backward(upstream)
        assert isinstance(input.grad, DTensor)
        # PyTorch does not shard what has one row, which could be broadcast.
        assert rows == 1 or input.grad.placements == (Shard(dim),), input.grad.placements
        torch.testing.assert_close(input.grad.full_tensor(), gradient)

    return check


def _replicated(rank: int, mesh: Any) -> None:
    """Nothing is sharded: every rank has the whole loss."""
    input, target = (distribute_tensor(gaussian(6, 4, seed=s), mesh, [Replicate()]) for s in (1, 2))
    loss = smooth_l1_loss(input.requires_grad_(), target, sigma=2.0)
    assert isinstance(loss, DTensor)
    assert loss.placements == (Replicate(),)
    local = gaussian(6, 4, seed=1, requires_grad=True)
    expected = smooth_l1_loss(local, gaussian(6, 4, seed=2), sigma=2.0)
    torch.testing.assert_close(loss.to_local(), expected)
    loss.backward()
    expected.backward()
    assert isinstance(input.grad, DTensor)
    torch.testing.assert_close(input.grad.full_tensor(), local.grad)


def _trained(shape: tuple[int, ...], *names: str) -> Callable[[int, Any], None]:
    """Return a check of a replicated operand, whose gradient sums up what every rank has."""

    def check(rank: int, mesh: Any) -> None:
        whole = (gaussian(6, 4, seed=1), gaussian(6, 4, seed=2))
        for dim, reduction in ((0, "sum"), (1, "sum"), (0, "none")):
            input, target = (distribute_tensor(t, mesh, [Shard(dim)]) for t in whole)
            local = gaussian(*shape, seed=3).abs().requires_grad_()
            operand = distribute_tensor(local.detach(), mesh, [Replicate()]).requires_grad_()
            options: dict[str, Any] = {"reduction": reduction, **dict.fromkeys(names, operand)}
            loss = smooth_l1_loss(input, target, **options)
            expected = smooth_l1_loss(*whole, **{**options, **dict.fromkeys(names, local)})
            assert isinstance(loss, DTensor)
            upstream = gaussian(*expected.shape, seed=5)
            loss.full_tensor().backward(upstream)
            expected.backward(upstream)
            assert isinstance(operand.grad, DTensor)
            torch.testing.assert_close(operand.grad.full_tensor(), local.grad)

    return check


def _numbers_that_change(rank: int, mesh: Any) -> None:
    """Of which torch.compile makes tensors, that every rank has."""
    step = torch.compile(smooth_l1_loss, backend="aot_eager")
    for number in (0.5, 0.7, 0.9):
        whole = (gaussian(6, 4, seed=1, requires_grad=True), gaussian(6, 4, seed=2))
        input, target = (distribute_tensor(t.detach(), mesh, [Shard(0)]) for t in whole)
        options: dict[str, Any] = {"beta": number, "reduction": "sum", "normalizer": number + 1}
        loss = step(input.requires_grad_(), target, **options)
        assert isinstance(loss, DTensor)
        expected = smooth_l1_loss(*whole, **options)
        torch.testing.assert_close(loss.full_tensor(), expected)
        loss.full_tensor().backward()
        expected.backward()
        assert isinstance(input.grad, DTensor)
        torch.testing.assert_close(input.grad.full_tensor(), whole[0].grad)


TRAINED: list[tuple[tuple[str, ...], tuple[int, ...]]] = [
    *((("inside_weights", "outside_weights"), shape) for shape in ((1, 4), (4,))),
    *((("beta",), shape) for shape in ((), (6, 1), (1, 4))),
    (("sigma",), (6, 1)),
]
CHECKS: dict[str, Callable[[int, Any], None]] = {
    "ddp": _ddp,
    "ddp with the readme's loss": _ddp_with_the_readmes_loss,
    "ddp without positives on one rank": _ddp_without_positives_on_one_rank,
    "fsdp2": _fsdp2,
    **{
        f"dtensor on dim {dim}, {reduction}, {weights} weights": _sharded(dim, reduction, weights)
        for dim in (0, 1)
        for reduction in ("none", "sum", "mean", "batchmean")
        for weights in ("replicated", "sharded")
    },
    "dtensor with a mask alone": _sharded(0, "mean", "none"),
    "dtensor in uneven shards, mean": _sharded(0, "mean", "sharded", rows=7),
    "dtensor in uneven shards, batchmean": _sharded(0, "batchmean", "sharded", rows=7),
    "dtensor with an empty shard": _sharded(0, "mean", "sharded", rows=1),
    "dtensor with a number as normalizer": _sharded(0, "sum", "sharded", normalizer=3.0),
    "dtensor with a dtensor as normalizer": _sharded(0, "sum", "sharded", normalizer="tensor"),
    "dtensor replicated": _replicated,
    **{
        f"dtensor with trained {' and '.join(names)} of shape {shape}": _trained(shape, *names)
        for names, shape in TRAINED
    },
    "dtensor with numbers that change": _numbers_that_change,
}


def _verdict_file(folder: str | Path, rank: int) -> Path:
    return Path(folder) / f"verdicts{rank}"


def _process(rank: int, folder: str) -> None:
    """Run all checks; write the verdict of each: nothing, or how it failed."""
    torch.set_num_threads(1)
    faulthandler.enable()
    if os.environ["FUSED_SMOOTHL1_BACKEND"] == "triton":
        from tests.interpreter import make_strict

        make_strict()
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=RANKS,
        timeout=timedelta(seconds=20),
    )
    mesh = init_device_mesh("cpu", (RANKS,))
    verdicts: dict[str, str] = {}
    for name, check in CHECKS.items():
        try:
            check(rank, mesh)
            verdicts[name] = ""
        except Exception:
            verdicts[name] = f"on rank {rank}:\n{traceback.format_exc()}"
    torch.save(verdicts, _verdict_file(folder, rank))
    # A process was once seen to abort as it ended: a thread of gloo's that asks for the interpreter
    # while that shuts down. There is nothing to clean up, so leave at once, as soon as the other
    # process is through with its checks too.
    while not all(_verdict_file(folder, other).exists() for other in range(RANKS)):
        time.sleep(0.01)
    os._exit(0)


@pytest.fixture(scope="module", params=["eager", "triton"])
def verdicts(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, str]]:
    """What each process says of each check."""
    if request.param == "triton" and not HAS_INTERPRETER:
        pytest.skip(NO_INTERPRETER)
    folder = tmp_path_factory.mktemp("ranks")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FUSED_SMOOTHL1_BACKEND", request.param)
        patch.setenv("TRITON_INTERPRET", "1")
        patch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent.parent)]))
        context = spawn(_process, (str(folder),), nprocs=RANKS, join=False)
    assert context is not None
    deadline = time.monotonic() + SECONDS
    try:
        while not context.join(timeout=1):
            assert time.monotonic() < deadline, f"the processes hang for {SECONDS} seconds"
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
    return [torch.load(_verdict_file(folder, rank)) for rank in range(RANKS)]


@pytest.mark.parametrize("name", CHECKS)
def test_two_processes(name: str, verdicts: list[dict[str, str]]) -> None:
    failures = [verdict[name] for verdict in verdicts if verdict[name]]
    assert not failures, "\n".join(failures)
