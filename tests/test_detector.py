"""The losses by mask of `python -m bench torchvision` are those of torchvision by index."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from bench.demos.detector import TOLERANCE, box_head_losses, compare, gap, host_waits, rpn_losses
from tests.support import coin, gaussian

ANCHORS, REGIONS, CLASSES = 300, 64, 5


def _split(tensor: Tensor) -> list[Tensor]:
    """Return the parts of two images."""
    return list(tensor.split([len(tensor) // 3, len(tensor) - len(tensor) // 3]))


def _assert_same(
    found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], wanted: list[Tensor]
) -> None:
    torch.testing.assert_close(found, expected)
    ours, theirs = (torch.autograd.grad(one + other, wanted) for one, other in (found, expected))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
def test_rpn(share: float) -> None:
    objectness = gaussian(ANCHORS, 1, seed=1, requires_grad=True)
    deltas = gaussian(ANCHORS, 4, seed=2, requires_grad=True)
    targets = gaussian(ANCHORS, 4, seed=3)
    positive = coin(ANCHORS, seed=4, p=share)
    negative = coin(ANCHORS, seed=5, p=0.3) & ~positive
    labels = positive.float()
    marks = ([m.to(torch.uint8) for m in _split(which)] for which in (positive, negative))
    network = SimpleNamespace(fg_bg_sampler=lambda _, found=tuple(marks): found)

    found = rpn_losses(network, objectness, deltas, _split(labels), _split(targets))

    chosen, sampled = positive.nonzero()[:, 0], (positive | negative).nonzero()[:, 0]
    distance = functional.smooth_l1_loss(
        deltas[chosen], targets[chosen], beta=1 / 9, reduction="sum"
    )
    entropy = functional.binary_cross_entropy_with_logits(objectness[sampled, 0], labels[sampled])
    _assert_same(found, (entropy, distance / len(sampled)), [objectness, deltas])


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_box_head(share: float) -> None:
    logits = gaussian(REGIONS, CLASSES, seed=1, requires_grad=True)
    boxes = gaussian(REGIONS, 4 * CLASSES, seed=2, requires_grad=True)
    targets = gaussian(REGIONS, 4, seed=3)
    classes = torch.arange(REGIONS) % (CLASSES - 1) + 1
    labels = classes * coin(REGIONS, seed=4, p=share)

    found = box_head_losses(logits, boxes, _split(labels), _split(targets))

    rows = labels.nonzero()[:, 0]
    chosen = boxes.reshape(REGIONS, CLASSES, 4)[rows, labels[rows]]
    distance = functional.smooth_l1_loss(chosen, targets[rows], beta=1 / 9, reduction="sum")
    expected = (functional.cross_entropy(logits, labels), distance / REGIONS)
    _assert_same(found, expected, [logits, boxes])


def test_waits_are_counted(device: str) -> None:
    values, mask = gaussian(8, seed=1, device=device), coin(8, seed=2, device=device)

    def waits_for_sizes_and_values() -> None:
        values[mask]
        torch.nonzero(mask)
        float(values.sum())

    def waits_for_nothing() -> None:
        values[torch.arange(3, device=device)] + values.sum()

    assert host_waits(waits_for_sizes_and_values, torch.device(device)) == 3
    assert host_waits(waits_for_nothing, torch.device(device)) == 0


def test_whole_detector(device: str, unpoisoned: None) -> None:
    """Its own sampler, its own layout of the operands, and its own losses to compare with."""
    pytest.importorskip("torchvision", reason="waits for a machine with torchvision")
    by_index, by_mask = compare(torch.device(device), seconds=0.0).values()
    assert gap(by_index, by_mask) < TOLERANCE
    assert by_mask.host_waits < by_index.host_waits
