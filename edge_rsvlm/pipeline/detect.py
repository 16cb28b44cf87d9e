"""Detection over a scene of any size: boxes stream out as soon as no later tile can change them."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edge_rsvlm.errors import UsageError
from edge_rsvlm.geo import PixelMapper, box_ring, feature_geometry
from edge_rsvlm.merge.boxes import BoxMerger, concatenate, empty_boxes
from edge_rsvlm.pipeline.outcome import Emit, Outcome
from edge_rsvlm.pipeline.runtime import Pace, Runtime, detect_task
from edge_rsvlm.pipeline.stream import TileBatch, View, scene_batches
from edge_rsvlm.tasks.encode import encode
from edge_rsvlm.types import Boxes


@dataclass(frozen=True)
class DetectQuery:
    """Which objects are wanted. ``labels`` empty: all that the bundle knows."""

    labels: tuple[str, ...] = ()
    score_threshold: float | None = None


def wanted_classes(query: DetectQuery, classes: Sequence[str]) -> set[int]:
    """Class indices of the query; UsageError names the nearest known word of one outside the vocabulary."""
    for label in query.labels:
        if label not in classes:
            near = difflib.get_close_matches(label, classes, n=1, cutoff=0.4)
            hint = f"did you mean '{near[0]}'? " if near else ""
            raise UsageError(f"'{label}' is not in this bundle's vocabulary", fix=f"{hint}known: {', '.join(classes)}")
    return {i for i, name in enumerate(classes) if not query.labels or name in query.labels}


def detect(runtime: Runtime, view: View, query: DetectQuery, pace: Pace, emit: Emit) -> Outcome:
    """Emit every object of the view's raster: ``{"label", "score", "box"}``, box x, y, w, h in raster pixels."""
    task, outcome = detect_task(runtime.manifest), Outcome()
    wanted = wanted_classes(query, task.classes)
    mapper = PixelMapper(view.rasters[0].georeference)
    outcome.warnings += [*view.warnings, *([mapper.warning] if mapper.warning else [])]
    detector = runtime.detector(query.score_threshold)
    merger = BoxMerger(task.nms_iou)

    def release(boxes: Boxes) -> None:
        for xyxy, score, label in zip(boxes.xyxy_N4, boxes.scores_N, boxes.labels_N, strict=True):
            x0, y0, x1, y1 = (round(float(v), 2) for v in xyxy)
            box = [x0, y0, round(x1 - x0, 2), round(y1 - y0, 2)]
            record = {"label": task.classes[label], "score": round(float(score), 4), "box": box}
            emit(record, feature_geometry([box_ring(xyxy)], mapper))

    with scene_batches(view, pace, outcome) as source:
        for tiles in source:
            with outcome.clock("engine"):
                kept = np.flatnonzero(tiles.valid_fraction_N > 0)
                found = []
                if len(kept):
                    features = encode(runtime.encoder, tiles.tiles_NCHW[0][kept], task.encoder_outputs)
                    found = detector(features)
            with outcome.clock("merge"):
                owned = [
                    _owned(boxes, tiles, int(n), view, task.stride, wanted)
                    for n, boxes in zip(kept, found, strict=True)
                ]
                release(merger.feed(concatenate([empty_boxes(), *owned]), tiles.frontier_row))
    with outcome.clock("merge"):
        release(merger.flush())
    return outcome


def _owned(boxes: Boxes, tiles: TileBatch, n: int, view: View, margin_px: int, wanted: set[int]) -> Boxes:
    """Boxes in raster pixels of the objects whose centre tile ``n`` owns.

    Two tiles place the centre of one object a little differently, so each takes what lies up to ``margin_px`` tile
    pixels beyond its core: none is lost on the border, and suppression removes the second.
    """
    tile, core = tiles.boxes_N4[n], tiles.cores_N4[n]
    scale = (tile[2:] - tile[:2]) / view.spec.tile_px
    limit = np.concatenate([np.maximum(tile[:2], 0), np.minimum(tile[2:], view.size)])
    xyxy = boxes.xyxy_N4 * np.tile(scale, 2) + np.tile(tile[:2], 2)
    xyxy = np.clip(xyxy, np.tile(limit[:2], 2), np.tile(limit[2:], 2))
    centre = (xyxy[:, :2] + xyxy[:, 2:]) / 2
    inside = (centre >= core[:2] - margin_px * scale) & (centre < core[2:] + margin_px * scale)
    keep = inside.all(axis=1) & np.isin(boxes.labels_N, sorted(wanted))
    keep &= (xyxy[:, 2:] - xyxy[:, :2] > 0).all(axis=1)
    return Boxes(xyxy[keep], boxes.scores_N[keep], boxes.labels_N[keep])
