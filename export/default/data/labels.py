"""Boxes of COCO files, and crops around them. Boxes are x0, y0, x1, y1 in pixels."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

IGNORE = -1
MIN_BOX_PX = 5.0
"""Smaller objects after scaling are ignored, not learnt."""
NEAR_OBJECTS = 0.7
GAUSSIAN_ALPHA = 0.54
"""The positive region is this share of the box (Liu et al. 2019, "TTFNet")."""


@dataclass(frozen=True)
class Labels:
    """Boxes [n,4] in pixels and class indices [n], IGNORE for ignore regions."""

    boxes: npt.NDArray[np.float64]
    classes: npt.NDArray[np.int64]


def read_boxes(path: Path, numbers: Mapping[str, int]) -> dict[str, Labels]:
    """COCO file -> labels by image name; ``numbers`` are those of its categories, IGNORE for ignore regions."""
    coco = json.loads(path.read_text())
    category = {c["id"]: numbers[c["name"]] for c in coco["categories"] if c["name"] in numbers}
    grouped: dict[int, list[tuple[list[float], int]]] = defaultdict(list)
    for a in coco["annotations"]:
        x, y, w, h = a["bbox"]
        grouped[a["image_id"]].append(([x, y, x + w, y + h], category[a["category_id"]]))
    return {
        i["file_name"]: Labels(
            np.array([b for b, _ in grouped[i["id"]]], np.float64).reshape(-1, 4),
            np.array([c for _, c in grouped[i["id"]]], np.int64),
        )
        for i in coco["images"]
    }


def random_box(
    rng: np.random.Generator, hw: tuple[int, ...], labels: Labels, side: float, near: float = NEAR_OBJECTS
) -> tuple[float, float, float, float]:
    """A square crop of `side` raster px, kept mostly inside the image: around an object (a share ``near`` of them) or
    anywhere."""
    height, width = hw[:2]
    if len(labels.boxes) and rng.random() < near:
        x0, y0, x1, y1 = labels.boxes[rng.integers(len(labels.boxes))]
        cx, cy = (x0 + x1) / 2 + rng.uniform(-0.45, 0.45) * side, (y0 + y1) / 2 + rng.uniform(-0.45, 0.45) * side
    else:
        cx, cy = rng.uniform(0, width), rng.uniform(0, height)
    slack = 0.1 * side  # a little of the outside is seen, as at the border of a raster
    left = np.clip(cx - side / 2, min(-slack, width - side + slack), max(-slack, width - side + slack))
    top = np.clip(cy - side / 2, min(-slack, height - side + slack), max(-slack, height - side + slack))
    return float(left), float(top), float(left + side), float(top + side)


def visible_share(box: npt.NDArray[np.float64], size_px: int) -> float:
    """Of a box x0, y0, x1, y1, the share of its area inside a tile of ``size_px``."""
    w = min(box[2], size_px) - max(box[0], 0)
    h = min(box[3], size_px) - max(box[1], 0)
    return float(max(w, 0) * max(h, 0) / max((box[2] - box[0]) * (box[3] - box[1]), 1e-9))
