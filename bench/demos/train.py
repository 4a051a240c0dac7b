"""`python -m bench train`: train a small region proposal network with this loss and without it.

The network looks for handwritten digits pasted on canvases. Anchors, targets and weights are made
as py-faster-rcnn makes them (`bench.rpn`), on smaller canvases with smaller anchors. It is trained
twice from the same seed on the same batches; only the box regression's formula differs. Recall is
measured on canvases whose digits were not used in training.
"""

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display is needed, nor looked for

import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional

from bench import rpn
from bench.demos import curves
from bench.report import RESULTS, console, describe, write_json
from bench.rivals import FUSED, Formula, composition
from fused_smoothl1 import smooth_l1_loss

FORMULAS: dict[str, Formula] = {"eager_composition": composition, FUSED: smooth_l1_loss}
OPTIONS: dict[str, Any] = {"sigma": 3.0, "reduction": "batchmean"}  # of py-faster-rcnn's RPN
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
DRAWN_SCORE = 0.5  # proposals below it are not drawn
PROPOSED, TRUE = "#21c45d", "#ff9f1c"
Batch = tuple[Tensor, ...]  # canvases (B, 1, H, W), the RPN's targets and weights (B, 4A, h, w)


class Rpn(nn.Module):
    """Four convolutions, then a score and four deltas per anchor, as in Faster R-CNN's RPN."""

    def __init__(self) -> None:
        super().__init__()
        anchors = len(rpn.RATIOS) * len(LAYOUT.scales)  # of a cell
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


def main(arguments: Sequence[str]) -> int:
    """Train twice and report; return 0, or 1 if the two did not learn equally well."""
    parser = argparse.ArgumentParser(prog="python -m bench train", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few steps, under 60 s on two cores")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR", help="for the results")
    options = parser.parse_args(arguments)
    canvases, held_out, steps = (300, 40, 500) if options.quick else (1000, 200, 3000)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # The layers are small: where cores are shared, threads that wait for each other took eighty
    # times as long for a step as one thread alone.
    torch.set_num_threads(1)
    scans = rpn.digit_scans()
    _, train = _scenes(canvases, scans[:-HELD_OUT_SCANS], SEED, device)
    scenes, test = _scenes(held_out, scans[-HELD_OUT_SCANS:], SEED + 1, device)
    trainings: list[dict[str, Any]] = []
    losses: dict[str, list[float]] = {}
    # Convolutions that add in another order at each run would hide what the loss does.
    with torch.backends.cudnn.flags(deterministic=True, benchmark=False, allow_tf32=False):
        untrained = _recall(_network(device), scenes, test)
        for name in FORMULAS:
            network = _network(device)
            losses[name] = _train(network, name, train, steps)
            recall = _recall(network, scenes, test)
            trainings.append({"formula": name, "recall": recall, "last_loss": losses[name][-1]})
        views = [_propose(network, canvas[None]) for canvas in test[0][:VIEWS]]

    # The loss alone, forward and backward, on what a network has learned.
    batch = tuple(tensor[:BATCH] for tensor in test)
    deltas = network(batch[0])[1].detach().requires_grad_()
    curves.add_costs(trainings, FORMULAS, deltas, batch[1:], OPTIONS)
    machine = describe(device)
    plain = {
        **asdict(machine),
        "digits": sum(len(scene.boxes) for scene in scenes),
        "untrained_recall": untrained,
        "trainings": trainings,
        **curves.compared(losses),
    }
    path = options.out / f"train{'-quick' if options.quick else ''}.json"
    write_json(path, plain)
    _draw(plain, scenes, views, path.with_suffix(".png"))
    print(machine)
    for training in trainings:
        print(
            f"{training['formula']:17} recall {training['recall']:.3f}, last box loss"
            f" {training['last_loss']:.4g}; the loss alone {training['loss_ms']:.3f} ms"
        )
    print(
        f"Recall: the share of {plain['digits']} held-out digits that one of the best {PROPOSALS}"
        f" proposals of their canvas\nmeets with IoU {FOUND_IOU}; {untrained:.3f} before training."
        f" The loss curves differ by {plain['largest_difference']:.2g} at most.\n"
        f"Wrote {path} and a picture."
    )
    recalls = [training["recall"] for training in trainings]
    return int(max(recalls) - min(recalls) > ALLOWED_GAP or min(recalls) <= untrained)


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
    count: int, scans: rpn.Floats, seed: int, device: torch.device
) -> tuple[list[rpn.Scene], Batch]:
    """Paste digits of these scans, and make the canvases' targets."""
    rng = np.random.default_rng(seed)
    scenes = [rpn.paste_digits(rng, LAYOUT, scans) for _ in range(count)]
    canvases = torch.from_numpy(np.stack([scene.canvas for scene in scenes])[:, None]).float() / 16
    made = [rpn.targets_of(scene.boxes, rng, LAYOUT) for scene in scenes]
    batch = (canvases, *(torch.cat(tensors) for tensors in zip(*made, strict=True)))
    return scenes, tuple(tensor.to(device) for tensor in batch)


def _train(network: Rpn, name: str, train: Batch, steps: int) -> list[float]:
    """Train the network in place with a formula; return the box loss of each step."""
    optimizer = torch.optim.Adam(network.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    order = torch.Generator().manual_seed(SEED)
    losses, out = [], console()
    network.train()
    for _ in track(range(steps), name, console=out, disable=not out.is_terminal):
        index = torch.randint(len(train[0]), (BATCH,), generator=order).to(train[0].device)
        canvases, targets, inside, outside = (tensor[index] for tensor in train)
        scores, deltas = network(canvases)
        box_loss = FORMULAS[name](deltas, targets, inside, outside, **OPTIONS)
        # The inside weights say which anchors are positive, the outside weights which are sampled.
        positive, sampled = inside[:, ::COORDINATES], outside[:, ::COORDINATES]
        entropy = functional.binary_cross_entropy_with_logits(
            scores, positive, weight=sampled, reduction="sum"
        )
        optimizer.zero_grad()
        (entropy / len(scores) + box_loss).backward()
        optimizer.step()
        schedule.step()
        losses.append(box_loss.item())  # reading it waits for a GPU
    return losses


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
    # Non-maximum suppression: a box goes where a better one lies.
    iou = rpn.overlaps(boxes, boxes)
    kept: list[int] = []
    for candidate in range(len(boxes)):
        if len(kept) < PROPOSALS and all(iou[candidate, kept] <= NMS_IOU):
            kept.append(candidate)
    return boxes[kept], flat[best][kept]


def _recall(network: Rpn, scenes: list[rpn.Scene], batch: Batch) -> float:
    """Return the share of digits that one of their canvas's proposals meets with IoU 0.5."""
    found = [
        (rpn.overlaps(_propose(network, canvas[None])[0], scene.boxes) >= FOUND_IOU).any(axis=0)
        for scene, canvas in zip(scenes, batch[0], strict=True)
    ]
    return float(np.concatenate(found).mean())


def _draw(plain: dict[str, Any], scenes: list[rpn.Scene], views: list[Any], path: Path) -> None:
    """Draw the curves and their distance on the left, canvases with proposals on the right."""
    figure = plt.figure(figsize=(13, 6), layout="constrained")
    panels: Any = figure.subfigures(1, 2, width_ratios=(1, 1.35))
    labels = {
        training["formula"]: f"{training['formula']}: recall {training['recall']:.3f}"
        for training in plain["trainings"]
    }
    pair = panels[0].subplots(2, 1, sharex=True, height_ratios=(2, 1))
    curves.draw(pair, plain, "box loss", labels)
    for axes, scene, (boxes, scores) in zip(
        panels[1].subplots(2, 2).flat, scenes[:VIEWS], views, strict=True
    ):
        axes.imshow(scene.canvas, cmap="gray")
        axes.set_axis_off()
        _draw_boxes(axes, scene.boxes, color=TRUE, linestyle=":", linewidth=2)
        _draw_boxes(axes, boxes[scores > DRAWN_SCORE], color=PROPOSED, linewidth=1.5)
    panels[1].suptitle(f"held-out canvases, trained with {FUSED}", fontsize=10)
    handles = [
        Rectangle((0, 0), 1, 1, fill=False, color=PROPOSED, label="proposed, score above 0.5"),
        Rectangle((0, 0), 1, 1, fill=False, color=TRUE, linestyle=":", label="true"),
    ]
    panels[1].legend(handles=handles, loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_boxes(axes: Axes, boxes: rpn.Floats, **look: Any) -> None:
    for x1, y1, x2, y2 in boxes:
        # Corners are whole pixels, both inside the box, and imshow centres a pixel on its number.
        left_top, size = (x1 - 0.5, y1 - 0.5), (x2 - x1 + 1, y2 - y1 + 1)
        axes.add_patch(Rectangle(left_top, *size, fill=False, **look))
