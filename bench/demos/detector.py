"""`python -m bench torchvision`: Faster R-CNN of torchvision with its losses by index, and by mask.

torchvision's region proposal network and box head pick the positives by index, and the host waits
for the GPU each time to learn how many there are. With masks nothing is picked. The same detector
takes the same steps both ways, on digits pasted on canvases (`bench.rpn`); reported are the losses,
how often the host waits in a step, and the time of a step.
"""

import argparse
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import MethodType
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from bench import rpn
from bench.measure import measure, peak_extra_bytes
from bench.report import RESULTS, describe, file_stem, write_json
from fused_smoothl1 import smooth_l1_loss

BETA = 1 / 9  # torchvision's
COORDINATES = 4
CLASSES = 2  # background and digit
IMAGES = 2  # in a step
SECONDS = 10.0  # of timing
TOLERANCE = 1e-5  # relative; the losses are sums of up to a few thousand float32 terms
SEED = 20_150_604


def rpn_losses(
    network: Any,
    objectness: Tensor,
    pred_bbox_deltas: Tensor,
    labels: list[Tensor],
    regression_targets: list[Tensor],
) -> tuple[Tensor, Tensor]:
    """Return the objectness and the box loss: `RegionProposalNetwork.compute_loss`, with masks.

    objectness (N, 1) and pred_bbox_deltas (N, 4) are of all anchors of all images; the lists hold
    an image's labels (n,) and targets (n, 4). The network's sampler marks anchors in uint8.
    """
    positive, negative = (torch.cat(marks) for marks in network.fg_bg_sampler(labels))
    sampled = positive | negative
    count = sampled.sum()
    box_loss = smooth_l1_loss(
        pred_bbox_deltas,
        torch.cat(regression_targets),
        positive[:, None],
        beta=BETA,
        reduction="sum",
        normalizer=count,
    )
    entropy = functional.binary_cross_entropy_with_logits(
        objectness.flatten(),
        torch.cat(labels),
        weight=sampled.to(objectness.dtype),
        reduction="sum",
    )
    return entropy / count, box_loss


def box_head_losses(
    class_logits: Tensor,
    box_regression: Tensor,
    labels: list[Tensor],
    regression_targets: list[Tensor],
) -> tuple[Tensor, Tensor]:
    """Return the class and the box loss: `roi_heads.fastrcnn_loss`, with a mask.

    class_logits (N, C) and box_regression (N, 4C) are of all regions of all images; the lists hold
    an image's labels (n,), 0 for background, and targets (n, 4).
    """
    label = torch.cat(labels)
    boxes = box_regression.view(len(label), -1, COORDINATES)
    chosen = boxes[torch.arange(len(label), device=label.device), label]
    box_loss = smooth_l1_loss(
        chosen,
        torch.cat(regression_targets),
        (label > 0)[:, None],
        beta=BETA,
        reduction="sum",
        normalizer=max(label.numel(), 1),
    )
    return functional.cross_entropy(class_logits, label), box_loss


@contextmanager
def by_mask(detector: nn.Module) -> Iterator[None]:
    """Let a detector of torchvision use these losses."""
    from torchvision.models.detection import roi_heads

    network: Any = detector.rpn
    with (
        mock.patch.object(network, "compute_loss", MethodType(rpn_losses, network)),
        mock.patch.object(roi_heads, "fastrcnn_loss", box_head_losses),
    ):
        yield


class Outcome(NamedTuple):
    """One way to compute the losses: their values, and what a step costs."""

    losses: dict[str, float]
    host_waits: int
    median_ms: float
    p20_ms: float
    p80_ms: float
    peak_extra_bytes: int | None


def main(arguments: Sequence[str]) -> int:
    """Compare and report; return 1 if the losses differ or the host waits as often as before."""
    parser = argparse.ArgumentParser(prog="python -m bench torchvision", description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR", help="for the JSON")
    options = parser.parse_args(arguments)
    try:
        import torchvision
    except ImportError as error:
        sys.exit(f"bench: this needs torchvision (pip install torchvision): {error}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    machine = describe(device)
    print(f"{machine}\ntorchvision {torchvision.__version__}: measuring ...")
    outcomes = compare(device, SECONDS)
    by_index, masked = outcomes.values()
    for name, outcome in outcomes.items():
        losses = ", ".join(f"{loss} {value:.6f}" for loss, value in outcome.losses.items())
        step = f"{outcome.median_ms:.2f} ms ({outcome.p20_ms:.2f} to {outcome.p80_ms:.2f})"
        print(f"{name}: {losses}\n  {outcome.host_waits} host waits, {step} a step")
    difference = gap(by_index, masked)
    print(f"Largest relative difference of a loss: {difference:.2g}.")
    rows = [{"name": name, **outcome._asdict()} for name, outcome in outcomes.items()]
    found = {"torchvision": torchvision.__version__, "largest_difference": difference, "rows": rows}
    path = options.out / f"torchvision-{file_stem(device)}.json"
    write_json(path, asdict(machine) | found)
    print(f"Wrote {path}.")
    return int(difference > TOLERANCE or masked.host_waits >= by_index.host_waits)


def compare(device: torch.device, seconds: float) -> dict[str, Outcome]:
    """Take the same steps by index and by mask, in turn."""
    from torchvision.models import detection

    torch.manual_seed(SEED)
    # The published one with random weights, or on a CPU the smallest.
    small = detection.fasterrcnn_mobilenet_v3_large_320_fpn
    build = detection.fasterrcnn_resnet50_fpn if device.type == "cuda" else small
    detector: nn.Module = build(weights=None, weights_backbone=None, num_classes=CLASSES)
    detector.to(device).train()
    rng = np.random.default_rng(SEED)
    scenes = [rpn.paste_digits(rng) for _ in range(IMAGES)]
    canvases = [torch.from_numpy(scene.canvas).to(device).float() / 16 for scene in scenes]
    images = [canvas.expand(3, -1, -1).contiguous() for canvas in canvases]
    boxes = [torch.from_numpy(scene.boxes).float().to(device) for scene in scenes]
    ones = torch.ones(rpn.PUBLISHED.digits, dtype=torch.int64, device=device)
    targets = [{"boxes": of_scene, "labels": ones} for of_scene in boxes]

    def by_index_step() -> dict[str, float]:
        """Do forward and backward with the same sampled anchors each time; return the losses."""
        torch.manual_seed(SEED)
        detector.zero_grad(set_to_none=True)
        losses: dict[str, Tensor] = detector(images, targets)
        torch.stack(list(losses.values())).sum().backward()
        values = torch.stack(list(losses.values())).tolist()  # one wait, the same for both
        return dict(zip(losses, values, strict=True))

    def masked_step() -> dict[str, float]:
        with by_mask(detector):
            return by_index_step()

    steps = {"by index": by_index_step, "by mask": masked_step}
    # Before anything is timed: the first steps of all load and compile what they need.
    found = {name: (step(), host_waits(step, device)) for name, step in steps.items()}
    timings = measure({name: [step] for name, step in steps.items()}, device, seconds)
    return {
        name: Outcome(*found[name], *timings[name], peak_extra_bytes(step, device))
        for name, step in steps.items()
    }


def gap(one: Outcome, other: Outcome) -> float:
    """Return the largest relative difference of a loss."""
    return max(abs(value - other.losses[name]) / abs(value) for name, value in one.losses.items())


def host_waits(step: Callable[[], object], device: torch.device) -> int:
    """Return how often the host waits in a step.

    PyTorch tells where there is CUDA. Elsewhere those operations count whose result's size or value
    the host needs before it can go on: they would wait if there were something to wait for.
    """
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)
    waits = _Waits()
    with waits:
        step()
    return waits.count


class _Waits(TorchDispatchMode):
    """Counts the operations that need to know what a tensor holds."""

    NEEDING = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        needs = any(tag in func.tags for tag in self.NEEDING)
        if func is torch.ops.aten.index.Tensor:  # It needs to only where an index is a mask.
            masks = (torch.bool, torch.uint8)
            needs = any(index is not None and index.dtype in masks for index in args[1])
        self.count += needs
        return func(*args, **(kwargs or {}))
