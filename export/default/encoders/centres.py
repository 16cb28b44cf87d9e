"""Crops and centres of objects of seven classes, from COCO sets whose labels are incomplete, each in its own way.

Shapes: K classes, h, w heat-map cells (stride 4), n boxes. Boxes are x0, y0, x1, y1.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edge_rsvlm.export.default.data.images import ImageStore, open_store
from edge_rsvlm.export.default.data.labels import (
    GAUSSIAN_ALPHA,
    IGNORE,
    MIN_BOX_PX,
    Labels,
    random_box,
    read_boxes,
    visible_share,
)
from edge_rsvlm.export.default.data.views import RGB_BANDS, U8_RANGE, cut, dihedral, dihedral_boxes, jitter

F32 = npt.NDArray[np.float32]
CLASSES = ("airplane", "helicopter", "boat", "car", "truck", "bus", "van")
STRIDE = 4
SIMD_NEAR = 0.75  # background is trusted within this many box sizes of a labelled object


@dataclass(frozen=True)
class DetectSet:
    """What a set's labels mean: source category -> our class (None: ignore region), and what a missing label says."""

    name: str
    images: str
    mapping: dict[str, str | None]
    complete: tuple[str, ...]  # classes for which an unlabelled pixel is background
    sparse: bool = False  # background is trusted only near labelled objects
    weight: float = 1.0


PLANES = ("airliner", "propeller", "trainer", "chartered", "fighter")
SIMD_MAP: dict[str, str | None] = {
    **dict.fromkeys(PLANES, "airplane"),
    **dict.fromkeys(("truck", "longvehicle", "stairtruck", "pushbacktruck"), "truck"),
    **{name: name for name in ("car", "van", "bus", "helicopter", "boat")},
    "other": None,
}
DRONE_MAP: dict[str, str | None] = {"car": "car", "truck": "truck", "bus": "bus", "minibus": "van", "cyclist": None}
SETS = (
    DetectSet("hrplanes", "train.tar", {"airplane": "airplane"}, ("airplane",), weight=0.30),
    DetectSet(
        "airbus_aircraft", "train", {"airplane": "airplane", "truncated airplane": None}, ("airplane",), weight=0.36
    ),
    DetectSet("aerial_airport", "train.tar", {"airplane": "airplane"}, ("airplane",), weight=0.06),
    DetectSet("simd", "train.tar", SIMD_MAP, CLASSES, sparse=True, weight=0.20),
    DetectSet("drone_vehicles", "train", DRONE_MAP, CLASSES, weight=0.08),
)


@dataclass(frozen=True)
class Example:
    """tile [5,H,W]; heat and weight [K,h,w]."""

    tile: F32
    heat: F32
    weight: F32


class DetectData:
    """Random crops of one set."""

    def __init__(self, spec: DetectSet, data_root: Path, cache_dir: Path, exclude: frozenset[str] = frozenset()):
        self.spec = spec
        folder = data_root / spec.name
        self.store: ImageStore = open_store(folder / spec.images, cache_dir, spec.name)
        self.labels = read_labels(folder / "train.json", spec.mapping)
        self.names = [name for name in self.labels if name not in exclude]

    def sample(self, rng: np.random.Generator, size_px: int) -> Example:
        """One augmented crop with its targets."""
        tile, labels = crop(self, rng, size_px)
        return Example(tile, *targets(labels.boxes, labels.classes, size_px, self.spec))


def crop(data: DetectData, rng: np.random.Generator, size_px: int) -> tuple[F32, Labels]:
    """One augmented tile [5,size,size] and all labels of its image, in tile px (they may lie outside)."""
    name = data.names[rng.integers(len(data.names))]
    image, labels = data.store[name], data.labels[name]
    scale = float(np.exp(rng.uniform(np.log(0.5), np.log(1.5))))
    box = random_box(rng, image.shape[:2], labels, size_px / scale)
    tile = cut(image, box, (size_px, size_px), RGB_BANDS, U8_RANGE, jitter(rng, 0.18, 0.05, 0.04))
    boxes = (labels.boxes - [box[0], box[1], box[0], box[1]]) * (size_px / (box[2] - box[0]))
    view = int(rng.integers(8))
    turned = Labels(dihedral_boxes(boxes, size_px, view), labels.classes)
    return np.ascontiguousarray(dihedral(tile, view)), turned


def read_labels(path: Path, mapping: dict[str, str | None]) -> dict[str, Labels]:
    """COCO file -> labels by image name, categories renamed by `mapping`."""
    return read_boxes(path, {name: IGNORE if ours is None else CLASSES.index(ours) for name, ours in mapping.items()})


def targets(
    boxes: npt.NDArray[np.float64], classes: npt.NDArray[np.int64], size_px: int, spec: DetectSet
) -> tuple[F32, F32]:
    """Heat [K,h,w] and its loss weight [K,h,w] for boxes in tile px."""
    n = size_px // STRIDE
    heat = np.zeros((len(CLASSES), n, n), np.float32)
    weight = np.zeros_like(heat)
    if not spec.sparse:
        weight[[CLASSES.index(c) for c in spec.complete]] = 1.0
    centre: npt.NDArray[np.float64] = (np.arange(n, dtype=np.float64) + 0.5) * STRIDE
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    visible = [k for k in np.argsort(-areas) if visible_share(boxes[k], size_px) > 0]
    for k in visible:
        rows, columns = _cells(boxes[k], n, SIMD_NEAR if spec.sparse else 0.0)
        weight[:, rows, columns] = 1.0
    for k in visible:  # large boxes first, so that small ones on top of them win
        box = boxes[k]
        small = min(box[2] - box[0], box[3] - box[1]) < MIN_BOX_PX
        if classes[k] == IGNORE or small or visible_share(box, size_px) < 0.35:
            rows, columns = _cells(box, n, 0.0)
            weight[:, rows, columns] = 0.0
            continue
        _draw(heat[classes[k]], box, centre)
        # An object's own peak always counts, whatever ignore region overlaps it.
        weight[classes[k]][heat[classes[k]] == 1.0] = 1.0
    return heat, weight


def _cells(box: npt.NDArray[np.float64], n: int, grow: float) -> tuple[slice, slice]:
    """Heat-map cells under `box` grown by `grow` box sizes on each side."""
    dx, dy = (box[2] - box[0]) * grow, (box[3] - box[1]) * grow
    x0, x1 = np.floor((box[0] - dx) / STRIDE), np.ceil((box[2] + dx) / STRIDE)
    y0, y1 = np.floor((box[1] - dy) / STRIDE), np.ceil((box[3] + dy) / STRIDE)
    x0, x1, y0, y1 = (int(min(max(v, 0), n)) for v in (x0, x1, y0, y1))
    return slice(y0, y1), slice(x0, x1)


def _draw(heat: F32, box: npt.NDArray[np.float64], centre: npt.NDArray[np.float64]) -> None:
    """Add one box: an elliptic Gaussian with a peak of exactly 1."""
    x0, y0, x1, y1 = box
    last = len(centre) - 1
    jx = int(np.clip((x0 + x1) / 2 // STRIDE, 0, last))
    jy = int(np.clip((y0 + y1) / 2 // STRIDE, 0, last))
    sx = max((x1 - x0) * GAUSSIAN_ALPHA / 6, STRIDE * 0.5)
    sy = max((y1 - y0) * GAUSSIAN_ALPHA / 6, STRIDE * 0.5)
    gx = np.exp(-0.5 * ((centre - centre[jx]) / sx) ** 2)
    gy = np.exp(-0.5 * ((centre - centre[jy]) / sy) ** 2)
    np.maximum(heat, (gy[:, None] * gx[None]).astype(np.float32), out=heat)
