"""`python -m bench drafter`: train a drafter as EAGLE does, with this loss and without it.

A drafter guesses what a language model is about to write, so that the model only has to check it.
EAGLE's reads the model's hidden state at one token and the embedding of the next, and regresses the
hidden state there. Here the model is small, reads characters, and learns on the spot to document
functions of Python's standard library (`bench.demos.language_model`). Only hidden states that write
the answer count in the loss: a mask leaves out prompts and padding. The drafter is trained twice
from the same seed on the same batches; only the formula of that loss differs. On functions that
were not used in training it is counted how many drafted characters the model would choose too, each
one step ahead on the true text.
"""

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from math import nan
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display is needed, nor looked for

import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.demos import curves, language_model
from bench.demos.language_model import HIDDEN, LENGTH, SEED, LanguageModel, Texts
from bench.plot import STYLES
from bench.report import RESULTS, describe, number, write_json
from bench.rivals import FUSED, Formula, composition_for_drafter, fused_for_drafter

FORMULAS: dict[str, Formula] = {
    "eager_composition": composition_for_drafter,
    FUSED: fused_for_drafter,
}
OPTIONS: dict[str, Any] = {"reduction": "sum"}
ENTROPY_WEIGHT = 0.1  # as in EAGLE
HELD_OUT = 200  # functions
ALLOWED_GAP = 0.02  # of the accepted share, between the two trainings
VIEWS, COLUMNS = 5, 100  # texts in the picture, and characters of a line
OWN, OTHER, PROMPT = "the language model's own choice", "another one", "prompt, not drafted"
COLORS = {OWN: "#a9dfb5", OTHER: "#f5b7a0", PROMPT: "white"}


class Drafter(nn.Module):
    """A linear layer fuses state and embedding, and one layer like the model's follows."""

    def __init__(self) -> None:
        super().__init__()
        self.fuse = nn.Linear(2 * HIDDEN, HIDDEN)
        self.layer = language_model.Layer()

    def forward(self, model: LanguageModel, texts: Tensor) -> tuple[Tensor, Tensor]:
        """Return predicted and true hidden states (B, LENGTH - 2, HIDDEN).

        They are those of all characters but the first, before which there is no state to read, and
        the last, which has no next one.
        """
        with torch.no_grad():  # the model is trained already
            states, embedded = model(texts[:, :-1]), model.embedding(texts[:, 1:-1])
        predicted = self.layer(self.fuse(torch.cat([states[:, :-1], embedded], 2)))
        return predicted, states[:, 1:]


def main(arguments: Sequence[str]) -> int:
    """Train and report; return 0, or 1 if the drafters did not learn, or not equally well."""
    parser = argparse.ArgumentParser(prog="python -m bench drafter", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few steps, under 60 s on two cores")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR", help="for the results")
    options = parser.parse_args(arguments)
    model_steps, steps = (60, 45) if options.quick else (600, 600)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # The layers are small: where cores are shared, threads that wait for each other can take far
    # longer for a step than one thread alone.
    torch.set_num_threads(1)
    functions = language_model.documented_functions()
    np.random.default_rng(SEED).shuffle(functions)
    train, test = (
        language_model.encode(part, device)
        for part in (functions[:-HELD_OUT], functions[-HELD_OUT:])
    )
    trainings: list[dict[str, Any]] = []
    losses: dict[str, list[float]] = {}
    # Attention whose gradient adds in another order at each run would hide what the loss does.
    with sdpa_kernel(SDPBackend.MATH):
        torch.manual_seed(SEED)
        model = LanguageModel().to(device)
        language_model.fit(model, model.losses, train, model_steps, "language model")
        untrained = _share(_accepted(_drafter(device), model, test), test)
        for name in FORMULAS:
            drafter = _drafter(device)
            losses_of = partial(_losses, drafter, model, name)
            losses[name] = language_model.fit(drafter, losses_of, train, steps, name)
            accepted = _accepted(drafter, model, test)
            share = _share(accepted, test)
            trainings.append({"formula": name, "accepted": share, "last_loss": losses[name][-1]})
        with torch.no_grad():
            nats = model.losses(test)[0].item()
            predicted, target = drafter(model, test[0])

    # The loss alone, forward and backward, on what a drafter has learned.
    predicted.requires_grad_()
    curves.add_costs(trainings, FORMULAS, predicted, (target, None, drafted(test)), OPTIONS)
    machine = describe(device)
    plain = {
        **asdict(machine),
        "model_nats": nats,  # of its entropy, for a held-out character
        "drafted_characters": int(drafted(test).sum()),
        "untrained_accepted": untrained,
        "loss_shape": list(predicted.shape),
        "trainings": trainings,
        **curves.compared(losses),
    }
    path = options.out / f"drafter{'-quick' if options.quick else ''}.json"
    write_json(path, plain)
    _draw(plain, functions[-HELD_OUT:], accepted, path.with_suffix(".png"))
    print(machine)
    for training in trainings:
        peak = training["loss_peak_bytes"]
        print(
            f"{training['formula']:17} accepted {training['accepted']:.3f}, last value loss"
            f" {training['last_loss']:.4g}; the loss alone {training['loss_ms']:.3f} ms,"
            f" {number(peak and peak / 1e6)} MB"
        )
    print(
        f"Accepted: the share of {plain['drafted_characters']} drafted characters of held-out"
        f" docstrings that the language\nmodel chooses too; {untrained:.3f} before training. The"
        f" loss curves differ by {plain['largest_difference']:.2g} at most.\n"
        f"Wrote {path} and a picture."
    )
    shares = [training["accepted"] for training in trainings]
    return int(max(shares) - min(shares) > ALLOWED_GAP or min(shares) <= untrained)


def drafted(texts: Texts) -> Tensor:
    """Return the mask (B, LENGTH - 2, 1) of the hidden states that write an answer's character."""
    return texts[1][:, 2:, None]


def _drafter(device: torch.device) -> Drafter:
    torch.manual_seed(SEED)
    return Drafter().to(device)


def _losses(
    drafter: Drafter, model: LanguageModel, name: str, texts: Texts
) -> tuple[Tensor, Tensor]:
    """Return EAGLE's two: of the hidden states, and of what the model's head makes of them."""
    (predicted, target), mask = drafter(model, texts[0]), drafted(texts)
    value_loss = FORMULAS[name](predicted, target, None, mask, **OPTIONS)
    entropy = -model.head(target).softmax(2) * model.head(predicted).log_softmax(2)
    return value_loss, ENTROPY_WEIGHT * (mask * entropy).sum() / (mask.sum() + 1e-5)


@torch.no_grad()
def _accepted(drafter: Drafter, model: LanguageModel, texts: Texts) -> Tensor:
    """Return where (B, LENGTH - 2) drafter and model choose the same next character."""
    drafts, own = (model.head(states).argmax(2) for states in drafter(model, texts[0]))
    same: Tensor = drafts == own
    return same


def _share(accepted: Tensor, texts: Texts) -> float:
    return accepted[drafted(texts)[..., 0]].float().mean().item()


def _draw(
    plain: dict[str, Any], pairs: Sequence[tuple[str, str]], accepted: Tensor, path: Path
) -> None:
    """Draw the curves and what the loss takes; below, texts and what was accepted of them."""
    figure = plt.figure(figsize=(13, 9), layout="constrained")
    rows: Any = figure.subfigures(2, 1, height_ratios=(1.4, 1))
    panels = rows[0].subfigures(1, 2, width_ratios=(1.2, 1))
    pair = panels[0].subplots(2, 1, sharex=True, height_ratios=(2, 1))
    labels = {
        training["formula"]: f"{training['formula']}: {training['accepted']:.3f} accepted"
        for training in plain["trainings"]
    }
    curves.draw(pair, plain, "value loss", labels)
    memory, time = panels[1].subplots(1, 2)
    _draw_bars(memory, plain, "loss_peak_bytes", 1e6, "peak extra MB, gradient included")
    _draw_bars(time, plain, "loss_ms", 1.0, "ms, forward + backward")
    shape = " x ".join(map(str, plain["loss_shape"]))
    panels[1].suptitle(f"the loss alone, on {shape} hidden states", fontsize=10)
    _draw_texts(rows[1].subplots(), pairs, accepted)
    title = (
        f"held-out functions: what the drafter trained with {FUSED} chooses in a character's place"
    )
    rows[1].suptitle(title, fontsize=10)
    handles = [
        Rectangle((0, 0), 1, 1, facecolor=color, edgecolor="grey", label=label)
        for label, color in COLORS.items()
    ]
    rows[1].legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_bars(axes: Axes, plain: dict[str, Any], key: str, unit: float, title: str) -> None:
    names = [training["formula"] for training in plain["trainings"]]
    values = [(training[key] or nan) / unit for training in plain["trainings"]]
    bars = axes.bar(names, values, color=[STYLES[name][0] for name in names], width=0.6)
    axes.bar_label(bars, fmt=number, padding=2)
    axes.margins(y=0.12)
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3, axis="y")
    axes.set_axisbelow(True)


def _draw_texts(axes: Axes, pairs: Sequence[tuple[str, str]], accepted: Tensor) -> None:
    """Write texts letter by letter, coloured by what the drafter chose in the letter's place."""
    look: Any = {"ha": "center", "va": "center", "family": "monospace", "fontsize": 11}
    line = 0.0
    for (prompt, answer), same in zip(pairs[:VIEWS], accepted.tolist(), strict=False):
        for at, letter in enumerate((prompt + answer)[:LENGTH]):
            choice = PROMPT if at < len(prompt) else OWN if same[at - 2] else OTHER
            x, y = at % COLUMNS, line + at // COLUMNS
            axes.add_patch(Rectangle((x, y), 1, 1, color=COLORS[choice]))
            axes.text(x + 0.5, y + 0.5, letter, **look)
        line = y + 1.6
    axes.set(xlim=(0, COLUMNS), ylim=(line, 0))
    axes.set_axis_off()
