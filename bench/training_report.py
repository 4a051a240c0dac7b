"""What `python -m bench train` found: the table, the JSON file and the picture."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display is needed, nor looked for

import numpy as np
import numpy.typing as npt
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from rich import box
from rich.console import Console
from rich.table import Table

from bench.plot import STYLES
from bench.report import Report

Floats = npt.NDArray[np.float64]

DRAWN_SCORE = 0.5  # proposals below it are not drawn
PROPOSED, TRUE = "#21c45d", "#ff9f1c"
MEBIBYTE = 2**20
DOTS: dict[str, Any] = {"linestyle": "", "marker": "o", "markersize": 2.5}
MISSING = "-"


@dataclass(frozen=True)
class View:
    """A held-out canvas, its digits' boxes (n, 4), and the proposals (m, 4) with scores (m,)."""

    canvas: npt.NDArray[np.uint8]
    boxes: Floats
    proposals: Floats
    scores: Floats


@dataclass(frozen=True)
class Training:
    """One training: `box_losses` per step; bytes are most live at once in one step.

    `loss_ms` and `loss_peak_bytes` are of the box loss alone, forward and backward.
    """

    name: str
    box_losses: list[float]
    seconds: float
    peak_bytes: int | None
    loss_ms: float
    loss_peak_bytes: int | None
    recall: float
    views: list[View]


@dataclass(frozen=True)
class Result:
    """Both trainings; recall is the share of `objects` that the best `proposals` a canvas find."""

    machine: Report
    trainings: list[Training]
    untrained_recall: float
    objects: int
    proposals: int

    def differences(self) -> Floats:
        """Return the distance of the two loss curves at each step."""
        one, other = (np.asarray(training.box_losses) for training in self.trainings)
        distance: Floats = np.abs(one - other)
        return distance


def print_result(out: Console, result: Result) -> None:
    """Print the machine, the table, and how far the curves are apart."""
    machine = result.machine
    versions = f"torch {machine.torch}, triton {machine.triton or 'none'}, Python {machine.python}"
    out.print(f"\n[bold]{machine.device}[/]\n{versions}\n", highlight=False)
    out.print(_table(result))
    differences = result.differences()
    step = int(differences.argmax())
    at = result.trainings[0].box_losses[step]
    out.print(
        f"\nRecall: the share of {result.objects} held-out digits that one of the best"
        f" {result.proposals} proposals of their canvas\nmeets with IoU 0.5; before training it was"
        f" {result.untrained_recall:.3f}. Memory: most bytes live at once beyond those before\n"
        "a step. Loss: the box loss alone, forward + backward.\n"
        f"Largest difference between the two loss curves: {differences[step]:.2g}"
        f" (step {step + 1} of {len(differences)}, where the loss is {at:.3g});"
        f" at the first step: {differences[0]:.2g}.",
        highlight=False,
    )


def write(result: Result, folder: Path, *, quick: bool, out: Console) -> None:
    """Write the JSON file and the picture."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / ("train-quick" if quick else "train")
    as_json, picture = stem.with_suffix(".json"), stem.with_suffix(".png")
    as_json.write_text(json.dumps(_plain(result), indent=1) + "\n")
    _draw(result, picture)
    out.print(f"Wrote {as_json} and {picture.name}.", highlight=False)


def _table(result: Result) -> Table:
    table = Table(
        title="A region proposal network trained twice from the same seed",
        title_justify="left",
        box=box.SIMPLE_HEAD,
    )
    headings = ("recall at\nIoU 0.5", "last\nbox loss", "training\ns", "step\nMiB")
    table.add_column("box loss")
    for heading in (*headings, "loss\nms", "loss\nMiB"):
        table.add_column(heading, justify="right")
    for training in result.trainings:
        table.add_row(
            training.name,
            f"{training.recall:.3f}",
            f"{training.box_losses[-1]:.5f}",
            f"{training.seconds:.1f}",
            _mebibytes(training.peak_bytes),
            f"{training.loss_ms:.3f}",
            _mebibytes(training.loss_peak_bytes),
        )
    return table


def _mebibytes(size: int | None) -> str:
    return MISSING if size is None else f"{size / MEBIBYTE:.2f}"


def _plain(result: Result) -> dict[str, Any]:
    machine = result.machine
    differences = result.differences()
    return {
        "device": machine.device,
        "driver": machine.driver,
        "torch": machine.torch,
        "triton": machine.triton,
        "python": machine.python,
        "objects": result.objects,
        "proposals_per_canvas": result.proposals,
        "untrained_recall": _rounded(result.untrained_recall),
        "largest_difference": _rounded(float(differences.max())),
        "trainings": [
            {
                "formula": training.name,
                "recall": _rounded(training.recall),
                "seconds": _rounded(training.seconds),
                "step_peak_bytes": training.peak_bytes,
                "loss_ms": _rounded(training.loss_ms),
                "loss_peak_bytes": training.loss_peak_bytes,
                "box_losses": [_rounded(loss) for loss in training.box_losses],
            }
            for training in result.trainings
        ],
    }


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")


def _draw(result: Result, path: Path) -> None:
    """Draw the curves and their distance on the left, canvases with proposals on the right."""
    figure = plt.figure(figsize=(13, 6), layout="constrained")
    panels: Any = figure.subfigures(1, 2, width_ratios=(1, 1.35))
    left, right = panels
    above, below = left.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    _curves(above, result)
    _distance(below, result)
    fused = result.trainings[-1]
    for axes, view in zip(right.subplots(2, 2).flat, fused.views, strict=True):
        _canvas(axes, view)
    right.suptitle(
        f"held-out canvases, trained with {fused.name}: recall {fused.recall:.3f} at IoU 0.5 of"
        f" {result.objects} digits\n(untrained {result.untrained_recall:.3f})",
        fontsize=10,
    )
    right.legend(
        handles=[
            Rectangle((0, 0), 1, 1, fill=False, color=PROPOSED, label="proposed, score above 0.5"),
            Rectangle((0, 0), 1, 1, fill=False, color=TRUE, linestyle=":", label="true"),
        ],
        loc="outside lower center",
        ncols=2,
        frameon=False,
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _curves(axes: Axes, result: Result) -> None:
    # The second curve lies on the first one, so it is drawn thinner and dashed.
    looks: tuple[dict[str, Any], ...] = (
        {"linewidth": 3.0, "alpha": 0.6},
        {"linewidth": 1.2, "linestyle": "--"},
    )
    for training, look in zip(result.trainings, looks, strict=True):
        label = f"{training.name}: recall {training.recall:.3f}"
        axes.plot(_steps(result), training.box_losses, color=STYLES[training.name][0], **look)
        axes.lines[-1].set_label(label)
    axes.set_yscale("log")
    axes.set_ylabel("box loss")
    axes.set_title(f"{result.machine.device}\ntorch {result.machine.torch}", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)


def _distance(axes: Axes, result: Result) -> None:
    differences = result.differences()
    # A logarithmic axis has no place for the steps at which the two are the same number.
    axes.plot(
        _steps(result), np.where(differences > 0, differences, np.nan), color="#c0392b", **DOTS
    )
    axes.set_yscale("log")
    axes.set_ylabel("distance of the curves")
    axes.set_xlabel("step")
    axes.set_title(f"largest {differences.max():.2g}", fontsize=10)
    axes.grid(alpha=0.3)


def _steps(result: Result) -> range:
    return range(1, len(result.trainings[0].box_losses) + 1)


def _canvas(axes: Axes, view: View) -> None:
    axes.imshow(view.canvas, cmap="gray")
    for box_pixels in view.boxes:
        axes.add_patch(_rectangle(box_pixels, color=TRUE, linestyle=":", linewidth=2))
    for box_pixels in view.proposals[view.scores > DRAWN_SCORE]:
        axes.add_patch(_rectangle(box_pixels, color=PROPOSED, linewidth=1.5))
    axes.set_axis_off()


def _rectangle(corners: Floats, **look: Any) -> Rectangle:
    x1, y1, x2, y2 = (float(value) for value in corners)
    # Corners are whole pixels, both inside the box, and imshow centres a pixel on its number.
    return Rectangle((x1 - 0.5, y1 - 0.5), x2 - x1 + 1, y2 - y1 + 1, fill=False, **look)
