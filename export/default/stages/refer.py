"""Stage 6: which of the found objects a phrase means. It needs no pixels: layouts of labelled objects, disturbed as a
detector errs, and phrases that rules make of them.

Shapes: N layouts, C objects, F features.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from edge_rsvlm.export import artifact
from edge_rsvlm.export.default.data.labels import read_boxes
from edge_rsvlm.export.default.data.objects import CLASSES, KINDS, QUERIES, SETS
from edge_rsvlm.export.default.data.phrases import NAMES, Objects, Phrase, phrases
from edge_rsvlm.export.default.loop import ahead, device, train
from edge_rsvlm.export.default.model.refer import Refer
from edge_rsvlm.export.default.splits import held_out
from edge_rsvlm.export.default.stages import features
from edge_rsvlm.export.default.stages.match import tokens
from edge_rsvlm.tasks.refer import describe, feature_count
from edge_rsvlm.types import Boxes

NAME = "refer"
DEFAULTS: dict[str, Any] = {
    "minutes": 12.0,
    "layouts": 64,
    "made_up": 0.5,
    "absent": 0.1,
    "rate": 1e-3,
    "dropout": 0.1,
    "seed": 0,
}
"""``absent``: share of phrases that mean nothing in the layout."""
MOST_OBJECTS = 48
MISSED, INVENTED, CONFUSED, SHIFT = 0.04, 0.04, 0.03, 0.05
"""How a detector errs: shares of objects missed, added, called another kind; boxes are off by this share of them."""
CLASS_OF = {kind: CLASSES.index(q.words[0]) for q in QUERIES if q.words[0] in CLASSES for kind in q.kinds}
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Layout:
    """Boxes [n,4] as shares of the image's longer side, numbers of CLASSES [n], and the image's size (1 at most)."""

    boxes: npt.NDArray[np.float64]
    classes: npt.NDArray[np.int64]
    size: tuple[float, float]


def run(data: Path, work: Path, config: dict[str, Any], backbone: artifact.Artifact) -> artifact.Artifact:
    """Train; ``backbone`` says which scenes are not read, for the tokenizer that all stages have."""
    config = DEFAULTS | config
    digest = artifact.stage_hash(NAME, config, [backbone])
    if found := artifact.find(work / NAME, digest):
        return found
    torch.manual_seed(config["seed"])
    tokenizer = features.tokenizer(data, work, backbone)
    model = Refer(tokenizer.get_vocab_size(), feature_count(len(CLASSES)), config["dropout"]).to(device()).train()
    batches = ahead(BatchMaker(layouts(data), tokenizer, config, np.random.default_rng(config["seed"])), depth=4)
    state, metrics = train(
        model, [{"params": list(model.parameters()), "lr": config["rate"]}],
        lambda _: {"refer": loss(model, next(batches))},
        minutes=config["minutes"], checkpoint=work / f"{NAME}-{digest[:12]}.pt",
    )  # fmt: skip
    return artifact.write(work / NAME, NAME, digest, config, metrics, state)


def layouts(data: Path) -> list[Layout]:
    """Of the training images of every set, without objects that have no name here."""
    found = []
    for spec in SETS:
        numbers = {name: -1 if kind is None else KINDS.index(kind) for name, kind in spec.mapping.items()}
        sizes = _sizes(data / spec.name / "train.json")
        for name, labels in read_boxes(data / spec.name / "train.json", numbers).items():
            known = labels.classes >= 0
            if name not in held_out(spec.name) and known.any():
                longest = max(sizes[name])
                classes = np.array([CLASS_OF[KINDS[k]] for k in labels.classes[known]])
                size = (sizes[name][0] / longest, sizes[name][1] / longest)
                found.append(Layout(labels.boxes[known] / longest, classes, size))
    return found


def _sizes(annotations: Path) -> dict[str, tuple[int, int]]:
    images = json.loads(annotations.read_text())["images"]
    return {i["file_name"]: (i["width"], i["height"]) for i in images}


@dataclass
class BatchMaker:
    """Layouts with a phrase each, and which of the found objects it means."""

    layouts: list[Layout]
    tokenizer: Any
    config: dict[str, Any]
    rng: np.random.Generator

    def __call__(self) -> Batch:
        rows: list[tuple[str, npt.NDArray[np.float32], npt.NDArray[np.bool_]]] = []
        while len(rows) < self.config["layouts"]:
            row = self._row(self._made_up() if self.rng.random() < self.config["made_up"] else self._part())
            if row is not None:
                rows.append(row)
        most = max(len(described) for _, described, _ in rows)
        objects = np.zeros((len(rows), most, rows[0][1].shape[1]), np.float32)
        mask, meant = np.zeros((2, len(rows), most), np.int64)
        for n, (_, described, true) in enumerate(rows):
            objects[n, : len(described)], mask[n, : len(described)], meant[n, : len(true)] = described, 1, true
        return {
            **tokens(self.tokenizer, [words for words, _, _ in rows]),
            "objects": torch.from_numpy(objects),
            "objects_mask": torch.from_numpy(mask),
            "meant": torch.from_numpy(meant),
        }

    def _part(self) -> Layout:
        """A window of an image, turned or mirrored at random."""
        whole = self.layouts[int(self.rng.integers(len(self.layouts)))]
        share = float(self.rng.uniform(0.3, 1.0))
        width, height = whole.size[0] * share, whole.size[1] * share
        around = whole.boxes[int(self.rng.integers(len(whole.boxes)))]
        x = float(np.clip(around[0] - self.rng.uniform(0, width), 0, whole.size[0] - width))
        y = float(np.clip(around[1] - self.rng.uniform(0, height), 0, whole.size[1] - height))
        boxes = whole.boxes - [x, y, x, y]
        inside = ((boxes[:, :2] >= 0) & (boxes[:, 2:] <= [width, height])).all(axis=1)
        return self._flipped(Layout(boxes[inside], whole.classes[inside], (width, height)))

    def _flipped(self, layout: Layout) -> Layout:
        boxes, (width, height) = layout.boxes.copy(), layout.size
        if self.rng.random() < 0.5:
            boxes[:, [0, 2]] = width - boxes[:, [2, 0]]
        if self.rng.random() < 0.5:
            boxes[:, [1, 3]] = height - boxes[:, [3, 1]]
        if self.rng.random() < 0.5:
            boxes, width, height = boxes[:, [1, 0, 3, 2]], height, width
        return Layout(boxes, layout.classes, (width, height))

    def _made_up(self) -> Layout:
        """Objects of few kinds anywhere, few more often than many: real layouts repeat themselves."""
        count = int(np.exp(self.rng.uniform(0, np.log(MOST_OBJECTS + 1))))
        kinds = self.rng.choice(len(CLASSES), int(self.rng.integers(1, 4)), replace=False)
        size = (1.0, float(self.rng.uniform(0.5, 1.0)))
        centre = self.rng.uniform(0.03, 0.97, (count, 2)) * size
        half = np.exp(self.rng.normal(np.log(0.03), 0.5, (count, 1)) + self.rng.normal(0, 0.2, (count, 2)))
        return Layout(np.hstack([centre - half, centre + half]), self.rng.choice(kinds, count), size)

    def _row(self, layout: Layout) -> tuple[str, npt.NDArray[np.float32], npt.NDArray[np.bool_]] | None:
        count = len(layout.boxes)
        if not 0 < count <= MOST_OBJECTS:
            return None
        phrase = self._absent(layout) if self.rng.random() < self.config["absent"] else self._phrase(layout)
        if phrase is None:
            return None
        kept = self.rng.random(count) >= MISSED
        if not kept[list(phrase.boxes)].all():
            return None
        true = np.zeros(count, np.bool_)
        true[list(phrase.boxes)] = True
        found, true = self._detected(layout, kept, true)
        return phrase.words, describe(found, layout.size, len(CLASSES)), true

    def _phrase(self, layout: Layout) -> Phrase | None:
        names = [str(self.rng.choice(NAMES[name])) for name in CLASSES]
        said = phrases(Objects(layout.boxes, [names[k] for k in layout.classes], layout.size))
        return said[int(self.rng.integers(len(said)))] if said else None

    def _absent(self, layout: Layout) -> Phrase | None:
        """A phrase for an object of another layout, whose kind is not in this one: it means none of these."""
        other = self._made_up()
        phrase = self._phrase(other)
        if phrase is None or other.classes[phrase.boxes[0]] in layout.classes:
            return None
        return Phrase(phrase.words, ())

    def _detected(
        self, layout: Layout, kept: npt.NDArray[np.bool_], true: npt.NDArray[np.bool_]
    ) -> tuple[Boxes, npt.NDArray[np.bool_]]:
        """What a detector might have found, and which of it is true."""
        boxes, classes, true = layout.boxes[kept], layout.classes[kept].copy(), true[kept]
        extent = np.tile(boxes[:, 2:] - boxes[:, :2], 2)
        boxes = boxes + self.rng.normal(0, SHIFT, boxes.shape) * extent
        confused = (self.rng.random(len(classes)) < CONFUSED) & ~true
        classes[confused] = self.rng.integers(len(CLASSES), size=int(confused.sum()))
        scores = self.rng.beta(5, 1.5, len(classes))
        extra = int((self.rng.random(len(classes)) < INVENTED).sum())
        if extra:
            centre = self.rng.uniform(0, 1, (extra, 2)) * layout.size
            half = extent[self.rng.integers(len(extent), size=extra), :2] / 2
            boxes = np.vstack([boxes, np.hstack([centre - half, centre + half])])
            classes = np.concatenate([classes, self.rng.integers(len(CLASSES), size=extra)])
            scores, true = np.concatenate([scores, self.rng.beta(2, 3, extra)]), np.pad(true, (0, extra))
        return Boxes(boxes, scores.astype(np.float32), classes), true


def loss(model: Refer, batch: Batch) -> Tensor:
    """Cross-entropy of each object: meant or not."""
    where = device()
    batch = {name: value.to(where) for name, value in batch.items()}
    with torch.autocast(where.type, torch.bfloat16):
        logits = model(batch["input_ids"], batch["attention_mask"], batch["objects"], batch["objects_mask"])
    known = batch["objects_mask"] == 1
    return F.binary_cross_entropy_with_logits(logits.float()[known], batch["meant"][known].float())
