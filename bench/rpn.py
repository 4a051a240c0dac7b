"""Real regression targets of a region proposal network, made as py-faster-rcnn makes them.

The objects are the handwritten digits that scikit-learn ships, enlarged and pasted on an empty
600 x 1000 canvas; their ink gives the ground-truth boxes. Everything after that is the recipe of
Faster R-CNN's anchor target layer.

Boxes are (x1, y1, x2, y2) in canvas pixels, both corners inclusive, so a width is x2 - x1 + 1.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from sklearn.datasets import load_digits

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]

CANVAS_HEIGHT, CANVAS_WIDTH = 600, 1000  # pixels: the training size of py-faster-rcnn
STRIDE = 16  # pixels of the canvas per cell of the feature map
MAP_HEIGHT, MAP_WIDTH = 38, 63  # cells of the feature map
BASE_SIZE = 16  # pixels: side of the square from which the anchors grow
RATIOS = (0.5, 1.0, 2.0)  # height : width
SCALES = (8, 16, 32)  # multiples of BASE_SIZE
ANCHORS_PER_CELL = len(RATIOS) * len(SCALES)
POSITIVE_IOU, NEGATIVE_IOU = 0.7, 0.3
SAMPLED_ANCHORS, MOST_POSITIVES = 256, 128
DIGIT_ZOOM = (10, 46)  # canvas pixels per digit pixel, so digits are about 80 to 360 pixels high
DIGITS = 8
INK = 4  # of 16: fainter pixels of a digit are the scanner's blur


@dataclass(frozen=True)
class Scene:
    """A grey canvas (600, 1000), values 0 to 16, and the boxes of its digits (n, 4) in pixels."""

    canvas: npt.NDArray[np.uint8]
    boxes: Floats


@dataclass(frozen=True)
class RpnTargets:
    """The loss layer's operands, each (1, 4A, H, W) float32; deltas are in units of the anchor."""

    targets: torch.Tensor
    inside_weights: torch.Tensor
    outside_weights: torch.Tensor
    positives: int
    examples: int


def paste_digits(rng: np.random.Generator) -> Scene:
    """Paste digits at random places and sizes; one that would touch another is drawn anew."""
    digits: Any = load_digits()
    scans = digits.images
    canvas = np.zeros((CANVAS_HEIGHT, CANVAS_WIDTH), dtype=np.uint8)
    boxes: list[tuple[int, int, int, int]] = []
    while len(boxes) < DIGITS:
        scan = scans[rng.integers(len(scans))]
        zoom = int(rng.integers(*DIGIT_ZOOM))
        digit = np.kron(scan, np.ones((zoom, zoom))).astype(np.uint8)
        rows, columns = np.nonzero(digit >= INK)
        digit = digit[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        height, width = digit.shape
        top = int(rng.integers(CANVAS_HEIGHT - height + 1))
        left = int(rng.integers(CANVAS_WIDTH - width + 1))
        place = canvas[top : top + height, left : left + width]
        if place.any():
            continue
        place[:] = digit
        boxes.append((left, top, left + width - 1, top + height - 1))
    return Scene(canvas, np.asarray(boxes, dtype=np.float64))


def cell_anchors() -> Floats:
    """Return the nine anchors (9, 4), in pixels, of the feature map's first cell.

    The published rounding is part of the recipe: each ratio's width and height are whole pixels
    before the scale multiplies them.
    """
    ratios = np.repeat(np.asarray(RATIOS), len(SCALES))
    scales = np.tile(np.asarray(SCALES, dtype=np.float64), len(RATIOS))
    widths = np.rint(np.sqrt(BASE_SIZE**2 / ratios))
    heights = np.rint(widths * ratios)
    half = np.stack([widths * scales - 1, heights * scales - 1], axis=1) / 2
    center = (BASE_SIZE - 1) / 2
    return np.concatenate([center - half, center + half], axis=1)


def all_anchors() -> Floats:
    """Return the anchors of every cell (H * W * 9, 4) in pixels, cells in row-major order."""
    y, x = np.mgrid[:MAP_HEIGHT, :MAP_WIDTH] * STRIDE
    shifts = np.stack([x, y, x, y], axis=-1).reshape(-1, 1, 4)
    return (shifts + cell_anchors()).reshape(-1, 4)


def _sizes(boxes: Floats) -> Floats:
    return boxes[..., 2:] - boxes[..., :2] + 1


def overlaps(first: Floats, second: Floats) -> Floats:
    """Return intersection over union (len(first), len(second)), between 0 and 1."""
    a, b = first[:, None], second[None]
    corner = np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])
    shared: Floats = np.maximum(corner + 1, 0).prod(axis=-1)
    union: Floats = _sizes(a).prod(axis=-1) + _sizes(b).prod(axis=-1) - shared
    return shared / union


def encode(anchors: Floats, boxes: Floats) -> Floats:
    """Return (dx, dy, dw, dh) per anchor: shifts in anchor sizes, then logs of size ratios."""
    anchor_sizes, box_sizes = _sizes(anchors), _sizes(boxes)
    shift = (boxes[:, :2] + box_sizes / 2) - (anchors[:, :2] + anchor_sizes / 2)
    return np.concatenate([shift / anchor_sizes, np.log(box_sizes / anchor_sizes)], axis=1)


def _label(iou: Floats) -> tuple[Flags, Flags]:
    """Return which anchors are positive and which negative; the rest is left out."""
    best = iou.max(axis=1)
    # Every object gets an anchor, however poorly it fits: the best one, and all that tie with it.
    fits_best = ((iou == iou.max(axis=0)) & (iou > 0)).any(axis=1)
    positive = fits_best | (best >= POSITIVE_IOU)
    return positive, (best < NEGATIVE_IOU) & ~positive


def _sample(flags: Flags, most: int, rng: np.random.Generator) -> Ints:
    candidates = np.flatnonzero(flags)
    return rng.choice(candidates, size=min(most, len(candidates)), replace=False)


def _to_map(values: Floats) -> torch.Tensor:
    """Lay (H * W * A, 4) out as the network does, (1, 4A, H, W), contiguous float32."""
    planes = values.reshape(1, MAP_HEIGHT, MAP_WIDTH, -1).transpose(0, 3, 1, 2)
    return torch.from_numpy(np.ascontiguousarray(planes, dtype=np.float32))


def rpn_targets(seed: int = 0) -> RpnTargets:
    """Make one image's targets and weights: 4 * 9 * 38 * 63 = 86,184 elements each."""
    rng = np.random.default_rng(seed)
    boxes = paste_digits(rng).boxes
    anchors = all_anchors()
    inside_canvas = np.flatnonzero(
        (anchors[:, :2] >= 0).all(axis=1)
        & (anchors[:, 2] < CANVAS_WIDTH)
        & (anchors[:, 3] < CANVAS_HEIGHT)
    )
    candidates = anchors[inside_canvas]
    iou = overlaps(candidates, boxes)

    positive, negative = _label(iou)
    positives = _sample(positive, MOST_POSITIVES, rng)
    negatives = _sample(negative, SAMPLED_ANCHORS - len(positives), rng)
    examples = len(positives) + len(negatives)

    targets = np.zeros_like(anchors)
    inside_weights, outside_weights = np.zeros_like(anchors), np.zeros_like(anchors)
    targets[inside_canvas] = encode(candidates, boxes[iou.argmax(axis=1)])
    inside_weights[inside_canvas[positives]] = 1.0
    outside_weights[inside_canvas[np.concatenate([positives, negatives])]] = 1.0 / examples
    return RpnTargets(
        _to_map(targets),
        _to_map(inside_weights),
        _to_map(outside_weights),
        positives=len(positives),
        examples=examples,
    )
