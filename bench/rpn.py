"""Real regression targets of a region proposal network, made as py-faster-rcnn makes them.

The objects are the handwritten digits that scikit-learn ships, enlarged and pasted on an empty
canvas; their ink gives the ground-truth boxes. Everything after that is the recipe of Faster
R-CNN's anchor target layer. Its sizes are those of py-faster-rcnn, 600 x 1000 pixels and nine
anchors up to 512 pixels wide, unless another `Layout` is given.

Boxes are (x1, y1, x2, y2) in canvas pixels, both corners inclusive, so a width is x2 - x1 + 1.
"""

from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from sklearn.datasets import load_digits

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

RATIOS = (0.5, 1.0, 2.0)  # height : width
POSITIVE_IOU, NEGATIVE_IOU = 0.7, 0.3
SAMPLED_ANCHORS, MOST_POSITIVES = 256, 128
INK = 4  # of 16: fainter pixels of a digit are the scanner's blur


@dataclass(frozen=True)
class Layout:
    """The sizes of the canvas, the feature map, the anchors and the digits."""

    canvas: tuple[int, int] = (600, 1000)  # pixels, height and width
    stride: int = 16  # pixels of the canvas per cell of the feature map
    feature_map: tuple[int, int] = (38, 63)  # cells, height and width
    base_size: int = 16  # pixels: side of the square from which the anchors grow
    scales: tuple[float, ...] = (8, 16, 32)  # multiples of base_size
    # Canvas pixels per digit pixel, the end excluded: digits are about 80 to 360 pixels high.
    zoom: tuple[int, int] = (10, 46)
    digits: int = 8


PUBLISHED = Layout()


class Scene(NamedTuple):
    """A grey canvas (height, width), values 0 to 16, and its digits' boxes (n, 4) in pixels."""

    canvas: npt.NDArray[np.uint8]
    boxes: Floats


@cache
def digit_scans() -> Floats:
    """Return the scans (1797, 8, 8), values 0 to 16."""
    scans: Floats = load_digits().images
    return scans


def paste_digits(
    rng: np.random.Generator, layout: Layout = PUBLISHED, scans: Floats | None = None
) -> Scene:
    """Paste digits at random places and sizes; one that would touch another is drawn anew."""
    scans = digit_scans() if scans is None else scans
    canvas_height, canvas_width = layout.canvas
    canvas = np.zeros(layout.canvas, dtype=np.uint8)
    boxes: list[tuple[int, int, int, int]] = []
    while len(boxes) < layout.digits:
        scan = scans[rng.integers(len(scans))]
        zoom = int(rng.integers(*layout.zoom))
        digit = np.kron(scan, np.ones((zoom, zoom))).astype(np.uint8)
        rows, columns = np.nonzero(digit >= INK)
        digit = digit[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        height, width = digit.shape
        top = int(rng.integers(canvas_height - height + 1))
        left = int(rng.integers(canvas_width - width + 1))
        place = canvas[top : top + height, left : left + width]
        if place.any():
            continue
        place[:] = digit
        boxes.append((left, top, left + width - 1, top + height - 1))
    return Scene(canvas, np.asarray(boxes, dtype=np.float64))


def all_anchors(layout: Layout = PUBLISHED) -> Floats:
    """Return the anchors of every cell (H * W * A, 4) in pixels, cells in row-major order.

    The published rounding is part of the recipe: each ratio's width and height are whole pixels
    before the scale multiplies them.
    """
    ratios = np.repeat(np.asarray(RATIOS), len(layout.scales))
    scales = np.tile(np.asarray(layout.scales, dtype=np.float64), len(RATIOS))
    widths = np.rint(np.sqrt(layout.base_size**2 / ratios))
    heights = np.rint(widths * ratios)
    half = np.stack([widths * scales - 1, heights * scales - 1], axis=1) / 2
    center = (layout.base_size - 1) / 2
    first_cell = np.concatenate([center - half, center + half], axis=1)
    map_height, map_width = layout.feature_map
    y, x = np.mgrid[:map_height, :map_width] * layout.stride
    shifts = np.stack([x, y, x, y], axis=-1).reshape(-1, 1, 4)
    anchors: Floats = (shifts + first_cell).reshape(-1, 4)
    return anchors


def trained_anchors(anchors: Floats, layout: Layout = PUBLISHED) -> Ints:
    """Return the indices of the anchors that do not cross the canvas's border: only they learn."""
    height, width = layout.canvas
    return np.flatnonzero(
        (anchors[:, :2] >= 0).all(axis=1) & (anchors[:, 2] < width) & (anchors[:, 3] < height)
    )


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


def decode(anchors: Floats, deltas: Floats) -> Floats:
    """Return the boxes (n, 4) in pixels that these deltas of the anchors mean: undo `encode`."""
    anchor_sizes = _sizes(anchors)
    centers = anchors[:, :2] + anchor_sizes / 2 + deltas[:, :2] * anchor_sizes
    sizes = anchor_sizes * np.exp(deltas[:, 2:])
    corners = centers - sizes / 2
    return np.concatenate([corners, corners + sizes - 1], axis=1)


def targets_of(
    boxes: Floats, rng: np.random.Generator, layout: Layout = PUBLISHED
) -> tuple[torch.Tensor, ...]:
    """Return an image's targets, inside and outside weights, each (1, 4A, H, W) float32.

    Its ground-truth boxes are (n, 4). The targets are in units of the anchor. With the published
    layout each has 4 * 9 * 38 * 63 = 86,184 elements.
    """
    anchors = all_anchors(layout)
    inside_canvas = trained_anchors(anchors, layout)
    candidates = anchors[inside_canvas]
    iou = overlaps(candidates, boxes)

    # Every object gets an anchor, however poorly it fits: the best one, and all that tie with it.
    fits_best = ((iou == iou.max(axis=0)) & (iou > 0)).any(axis=1)
    positive = fits_best | (iou.max(axis=1) >= POSITIVE_IOU)
    negative = (iou.max(axis=1) < NEGATIVE_IOU) & ~positive
    positives = _sample(positive, MOST_POSITIVES, rng)
    negatives = _sample(negative, SAMPLED_ANCHORS - len(positives), rng)
    sampled = np.concatenate([positives, negatives])

    targets = np.zeros_like(anchors)
    inside_weights, outside_weights = np.zeros_like(anchors), np.zeros_like(anchors)
    targets[inside_canvas] = encode(candidates, boxes[iou.argmax(axis=1)])
    inside_weights[inside_canvas[positives]] = 1.0
    outside_weights[inside_canvas[sampled]] = 1.0 / len(sampled)
    return tuple(_to_map(values, layout) for values in (targets, inside_weights, outside_weights))


def _sample(flags: npt.NDArray[np.bool_], most: int, rng: np.random.Generator) -> Ints:
    candidates = np.flatnonzero(flags)
    return rng.choice(candidates, size=min(most, len(candidates)), replace=False)


def _to_map(values: Floats, layout: Layout) -> torch.Tensor:
    """Lay (H * W * A, 4) out as the network does, (1, 4A, H, W), contiguous float32."""
    planes = values.reshape(1, *layout.feature_map, -1).transpose(0, 3, 1, 2)
    return torch.from_numpy(np.ascontiguousarray(planes, dtype=np.float32))


def _sizes(boxes: Floats) -> Floats:
    return boxes[..., 2:] - boxes[..., :2] + 1
