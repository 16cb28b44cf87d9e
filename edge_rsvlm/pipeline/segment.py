"""Masks for words: the best label of each raster pixel, mask rows, and polygons as soon as they are complete."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from edge_rsvlm.config.task_specs import SegmentTask
from edge_rsvlm.errors import UsageError
from edge_rsvlm.pipeline.canvas import UNKNOWN, Canvas, levels, owned_parts, sample
from edge_rsvlm.pipeline.change import MaskRows
from edge_rsvlm.pipeline.outcome import Emit, Outcome
from edge_rsvlm.pipeline.per_tile import Kept, mapper_of
from edge_rsvlm.pipeline.polygons import STRIP_PIXELS, RegionRecords, strips
from edge_rsvlm.pipeline.runtime import Pace, Runtime
from edge_rsvlm.pipeline.stream import TileBatch, View, scene_batches
from edge_rsvlm.tasks.encode import encode
from edge_rsvlm.tasks.segment import Segmenter

MOST_LABELS = 64
"""Bounds what the scores of one tile take."""
EXPERIMENTAL = "segmentation by this bundle was measured and is not yet to be relied on"
Shares = list[tuple[str, float]]


@dataclass
class SegmentOutcome(Outcome):
    """``labels`` with their share of the valid area, the largest first."""

    labels: Shares = field(default_factory=list)


def segment(
    runtime: Runtime,
    task: SegmentTask,
    view: View,
    labels: Sequence[str],
    pace: Pace,
    emit: Emit,
    mask_rows: MaskRows | None = None,
) -> SegmentOutcome:
    """Emit ``{"label", "score", "area_m2", "area_px", "polygon"}`` per region of one label.

    A region's score is the mean over its pixels, its polygon is in raster pixels. Rows of the mask are 0 where there is
    no label, or nothing valid, and k for the k-th of ``labels``. UsageError for more labels than MOST_LABELS.
    """
    if len(labels) > MOST_LABELS:
        raise UsageError(f"{len(labels)} labels, and a mask takes {MOST_LABELS}", fix="ask for some of them at a time")
    outcome = SegmentOutcome(warnings=[EXPERIMENTAL] if task.experimental else [])
    canvas = Canvas(*view.size, planes=2)
    mapper, smallest = mapper_of(view, outcome), (task.min_area_px, task.min_area_m2)
    regions = RegionRecords(view.size[0], smallest, mapper, emit, lambda value: {"label": labels[value - 1]})
    pixels_K = np.zeros(len(labels) + 1, np.int64)

    def finish_rows(until: float) -> None:
        for first, (value_HW, levels_HW) in strips(*canvas.take(until)):
            known = value_HW != UNKNOWN
            mask_HW = np.where(known, value_HW, np.uint8(0))
            pixels_K[:] += np.bincount(value_HW[known], minlength=len(pixels_K))
            regions.feed(first, mask_HW, levels_HW)
            if mask_rows:
                mask_rows(first, mask_HW)

    with scene_batches(view, pace, outcome) as source:
        for tiles in source:
            kept = np.flatnonzero(tiles.valid_fraction_N > 0)
            if len(kept):
                with outcome.clock("engine"):
                    segmenter = runtime.segmenter(task, labels)
                    embeddings_NDhw = segmenter.embeddings(_features(runtime, task, tiles, kept))
                with outcome.clock("merge"):
                    for n, embeddings_Dhw in zip(kept, embeddings_NDhw, strict=True):
                        _paint(canvas, segmenter, task, tiles, int(n), embeddings_Dhw, view)
            with outcome.clock("merge"):
                finish_rows(np.floor(tiles.frontier_row))
    with outcome.clock("merge"):
        finish_rows(view.size[1])
        regions.finish()
    outcome.labels = _shares(labels, pixels_K)
    return outcome


def _features(runtime: Runtime, task: SegmentTask, tiles: TileBatch, kept: Kept) -> dict[str, NDArray[np.float32]]:
    return encode(runtime.open(task.encoder), tiles.dates[0].pixels_NCHW(kept), task.encoder_outputs)


def _paint(
    canvas: Canvas,
    segmenter: Segmenter,
    task: SegmentTask,
    tiles: TileBatch,
    n: int,
    embeddings_Dhw: NDArray[np.float32],
    view: View,
) -> None:
    """Put onto the canvas the best label and its score of the raster pixels whose centres tile ``n`` owns."""
    scores_Khw = segmenter.scores(embeddings_Dhw)
    for part in owned_parts(tiles, n, view, task.stride, STRIP_PIXELS // len(scores_Khw)):
        scores_KHW = sample(scores_Khw, part.x_W, part.y_H)
        best_HW, score_HW = scores_KHW.argmax(axis=0), scores_KHW.max(axis=0)
        value_HW = np.where(score_HW >= task.threshold, best_HW + 1, 0).astype(np.uint8)
        canvas.paint(part.col, part.row, np.stack([value_HW, levels(score_HW)]), part.valid_HW)


def _shares(labels: Sequence[str], pixels_K: NDArray[np.int64]) -> Shares:
    """Of the valid area; ``pixels_K`` begins with those of no label."""
    share_K = pixels_K[1:] / max(int(pixels_K.sum()), 1)
    return [(labels[k], round(float(share_K[k]), 4)) for k in np.argsort(-share_K, kind="stable")]
