"""What trainings that differ by their formula alone report: its cost, and the loss curves."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from numpy.typing import NDArray
from torch import Tensor

from bench.measure import measure, peak_extra_bytes
from bench.plot import STYLES
from bench.rivals import Formula

LOSS_SECONDS = 1.0  # for timing the loss alone
POINTS = 250  # of the curves, in the file and in the picture
REACH = 10  # points before and after one, with which it is averaged


def add_costs(
    trainings: Sequence[dict[str, Any]],
    formulas: Mapping[str, Formula],
    input: Tensor,
    operands: Sequence[Tensor | None],
    options: Mapping[str, Any],
) -> None:
    """Add to each training what its formula alone takes on these operands, forward and backward."""

    def gradient(name: str) -> tuple[Tensor, ...]:
        return torch.autograd.grad(formulas[name](input, *operands, **options), input)

    alone = {name: partial(gradient, name) for name in formulas}
    timings = measure({name: [step] for name, step in alone.items()}, input.device, LOSS_SECONDS)
    for training in trainings:
        name = training["formula"]
        training["loss_ms"] = timings[name].median_ms
        training["loss_peak_bytes"] = peak_extra_bytes(alone[name], input.device)


def compared(losses: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Return the largest distance of two formulas' losses, and points of the curves."""
    first, second = (np.asarray(own) for own in losses.values())
    distance = np.abs(first - second)
    # As many points of the curves as a picture shows.
    chosen = range(0, len(distance), max(len(distance) // POINTS, 1))
    curves = [
        {"step": at + 1, **{name: own[at] for name, own in losses.items()}, "gap": distance[at]}
        for at in chosen
    ]
    return {"largest_difference": distance.max(), "curves": curves}


def draw(pair: Sequence[Axes], plain: dict[str, Any], loss: str, labels: Mapping[str, str]) -> None:
    """Draw the curves above, with a label for each formula, and their distance below.

    `plain` is the demo's report: the machine, and what `compared` returns. A step's loss is that of
    its own batch, so it is drawn pale, and its mean over some steps on top.
    """
    above, below = pair
    steps, *curves, distance = np.asarray([list(point.values()) for point in plain["curves"]]).T
    # The second curve lies on the first one, so it is drawn thinner and dashed.
    for (name, label), curve, look in zip(labels.items(), curves, ("-", "--"), strict=True):
        width, color = 3.0 if look == "-" else 1.2, STYLES[name][0]
        above.plot(steps, curve, look, color=color, linewidth=width / 2, alpha=0.3)
        above.plot(steps, _smoothed(curve), look, color=color, linewidth=width, label=label)
    above.set_ylabel(loss)
    machine = f"{plain['device']}, torch {plain['torch']}"
    steps_averaged = (2 * REACH + 1) * (steps[1] - steps[0])
    said = f"pale: single steps; on top: geometric mean over {steps_averaged:.0f} steps"
    above.set_title(f"{machine}\n{said}", fontsize=10)
    above.legend(frameon=False)
    # A logarithmic axis has no place for the steps at which the two are the same number.
    below.plot(steps, np.where(distance > 0, distance, np.nan), ".", color="#c0392b")
    below.set_ylabel("distance of the curves")
    below.set_xlabel("step")
    below.set_title(f"largest of all steps {plain['largest_difference']:.2g}", fontsize=10)
    for axes in pair:
        # (Where all distances are 0 there is nothing to scale.)
        if axes is above or distance.any():
            axes.set_yscale("log")
        axes.grid(alpha=0.3)


def _smoothed(curve: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the geometric mean of each point and its neighbours.

    At the beginning, where the loss falls, there are as few after it as before it, or the curve
    would begin too low.
    """
    means = np.empty_like(curve)
    for at in range(len(curve)):
        reach = min(REACH, at)
        means[at] = np.exp(np.log(curve[at - reach : at + reach + 1]).mean())
    return means
