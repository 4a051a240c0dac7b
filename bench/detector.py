"""`python -m bench torchvision`: Faster R-CNN of torchvision with its losses by index, and by mask.

torchvision's region proposal network and box head pick the positives by index, and the host waits
for the GPU each time to learn how many there are. With masks nothing is picked. The same detector
takes the same steps both ways, on digits pasted on canvases (`bench.rpn`); reported are the losses,
how often the host waits in a step, and the time of a step.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from bench import rpn
from bench.mask_losses import by_mask
from bench.measure import measure, peak_extra_bytes
from bench.report import Report, describe, file_stem
from bench.table import console
from bench.waits import host_waits

RESULTS = Path(__file__).parent / "results"
CLASSES = 2  # background and digit
IMAGES = 2  # in a step
SECONDS = 10.0  # of timing
TOLERANCE = 1e-5  # relative; the losses are sums of up to a few thousand float32 terms
SEED = 20_150_604

Losses = dict[str, float]


@dataclass(frozen=True)
class Outcome:
    """One way to compute the losses: their values, and what a step costs."""

    name: str
    losses: Losses
    host_waits: int
    median_ms: float
    p20_ms: float
    p80_ms: float
    peak_extra_bytes: int | None


def main(arguments: Sequence[str]) -> int:
    """Compare and report; return 1 if the losses differ or the host waits as often as before."""
    parser = argparse.ArgumentParser(prog="python -m bench torchvision", description=__doc__)
    parser.add_argument(
        "--out", type=Path, default=RESULTS, metavar="DIR", help="where the JSON goes"
    )
    options = parser.parse_args(arguments)
    try:
        import torchvision
    except ImportError as error:
        sys.exit(f"bench: this needs torchvision (pip install torchvision): {error}")
    out = console()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    report = describe(device, copy_gbps=0.0)
    out.print(f"torchvision {torchvision.__version__}: measuring ...", highlight=False)
    outcomes = compare(device, SECONDS)
    _print(out, report, outcomes)
    _write(options.out, report, device, torchvision.__version__, outcomes, out)
    by_index, masked = outcomes
    return int(gap(outcomes) > TOLERANCE or masked.host_waits >= by_index.host_waits)


def compare(device: torch.device, seconds: float) -> list[Outcome]:
    """Take the same steps by index and by mask, in turn."""
    torch.manual_seed(SEED)
    detector = _detector(device).train()
    images, targets = _images(device)

    def by_index_step() -> Losses:
        return _step(detector, images, targets)

    def masked_step() -> Losses:
        with by_mask(detector):
            return _step(detector, images, targets)

    steps: dict[str, Callable[[], Losses]] = {"by index": by_index_step, "by mask": masked_step}
    # Before anything is timed: the first steps of all load and compile what they need.
    losses = {name: step() for name, step in steps.items()}
    waits = {name: host_waits(step, device) for name, step in steps.items()}
    timings = measure({name: [step] for name, step in steps.items()}, device, seconds)
    return [
        Outcome(
            name,
            losses[name],
            waits[name],
            **asdict(timings[name]),
            peak_extra_bytes=peak_extra_bytes(step, device),
        )
        for name, step in steps.items()
    ]


def gap(outcomes: list[Outcome]) -> float:
    """Return the largest relative difference of a loss."""
    one, other = (outcome.losses for outcome in outcomes)
    return max(abs(one[name] - other[name]) / abs(one[name]) for name in one)


def _detector(device: torch.device) -> nn.Module:
    """Build a detector with random weights: the published one, or on a CPU the smallest."""
    from torchvision.models import detection

    untrained: dict[str, Any] = {"weights": None, "weights_backbone": None, "num_classes": CLASSES}
    small = detection.fasterrcnn_mobilenet_v3_large_320_fpn
    build = detection.fasterrcnn_resnet50_fpn if device.type == "cuda" else small
    detector: nn.Module = build(**untrained).to(device)
    return detector


def _images(device: torch.device) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Return canvases (3, H, W) in 0 to 1, and their digits' boxes (n, 4) and labels (n,)."""
    rng = np.random.default_rng(SEED)
    scenes = [rpn.paste_digits(rng) for _ in range(IMAGES)]
    images = [torch.from_numpy(scene.canvas).float() / 16 for scene in scenes]
    targets = [
        {
            "boxes": torch.from_numpy(scene.boxes).float().to(device),
            "labels": torch.ones(len(scene.boxes), dtype=torch.int64, device=device),
        }
        for scene in scenes
    ]
    return [image.expand(3, -1, -1).contiguous().to(device) for image in images], targets


def _step(detector: nn.Module, images: list[Tensor], targets: list[dict[str, Tensor]]) -> Losses:
    """Do forward and backward with the same sampled anchors each time; return the losses."""
    torch.manual_seed(SEED)
    detector.zero_grad(set_to_none=True)
    losses: dict[str, Tensor] = detector(images, targets)
    torch.stack(list(losses.values())).sum().backward()
    values = torch.stack(list(losses.values())).tolist()  # one wait, the same for both
    return dict(zip(losses, values, strict=True))


def _print(out: Console, report: Report, outcomes: list[Outcome]) -> None:
    table = Table(title=report.device, title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("losses")
    for heading in (*outcomes[0].losses, "host waits", "step ms", "20th", "80th"):
        table.add_column(heading, justify="right")
    for outcome in outcomes:
        table.add_row(
            outcome.name,
            *(f"{loss:.6f}" for loss in outcome.losses.values()),
            str(outcome.host_waits),
            *(f"{ms:.2f}" for ms in (outcome.median_ms, outcome.p20_ms, outcome.p80_ms)),
        )
    out.print(table)
    out.print(f"Largest relative difference of a loss: {gap(outcomes):.2g}.", highlight=False)


def _write(
    folder: Path,
    report: Report,
    device: torch.device,
    version: str,
    outcomes: list[Outcome],
    out: Console,
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"torchvision-{file_stem(report, device, quick=False)}.json"
    machine = {key: getattr(report, key) for key in ("device", "driver", "torch", "triton")}
    plain = {
        **machine,
        "torchvision": version,
        "python": report.python,
        "largest_difference": gap(outcomes),
        "rows": [asdict(outcome) for outcome in outcomes],
    }
    path.write_text(json.dumps(plain, indent=1) + "\n")
    out.print(f"Wrote {path}.", highlight=False)
