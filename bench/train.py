"""`python -m bench train`: train a small region proposal network with this loss and without it.

The network looks for handwritten digits pasted on canvases. Anchors, targets and weights are made
as py-faster-rcnn makes them (`bench.rpn`), on smaller canvases with smaller anchors. It is trained
twice from the same seed on the same batches; only the box regression's formula differs. Recall is
measured on canvases whose digits were not used in training.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn
from torch.nn import functional

from bench import rpn, training_report
from bench.measure import measure, peak_extra_bytes
from bench.providers import FUSED, Formula, Operands, Options, classic, fused
from bench.report import describe
from bench.table import console
from bench.training_report import Training, View

RESULTS = Path(__file__).parent / "results"
FORMULAS: dict[str, Formula] = {"eager_classic": classic, FUSED: fused}
OPTIONS = Options(sigma=3.0, reduction="batchmean")  # those of py-faster-rcnn's RPN
LAYOUT = rpn.Layout(
    canvas=(160, 240),
    stride=8,
    feature_map=(20, 30),
    base_size=8,
    scales=(2.5, 4, 6),
    zoom=(3, 10),
    digits=5,
)
COORDINATES = 4
CHANNELS = 32
BATCH = 4  # canvases
LEARNING_RATE = 1e-2  # the highest of the schedule
SEED = 20_150_604
HELD_OUT_SCANS = 300  # of the 1797: no digit of these is in a training canvas
PROPOSALS = 10  # per canvas, of 5400 anchors
NMS_IOU = 0.5
CANDIDATES = 200  # best scores per canvas that are looked at
VIEWS = 4  # canvases in the picture
FOUND_IOU = 0.5
ALLOWED_GAP = 0.05  # of recall, between the two trainings
LOSS_SECONDS = 1.0  # for timing the loss alone


@dataclass(frozen=True)
class Scale:
    """How much to train: canvases, and steps of BATCH canvases."""

    canvases: int
    held_out: int
    steps: int


QUICK, FULL = Scale(300, 40, 500), Scale(1000, 200, 3000)


class Batch(NamedTuple):
    """Canvases (B, 1, H, W) in 0 to 1, and the RPN's targets and weights (B, 4A, h, w)."""

    canvases: Tensor
    targets: Tensor
    inside: Tensor
    outside: Tensor

    def at(self, index: Tensor) -> "Batch":
        """Return these canvases."""
        return Batch(*(tensor[index] for tensor in self))


class Rpn(nn.Module):
    """Four convolutions, then a score and four deltas per anchor, as in Faster R-CNN's RPN."""

    def __init__(self) -> None:
        super().__init__()
        anchors = LAYOUT.anchors_per_cell
        self.body = nn.Sequential(
            # The pixels of a cell become its channels: the cheapest way to the map's resolution.
            nn.PixelUnshuffle(LAYOUT.stride),
            _block(LAYOUT.stride**2, CHANNELS),
            _block(CHANNELS, CHANNELS),
            # Dilated, so that a cell of 8 pixels sees all of a digit of 72.
            _block(CHANNELS, CHANNELS, dilation=2),
            _block(CHANNELS, CHANNELS, dilation=2),
        )
        self.score = nn.Conv2d(CHANNELS, anchors, 1)
        self.deltas = nn.Conv2d(CHANNELS, COORDINATES * anchors, 1)
        for head in (self.score, self.deltas):
            nn.init.normal_(head.weight, std=0.01)  # as py-faster-rcnn does
            nn.init.zeros_(head.bias)  # type: ignore[arg-type]

    def forward(self, canvases: Tensor) -> tuple[Tensor, Tensor]:
        """Return scores (B, A, h, w), as logits, and deltas (B, 4A, h, w)."""
        features = self.body(canvases)
        return self.score(features), self.deltas(features)


@dataclass
class Run:
    """A training at work: box losses so far, and the seconds its steps took."""

    name: str
    formula: Formula
    network: Rpn
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0


def main(arguments: Sequence[str]) -> int:
    """Train twice and report; return 0, or 1 if the two did not learn equally well."""
    options = _parser().parse_args(arguments)
    scale = QUICK if options.quick else FULL
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # The layers are small: where cores are shared, threads that wait for each other took eighty
    # times as long for a step as one thread alone.
    torch.set_num_threads(1)
    out = console()
    scans = rpn.digit_scans()
    _, train = _scenes(scale.canvases, scans[:-HELD_OUT_SCANS], seed=SEED, device=device)
    held_out, test = _scenes(scale.held_out, scans[-HELD_OUT_SCANS:], seed=SEED + 1, device=device)

    columns = (
        TextColumn("{task.description:14}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("box loss {task.fields[loss]:.4f}"),
        TimeElapsedColumn(),
    )
    # Convolutions that add in another order at each run would hide what the loss does.
    with (
        torch.backends.cudnn.flags(deterministic=True, benchmark=False, allow_tf32=False),
        Progress(*columns, console=out, disable=not out.is_terminal) as bar,
    ):
        untrained = _recall(_network(device), held_out, test)
        task = bar.add_task("training both", total=scale.steps, loss=float("nan"))
        runs = _train_all(
            train, scale.steps, device, lambda loss: bar.update(task, advance=1, loss=loss)
        )
        trainings = _assess(runs, train, held_out, test, device)

    result = training_report.Result(
        machine=describe(device, copy_gbps=0.0),
        trainings=trainings,
        untrained_recall=untrained,
        objects=sum(len(scene.boxes) for scene in held_out),
        proposals=PROPOSALS,
    )
    training_report.print_result(out, result)
    training_report.write(result, options.out, quick=options.quick, out=out)
    recalls = [training.recall for training in trainings]
    return int(max(recalls) - min(recalls) > ALLOWED_GAP or min(recalls) <= untrained)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench train", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few steps, under 60 s on two cores")
    parser.add_argument(
        "--out", type=Path, default=RESULTS, metavar="DIR", help="where the JSON and the plot go"
    )
    return parser


def _block(channels_in: int, channels_out: int, dilation: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, 3, padding=dilation, dilation=dilation, bias=False),
        nn.BatchNorm2d(channels_out),
        nn.ReLU(),
    )


def _network(device: torch.device) -> Rpn:
    torch.manual_seed(SEED)
    return Rpn().to(device)


def _scenes(
    count: int, scans: rpn.Floats, *, seed: int, device: torch.device
) -> tuple[list[rpn.Scene], Batch]:
    """Paste digits of these scans, and make the canvases' targets."""
    rng = np.random.default_rng(seed)
    scenes = [rpn.paste_digits(rng, LAYOUT, scans) for _ in range(count)]
    made = [rpn.targets_of(scene.boxes, rng, LAYOUT) for scene in scenes]
    canvases = torch.from_numpy(np.stack([scene.canvas for scene in scenes])[:, None]).float() / 16
    batch = Batch(
        canvases,
        torch.cat([targets.targets for targets in made]),
        torch.cat([targets.inside_weights for targets in made]),
        torch.cat([targets.outside_weights for targets in made]),
    )
    return scenes, Batch(*(tensor.to(device) for tensor in batch))


def _box_loss(formula: Formula, deltas: Tensor, batch: Batch) -> Tensor:
    return formula(deltas, Operands(batch.targets, batch.inside, batch.outside, None), OPTIONS)


def _score_loss(scores: Tensor, batch: Batch) -> Tensor:
    """Return the cross-entropy of the sampled anchors: outside weights sample, inside label."""
    sampled, positive = batch.outside[:, ::COORDINATES], batch.inside[:, ::COORDINATES]
    entropy = functional.binary_cross_entropy_with_logits(
        scores, positive, weight=sampled, reduction="sum"
    )
    return entropy / len(scores)


def _train_all(
    train: Batch, steps: int, device: torch.device, on_step: Callable[[float], None]
) -> list[Run]:
    """Train a network with each formula, step by step in turn, so that noise hits all alike."""
    runs = [Run(name, formula, _network(device)) for name, formula in FORMULAS.items()]
    for run in runs:  # neither is to pay for what the first backward loads and compiles
        _gradients(_network(device), run.formula, train.at(torch.arange(BATCH, device=device)))
    loops = [_steps(run.network, run.formula, train, steps) for run in runs]
    for _ in range(steps):
        for run, loop in zip(runs, loops, strict=True):
            began = time.perf_counter()
            run.losses.append(next(loop))
            run.seconds += time.perf_counter() - began
        on_step(runs[-1].losses[-1])
    return runs


def _assess(
    runs: list[Run], train: Batch, held_out: list[rpn.Scene], test: Batch, device: torch.device
) -> list[Training]:
    """Measure the loss alone, the memory, and what the networks have learned."""
    batch = train.at(torch.arange(BATCH, device=device))
    deltas = runs[0].network(batch.canvases)[1].detach().requires_grad_()

    def loss_alone(run: Run) -> None:
        torch.autograd.grad(_box_loss(run.formula, deltas, batch), deltas)

    timings = measure({run.name: [partial(loss_alone, run)] for run in runs}, device, LOSS_SECONDS)
    return [
        Training(
            name=run.name,
            box_losses=run.losses,
            seconds=run.seconds,
            peak_bytes=peak_extra_bytes(
                partial(_gradients, run.network, run.formula, batch), device
            ),
            loss_ms=timings[run.name].median_ms,
            loss_peak_bytes=peak_extra_bytes(partial(loss_alone, run), device),
            recall=_recall(run.network, held_out, test),
            views=_views(run.network, held_out, test),
        )
        for run in runs
    ]


def _steps(network: Rpn, formula: Formula, train: Batch, steps: int) -> Iterator[float]:
    """Train the network in place; yield the box loss of each step when the step is done."""
    optimizer = torch.optim.Adam(network.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    order = torch.Generator().manual_seed(SEED)
    for _ in range(steps):
        network.train()
        index = torch.randint(len(train.canvases), (BATCH,), generator=order)
        optimizer.zero_grad()
        box_loss = _gradients(network, formula, train.at(index.to(train.canvases.device)))
        optimizer.step()
        schedule.step()
        yield float(box_loss)  # reading it waits for a GPU


def _gradients(network: Rpn, formula: Formula, batch: Batch) -> Tensor:
    """Do forward and backward; return the box loss."""
    scores, deltas = network(batch.canvases)
    box_loss = _box_loss(formula, deltas, batch)
    (_score_loss(scores, batch) + box_loss).backward()
    return box_loss.detach()


@torch.no_grad()
def _propose(network: Rpn, canvas: Tensor) -> tuple[rpn.Floats, rpn.Floats]:
    """Return the best boxes (n, 4) in pixels of a canvas (1, 1, H, W), and their scores (n,)."""
    network.eval()
    scores, deltas = (
        tensor.permute(0, 2, 3, 1).double().cpu().numpy() for tensor in network(canvas)
    )
    flat = 1 / (1 + np.exp(-scores.reshape(-1)))
    anchors = rpn.all_anchors(LAYOUT)
    # Anchors across the border took no part in training: their scores mean nothing.
    trained = rpn.trained_anchors(anchors, LAYOUT)
    best = trained[np.argsort(-flat[trained], kind="stable")[:CANDIDATES]]
    boxes = rpn.decode(anchors[best], deltas.reshape(-1, COORDINATES)[best])
    kept = _suppress(boxes)
    return boxes[kept], flat[best][kept]


def _suppress(boxes: rpn.Floats) -> list[int]:
    """Return which boxes, best first, remain after non-maximum suppression: PROPOSALS at most."""
    iou = rpn.overlaps(boxes, boxes)
    kept: list[int] = []
    for candidate in range(len(boxes)):
        if len(kept) < PROPOSALS and all(iou[candidate, kept] <= NMS_IOU):
            kept.append(candidate)
    return kept


def _recall(network: Rpn, scenes: list[rpn.Scene], batch: Batch) -> float:
    """Return the share of digits that one of their canvas's proposals meets with IoU 0.5."""
    found = [
        (rpn.overlaps(_propose(network, canvas[None])[0], scene.boxes) >= FOUND_IOU).any(axis=0)
        for scene, canvas in zip(scenes, batch.canvases, strict=True)
    ]
    return float(np.concatenate(found).mean())


def _views(network: Rpn, scenes: list[rpn.Scene], batch: Batch) -> list[View]:
    return [
        View(scene.canvas, scene.boxes, *_propose(network, canvas[None]))
        for scene, canvas in zip(scenes[:VIEWS], batch.canvases, strict=False)
    ]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
