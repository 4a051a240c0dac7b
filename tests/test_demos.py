"""The demos: what they train is one loss in two formulas, and reported is what was trained."""

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 (the name PyTorch users know it by)
from torch.testing import assert_close

from bench.demos import curves, detector, drafter, language_model, train
from bench.demos.language_model import LENGTH, encode
from bench.rivals import FUSED
from tests.support import DEVICE, boxes, coin, results, values

HERE = torch.device(DEVICE)
PROMPT, ANSWER = 'def mean(data): """', 'Return the mean."""'
PAIRS = [(PROMPT, ANSWER), (PROMPT, LENGTH * "a"), (LENGTH * "a", ANSWER)]


def test_formulas() -> None:
    """The two formulas of a demo give the same loss and gradients."""
    maps, states = (2, 36, 5, 7), (3, 9, 8)
    for demo, operands in (
        (train, boxes(maps, maps, maps)),
        (drafter, boxes(states, None, coin(3, 9, 1))),
    ):
        assert_close(*(results(f, operands, **demo.OPTIONS) for f in demo.FORMULAS.values()))


def test_mask_of_the_drafter() -> None:
    """It leaves out prompts and padding: a state counts by the character that it writes."""
    texts = encode(PAIRS, torch.device("cpu"))
    short, cut, no_answer = drafter.drafted(texts)[..., 0]
    assert "".join(chr(n + ord(" ") - 1) for n in texts[0][0, 2:][short].tolist()) == ANSWER
    assert cut.tolist() == [False] * (len(PROMPT) - 2) + [True] * (LENGTH - len(PROMPT))
    assert not no_answer.any()


def test_a_training_from_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both drafters get better in two steps (else the status is 1), and end alike."""
    fit: Any = language_model.fit
    monkeypatch.setattr(language_model, "fit", lambda *given: fit(*given[:3], 2, "few steps"))
    monkeypatch.setattr(drafter, "HELD_OUT", 8)
    monkeypatch.setattr(curves, "LOSS_SECONDS", 0.0)
    assert drafter.main(["--quick", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "drafter-quick.png").stat().st_size > 10_000
    report = json.loads((tmp_path / "drafter-quick.json").read_text())
    assert [training["formula"] for training in report["trainings"]] == ["eager_composition", FUSED]
    assert all(t["loss_ms"] > 0 and t["loss_peak_bytes"] > 0 for t in report["trainings"])
    assert report["largest_difference"] < 1e-4
    # It is that of all steps, not of those alone that are drawn.
    far_off = curves.compared({"one": [1.0] * 1000, "other": [1.0, 1.5, *[1.0] * 998]})
    assert far_off["largest_difference"] == 0.5


def of_images(*tensors: Tensor) -> list[list[Tensor]]:
    """Split what is of two images."""
    return [list(tensor.tensor_split((len(tensor) // 3,))) for tensor in tensors]


@pytest.mark.parametrize("share", [0.0, 0.2, 1.0])
def test_losses_of_a_detector(share: float) -> None:
    """Of anchors and regions: by mask they are those of torchvision by index, and nobody waits."""
    scores, (deltas, targets) = values(300, 1, grad=True), boxes(300)
    positive = coin(300, p=share)
    negative = coin(300, p=0.3) & ~positive
    labels, marks = positive.float(), of_images(positive.byte(), negative.byte())
    network = SimpleNamespace(fg_bg_sampler=lambda labels: marks)
    logits, moves = values(300, 5, grad=True), values(300, 20, grad=True)
    classes = (torch.arange(300, device=DEVICE) % 4 + 1) * positive
    distance = partial(F.smooth_l1_loss, beta=1 / 9, reduction="sum")

    def of_anchors() -> tuple[Tensor, Tensor]:
        sampled = positive | negative
        entropy = F.binary_cross_entropy_with_logits(scores[:, 0][sampled], labels[sampled])
        return entropy, distance(deltas[positive], targets[positive]) / sampled.sum().item()

    def of_regions() -> tuple[Tensor, Tensor]:
        rows = classes.nonzero()[:, 0]
        chosen = moves.reshape(300, 5, 4)[rows, classes[rows]]
        return F.cross_entropy(logits, classes), distance(chosen, targets[rows]) / 300

    anchors = partial(detector.rpn_losses, network, scores, deltas, *of_images(labels, targets))
    regions = partial(detector.box_head_losses, logits, moves, *of_images(classes, targets))
    for by_mask, by_index, operands, waits in (
        (anchors, of_anchors, (scores, deltas), 5),  # for four selections and one number
        (regions, of_regions, (logits, moves), 1),
    ):
        both = by_mask(), by_index()
        assert_close(*both)
        assert_close(*(torch.autograd.grad(one + other, operands) for one, other in both))
        assert [detector.host_waits(step, HERE) for step in (by_mask, by_index)] == [0, waits]


def test_whole_detector(unpoisoned: None) -> None:
    """Its own sampler, its own layout of the operands, and its own losses to compare with."""
    pytest.importorskip("torchvision", reason="waits for a machine with torchvision")
    by_index, by_mask = detector.compare(HERE, seconds=0.0).values()
    assert detector.gap(by_index, by_mask) < detector.TOLERANCE
    assert by_mask.host_waits < by_index.host_waits
