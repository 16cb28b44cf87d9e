"""Objects for a head that is asked by words or by examples: kinds, the queries that mean them, and targets per kind.

Five sets name their objects at different depths (``airplane`` here, ``fighter`` there), so every label is a *kind*, and
a query says which kinds it means, and for which it cannot tell. Shapes: F kinds, h, w cells of STRIDE tile pixels.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edge_rsvlm.export.default.data.augment import degraded
from edge_rsvlm.export.default.data.images import ImageStore, open_store
from edge_rsvlm.export.default.data.labels import (
    GAUSSIAN_ALPHA,
    IGNORE,
    MIN_BOX_PX,
    NEAR_OBJECTS,
    Labels,
    random_box,
    read_boxes,
    visible_share,
)
from edge_rsvlm.export.default.data.views import RGB_BANDS, U8_RANGE, cut, dihedral, dihedral_boxes, jitter
from edge_rsvlm.export.default.model.boxes import STRIDE
from edge_rsvlm.export.default.splits import held_out

F32 = npt.NDArray[np.float32]
PLANES = ("airplane", "airliner", "propeller", "trainer", "chartered", "fighter")
TRUCKS = ("truck", "long vehicle", "stair truck", "pushback truck")
KINDS = (*PLANES, "helicopter", "boat", "car", "van", *TRUCKS)
GENERAL = {"airplane": PLANES, "truck": TRUCKS}
"""Kinds that a set uses where others are finer: one of them may be any of these."""
MOST_SCALE = 1.5
NEAR = 0.75
"""Where a set labels some of its objects only, background is trusted within so many box sizes of a labelled one."""


@dataclass(frozen=True)
class Query:
    """Words for the same thing, the first of which names it, and the kinds it means."""

    words: tuple[str, ...]
    kinds: tuple[str, ...]

    @property
    def unsure(self) -> tuple[str, ...]:
        """Kinds that may or may not be meant: a general one, where the query is for a finer one."""
        return tuple(g for g, finer in GENERAL.items() if g not in self.kinds and set(self.kinds) & set(finer))


QUERIES = (
    Query(("airplane", "plane", "aircraft", "airplanes", "planes"), PLANES),
    Query(("airliner", "passenger plane", "airliners", "large airplane"), ("airliner",)),
    Query(("propeller plane", "propeller aircraft", "propeller planes"), ("propeller",)),
    Query(("trainer plane", "trainer aircraft"), ("trainer",)),
    Query(("business jet", "chartered plane", "private plane"), ("chartered",)),
    Query(("fighter", "fighter jet", "military plane", "fighters"), ("fighter",)),
    Query(("helicopter", "helicopters"), ("helicopter",)),
    Query(("boat", "ship", "boats", "ships", "vessel", "yacht"), ("boat",)),
    Query(("vehicle", "vehicles"), ("car", "van", *TRUCKS)),
    Query(("car", "cars", "automobile"), ("car",)),
    Query(("van", "vans"), ("van",)),
    Query(("truck", "trucks", "lorry"), TRUCKS),
    Query(("long vehicle", "trailer", "semi trailer"), ("long vehicle",)),
)
CLASSES = ("airplane", "helicopter", "boat", "car", "truck", "van")
"""What is looked for when nothing is named: the names of these queries."""


@dataclass(frozen=True)
class ObjectSet:
    """What a set's labels mean: category -> kind (None: an ignore region). ``kinds`` are those of which it labels
    every object, so that what is unlabelled is background; where ``sparse``, only near labelled objects. Its images
    are shown down to ``least_scale``: those of 0.1 m per pixel also as those of 0.4 m.

    Buses are never learnt: they show whether examples find what words were not taught.
    """

    name: str
    images: str
    mapping: dict[str, str | None]
    kinds: tuple[str, ...]
    sparse: bool = False
    weight: float = 1.0
    least_scale: float = 0.5


SIMD: dict[str, str | None] = {
    **{name: name for name in ("car", "van", "helicopter", "boat", "truck", *PLANES[1:])},
    "longvehicle": "long vehicle", "stairtruck": "stair truck", "pushbacktruck": "pushback truck",
    "bus": None, "other": None,
}  # fmt: skip
DRONE: dict[str, str | None] = {"car": "car", "truck": "truck", "minibus": "van", "bus": None, "cyclist": None}
AIRPLANE: dict[str, str | None] = {"airplane": "airplane"}
SETS = (
    ObjectSet("hrplanes", "train.tar", AIRPLANE, PLANES, weight=0.25),
    ObjectSet(
        "airbus_aircraft", "train", AIRPLANE | {"truncated airplane": None}, PLANES, weight=0.25, least_scale=0.3
    ),
    ObjectSet("aerial_airport", "train.tar", AIRPLANE, PLANES, weight=0.12),
    ObjectSet("simd", "train.tar", SIMD, KINDS, sparse=True, weight=0.3, least_scale=0.25),
    ObjectSet("drone_vehicles", "train", DRONE, KINDS, weight=0.12, least_scale=0.2),
)


@dataclass(frozen=True)
class Targets:
    """``heat`` [F,h,w]: Gaussians around the centres of each kind. ``trust`` [F,h,w]: where it is known whether there
    is one of the kind. ``sides`` [4,h,w] in tile px and their weight [h,w]. ``peaks`` [n,3]: kind, row, column of
    every object."""

    heat: F32
    trust: npt.NDArray[np.bool_]
    sides: F32
    sides_weight: F32
    peaks: npt.NDArray[np.int64]


@dataclass
class ObjectData:
    """Random crops of one set, without the images named in ``exclude``."""

    spec: ObjectSet
    data_root: Path
    cache_dir: Path
    exclude: frozenset[str] = frozenset()
    store: ImageStore = field(init=False)
    labels: dict[str, Labels] = field(init=False)

    def __post_init__(self) -> None:
        folder = self.data_root / self.spec.name
        self.store = open_store(folder / self.spec.images, self.cache_dir, self.spec.name)
        numbers = {name: IGNORE if kind is None else KINDS.index(kind) for name, kind in self.spec.mapping.items()}
        self.labels = read_boxes(folder / "train.json", numbers)
        self.names = [name for name in self.labels if name not in self.exclude]

    def sample(self, rng: np.random.Generator, size_px: int) -> tuple[F32, Targets]:
        """A tile [5,size,size], turned, scaled, lit and degraded at random, and its targets."""
        tile, labels = self.crop(self.names[rng.integers(len(self.names))], rng, size_px)
        return degraded(rng, tile), targets(labels.boxes, labels.classes, size_px, self.spec)

    def crop(self, name: str, rng: np.random.Generator, size_px: int, near: float = NEAR_OBJECTS) -> tuple[F32, Labels]:
        """A tile of this image, turned, scaled and lit at random, and all of its labels in tile px: they may lie
        outside. ``near`` is the share of tiles around an object."""
        image, labels = self.store[name], self.labels[name]
        scale = float(np.exp(rng.uniform(np.log(self.spec.least_scale), np.log(MOST_SCALE))))
        box = random_box(rng, image.shape[:2], labels, size_px / scale, near)
        tile = cut(image, box, (size_px, size_px), RGB_BANDS, U8_RANGE, jitter(rng, 0.18, 0.05, 0.04))
        boxes = (labels.boxes - [box[0], box[1], box[0], box[1]]) * (size_px / (box[2] - box[0]))
        view = int(rng.integers(8))
        turned = Labels(dihedral_boxes(boxes, size_px, view), labels.classes)
        return np.ascontiguousarray(dihedral(tile, view)), turned


def empty_targets(size_px: int) -> Targets:
    """Nothing is there, and nothing is known."""
    n = size_px // STRIDE
    return Targets(
        np.zeros((len(KINDS), n, n), np.float32),
        np.zeros((len(KINDS), n, n), np.bool_),
        np.ones((4, n, n), np.float32),
        np.zeros((n, n), np.float32),
        np.zeros((0, 3), np.int64),
    )


def targets(
    boxes_xyxy: npt.NDArray[np.float64], kinds: npt.NDArray[np.int64], size_px: int, spec: ObjectSet
) -> Targets:
    """Of boxes [n,4] in tile px, which may lie outside of it, with their kinds [n]."""
    n, made = size_px // STRIDE, empty_targets(size_px)
    if not spec.sparse:
        made.trust[[KINDS.index(kind) for kind in spec.kinds]] = True
    areas = np.prod(boxes_xyxy[:, 2:] - boxes_xyxy[:, :2], axis=1)
    shown = [k for k in np.argsort(-areas) if visible_share(boxes_xyxy[k], size_px) > 0]
    if spec.sparse:
        for k in shown:
            rows, cols = _cells(boxes_xyxy[k], n, NEAR)
            made.trust[:, rows, cols] = True
    peaks = []
    for k in shown:  # large boxes first, so that small ones on top of them win
        box, kind = boxes_xyxy[k], int(kinds[k])
        small = min(box[2] - box[0], box[3] - box[1]) < MIN_BOX_PX
        if kind == IGNORE or small or visible_share(box, size_px) < 0.35:
            rows, cols = _cells(box, n, 0.0)
            made.trust[:, rows, cols] = False
        else:
            peaks.append((kind, *_draw(made, kind, box)))
    found = np.array(peaks, np.int64).reshape(-1, 3)
    # An object's own peak always counts, whatever ignore region overlaps it.
    made.trust[found[:, 0], found[:, 1], found[:, 2]] = True
    return Targets(made.heat, made.trust, made.sides, made.sides_weight, found)


def _cells(box: npt.NDArray[np.float64], n: int, grow: float) -> tuple[slice, slice]:
    """Rows and columns of cells under ``box``, grown by ``grow`` box sizes on each side."""
    wide = np.tile(box[2:] - box[:2], 2) * [-grow, -grow, grow, grow]
    x0, y0, x1, y1 = np.clip((box + wide) / STRIDE, 0, n)
    return slice(int(y0), int(np.ceil(y1))), slice(int(x0), int(np.ceil(x1)))


def _draw(made: Targets, kind: int, box: npt.NDArray[np.float64]) -> tuple[int, int]:
    """Add an object: an elliptic Gaussian with a peak of exactly 1, and distances to its sides weighted by it.

    Returns the peak's row and column.
    """
    n = made.sides_weight.shape[0]
    col, row = (int(np.clip((box[i] + box[i + 2]) / 2 // STRIDE, 0, n - 1)) for i in (0, 1))
    rows, cols = _cells(box, n, 0.0)
    rows = slice(min(rows.start, row), max(rows.stop, row + 1))
    cols = slice(min(cols.start, col), max(cols.stop, col + 1))
    y, x = ((np.arange(part.start, part.stop) + 0.5) * STRIDE for part in (rows, cols))
    width, height = (max((box[i + 2] - box[i]) * GAUSSIAN_ALPHA / 6, STRIDE * 0.5) for i in (0, 1))
    g = np.exp(-0.5 * (((y - (row + 0.5) * STRIDE) / height)[:, None] ** 2
                       + ((x - (col + 0.5) * STRIDE) / width)[None] ** 2)).astype(np.float32)  # fmt: skip
    heat = made.heat[kind, rows, cols]
    np.maximum(heat, g, out=heat)
    inside = (x[None] > box[0]) & (x[None] < box[2]) & (y[:, None] > box[1]) & (y[:, None] < box[3]) & (g > 0.05)
    inside[row - rows.start, col - cols.start] = True
    away = np.broadcast_arrays(x[None] - box[0], y[:, None] - box[1], box[2] - x[None], box[3] - y[:, None])
    for side, distance in zip(made.sides[:, rows, cols], away, strict=True):
        # Those of a peak outside its box (the tile cuts the object) stay positive.
        side[inside] = np.maximum(distance, 0.5)[inside]
    # Each object weighs the same, whatever its size.
    made.sides_weight[rows, cols][inside] = (g / g[inside].sum())[inside]
    return row, col


def boxes_learnt(data_root: Path) -> dict[str, int]:
    """Boxes of training by CLASSES, small ones with them, in images that are not held out."""
    counts = dict.fromkeys(CLASSES, 0)
    class_of = {kind: query.words[0] for query in QUERIES if query.words[0] in CLASSES for kind in query.kinds}
    for spec in SETS:
        coco = json.loads((data_root / spec.name / "train.json").read_text())
        kinds = {c["id"]: spec.mapping[c["name"]] for c in coco["categories"]}
        out = held_out(spec.name)
        trained = {image["id"] for image in coco["images"] if image["file_name"] not in out}
        for box in coco["annotations"]:
            kind = kinds[box["category_id"]]
            if kind is not None and box["image_id"] in trained:
                counts[class_of[kind]] += 1
    return counts


def query_tables() -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Which kinds each query means, and for which it is unsure: two masks [Q,F]."""
    return _mask(tuple(q.kinds for q in QUERIES)), _mask(tuple(q.unsure for q in QUERIES))


def example_tables() -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """The same [F,F] for a query that is an example of each kind: of a general kind, the finer ones are unsure."""
    own = [(kind,) for kind in KINDS]
    unsure = [
        tuple(other for general, finer in GENERAL.items() for other in finer if kind in (general, *finer)
              and general in (kind, other) and other != kind)
        for kind in KINDS
    ]  # fmt: skip
    return _mask(own), _mask(unsure)


def _mask(groups: Sequence[Sequence[str]]) -> npt.NDArray[np.bool_]:
    return np.array([[kind in group for kind in KINDS] for group in groups])
