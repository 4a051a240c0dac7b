"""The losses of torchvision's Faster R-CNN by mask: nothing is picked, so nothing waits."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional

from fused_smoothl1 import smooth_l1_loss

BETA = 1 / 9  # torchvision's
COORDINATES = 4


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
    """Let a detector of torchvision use the losses of this file."""
    from torchvision.models.detection import roi_heads

    network: Any = detector.rpn
    with (
        mock.patch.object(network, "compute_loss", MethodType(rpn_losses, network)),
        mock.patch.object(roi_heads, "fastrcnn_loss", box_head_losses),
    ):
        yield
