"""The demos: both formulas of each are one loss, and reported is what was trained."""

import json
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 (the name PyTorch users know it by)
from torch.testing import assert_close

from bench.demos import curves, detector, drafter, language_model, train
from bench.demos.curves import REACH
from bench.demos.language_model import HIDDEN, LENGTH, encode
from bench.rivals import FUSED
from tests import oracle, support
from tests.support import DEVICE, assert_near, boxes, coin, results, values

FORMULAS = ["eager_composition", FUSED]
PROMPT, ANSWER = 'def mean(data): """', 'Return the mean."""'
PAIRS = [(PROMPT, ANSWER), (PROMPT, LENGTH * "a"), (LENGTH * "a", ANSWER)]
SUM: Any = {"beta": 1 / 9, "reduction": "sum"}


@support.on_both
@pytest.mark.parametrize("name", FORMULAS)
def test_formulas(name: str) -> None:
    """They are the best composition and this library's, of what py-faster-rcnn and EAGLE write."""
    maps, mask = (2, 36, 5, 7), drafter.drafted(encode(PAIRS, torch.device(DEVICE)))
    states = boxes((len(PAIRS), LENGTH - 2, HIDDEN), None, mask)
    eagle = {"reduction": "sum", "normalizer": HIDDEN * (int(mask.sum()) + 1e-5)}
    demos = [(train, boxes(maps, maps, maps), train.OPTIONS), (drafter, states, eagle)]
    for demo, operands, options in demos:
        assert list(demo.FORMULAS) == FORMULAS
        loss, gradient = results(demo.FORMULAS[name], operands, **demo.OPTIONS)
        truth = oracle.smooth_l1(*operands, **options)
        np.testing.assert_allclose(loss.item(), truth.loss, rtol=1e-5)
        assert_near("gradient", gradient, truth.input, computed_in=torch.float32)


def test_mask_of_the_drafter() -> None:
    """It leaves out prompts and padding: a state counts by the character that it writes."""
    texts = encode(PAIRS, torch.device("cpu"))
    short, cut, no_answer = drafter.drafted(texts)[..., 0]
    assert "".join(chr(n + ord(" ") - 1) for n in texts[0][0, 2:][short].tolist()) == ANSWER
    assert cut.tolist() == [False] * (len(PROMPT) - 2) + [True] * (LENGTH - len(PROMPT))
    assert not no_answer.any()


def test_a_training_from_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps teach both drafters what is the most frequent character."""
    fit: Any = language_model.fit
    monkeypatch.setattr(language_model, "fit", lambda *given: fit(*given[:3], 2, "few steps"))
    monkeypatch.setattr(drafter, "HELD_OUT", 8)
    monkeypatch.setattr(curves, "LOSS_SECONDS", 0.0)
    assert drafter.main(["--quick", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "drafter-quick.png").stat().st_size > 10_000
    report = json.loads((tmp_path / "drafter-quick.json").read_text())
    assert [training["formula"] for training in report["trainings"]] == FORMULAS
    assert all(t["loss_ms"] > 0 and t["loss_peak_bytes"] > 0 for t in report["trainings"])
    assert report["largest_difference"] < 1e-4


@pytest.mark.parametrize("gap", [0.5, 0.0])
def test_curves(gap: float) -> None:
    """They have a loss of every fourth step, drawn pale, and its geometric mean on top."""
    losses = np.exp(np.random.default_rng(0).normal(size=1000))
    other = losses + gap * (np.arange(1000) == 1)  # at a step that is none of the points
    found = curves.compared({FORMULAS[0]: losses.tolist(), FUSED: other.tolist()})
    np.testing.assert_allclose(found["largest_difference"], gap)
    figure = Figure(layout="constrained")
    pair = figure.subplots(2, sharex=True)
    machine = {"device": "CPU, 1 thread", "torch": "2"}
    curves.draw(pair, machine | found, "loss", {name: name for name in FORMULAS})
    pale, smoothed = (np.log(line.get_ydata()) for line in pair[0].get_lines()[:2])
    np.testing.assert_allclose(pale, np.log(losses[::4]))
    for at, reach in ((0, 0), (1, 1), (100, REACH), (249, REACH)):
        np.testing.assert_allclose(smoothed[at], pale[at - reach : at + reach + 1].mean())
    assert f"geometric mean over {4 * (2 * REACH + 1)} steps" in pair[0].get_title()
    figure.savefig(BytesIO())


def _of_images(*tensors: Tensor) -> list[list[Tensor]]:
    """Split what is of two images."""
    return [list(tensor.tensor_split((len(tensor) // 3,))) for tensor in tensors]


def _assert_same(found: Any, expected: Any, *wanted: Tensor) -> None:
    assert_close(found, expected)
    assert_close(*(torch.autograd.grad(one + other, wanted) for one, other in (found, expected)))


@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
def test_losses_of_anchors(share: float) -> None:
    """By mask they are those of torchvision by index."""
    logits, (deltas, targets) = values(300, 1, grad=True), boxes(300)
    positive = coin(300, p=share)
    negative = coin(300, p=0.3) & ~positive
    labels, marks = positive.float(), _of_images(positive.byte(), negative.byte())
    network = SimpleNamespace(fg_bg_sampler=lambda labels: marks)
    found = detector.rpn_losses(network, logits, deltas, *_of_images(labels, targets))
    rows, sampled = positive.nonzero()[:, 0], (positive | negative).nonzero()[:, 0]
    distance = F.smooth_l1_loss(deltas[rows], targets[rows], **SUM) / len(sampled)
    entropy = F.binary_cross_entropy_with_logits(logits[sampled, 0], labels[sampled])
    _assert_same(found, (entropy, distance), logits, deltas)


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_losses_of_regions(share: float) -> None:
    """By mask they are those of torchvision by index."""
    logits, deltas, targets = values(64, 5, grad=True), values(64, 20, grad=True), values(64, 4)
    labels = (torch.arange(64, device=DEVICE) % 4 + 1) * coin(64, p=share)
    found = detector.box_head_losses(logits, deltas, *_of_images(labels, targets))
    rows = labels.nonzero()[:, 0]
    chosen = deltas.reshape(64, 5, 4)[rows, labels[rows]]
    distance = F.smooth_l1_loss(chosen, targets[rows], **SUM) / 64
    _assert_same(found, (F.cross_entropy(logits, labels), distance), logits, deltas)


def test_waits_are_counted() -> None:
    tensor, mask, index = values(8), coin(8), torch.arange(3, device=DEVICE)
    waiting = [lambda: tensor[mask], lambda: mask.nonzero(), lambda: tensor.sum().item()]
    for step in waiting:
        assert detector.host_waits(step, torch.device(DEVICE)) == 1
    assert detector.host_waits(lambda: tensor[index] + tensor.sum(), torch.device(DEVICE)) == 0


def test_whole_detector(unpoisoned: None) -> None:
    """Its own sampler, its own layout of the operands, and its own losses to compare with."""
    pytest.importorskip("torchvision", reason="waits for a machine with torchvision")
    by_index, by_mask = detector.compare(torch.device(DEVICE), seconds=0.0).values()
    assert detector.gap(by_index, by_mask) < detector.TOLERANCE
    assert by_mask.host_waits < by_index.host_waits
