"""Where to cut scores: the threshold of greatest F1 on augmented crops of *training* images, at steps of 0.05.

Held-out images are for reporting alone. Augmentation keeps training crops from being as easy as the images learnt.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from edge_rsvlm import scoring
from edge_rsvlm.export.data.change import ChangeData, training_pairs
from edge_rsvlm.export.data.detect import SETS, DetectData, Labels, crop
from edge_rsvlm.export.model.detect import CLASSES
from edge_rsvlm.export.splits import held_out
from edge_rsvlm.merge.boxes import BoxMerger
from edge_rsvlm.pipeline.runtime import Runtime, detect_task
from edge_rsvlm.scoring import Found, Truth
from edge_rsvlm.tasks.encode import encode
from edge_rsvlm.types import Boxes

GRID = np.round(np.arange(0.2, 0.75, 0.05), 2)
LEAST_SCORE = 0.1
CROPS = 160
CROP_PX = 512
LABELLED = ("hrplanes", "airbus_aircraft", "aerial_airport")
"""Sets whose airplanes are all labelled; the other classes share the threshold."""


def change_threshold(runtime: Runtime, data: Path) -> float:
    task = runtime.manifest.tasks.change
    assert task is not None
    pairs, rng = ChangeData(training_pairs(data)), np.random.default_rng(0)
    counts = np.zeros((len(GRID), 3), np.int64)
    for _ in range(CROPS):
        example = pairs.sample(rng, task.input.tile_px)
        dates = [encode(runtime.encoder, tile[None], task.encoder_outputs) for tile in (example.before, example.after)]
        probability, changed = runtime.change_detector(*dates)[0], example.mask > 0.5
        for i, threshold in enumerate(GRID):
            mask = np.where(example.mask < 0, scoring.UNKNOWN, probability >= threshold).astype(np.uint8)
            counts[i] += scoring.change_counts(mask, changed)
    return _best(counts)


def detect_threshold(runtime: Runtime, data: Path, cache: Path) -> float:
    task, rng = detect_task(runtime.manifest), np.random.default_rng(0)
    detector = runtime.detector(LEAST_SCORE)
    sets = [DetectData(spec, data, cache, held_out(spec.name)) for spec in SETS if spec.name in LABELLED]
    truth: list[list[Truth]] = []
    found: list[list[Found]] = []
    for i in range(CROPS):
        tile, labels = crop(sets[i % len(sets)], rng, CROP_PX)
        (boxes,) = detector(encode(runtime.encoder, tile[None], task.encoder_outputs))
        truth.append(_truth(labels))
        merger = BoxMerger(task.nms_iou)
        merger.feed(boxes, 0.0)
        found.append(_found(merger.flush()))
    matches = scoring.match_detections(truth, found, ["airplane"])["airplane"]
    return _best(np.array([matches.counts(threshold).sum(axis=0) for threshold in GRID]))


def _truth(labels: Labels) -> list[Truth]:
    """Boxes in the crop; what lies half outside, or is marked as ignored, counts neither way."""
    rows = []
    for (x0, y0, x1, y1), label in zip(labels.boxes, labels.classes, strict=True):
        w, h = min(x1, CROP_PX) - max(x0, 0), min(y1, CROP_PX) - max(y0, 0)
        if w > 0 and h > 0:
            whole = label >= 0 and w * h > 0.5 * (x1 - x0) * (y1 - y0)
            rows.append(Truth("airplane", (max(x0, 0.0), max(y0, 0.0), w, h), ignore=not whole))
    return rows


def _found(boxes: Boxes) -> list[Found]:
    rows: Any = zip(boxes.xyxy_N4, boxes.scores_N, boxes.labels_N, strict=True)
    return [Found(CLASSES[label], float(score), (x0, y0, x1 - x0, y1 - y0)) for (x0, y0, x1, y1), score, label in rows]


def _best(counts_G3: np.ndarray) -> float:
    return float(GRID[int(scoring.rates(counts_G3)[:, 2].argmax())])
