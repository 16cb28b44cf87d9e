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
from edge_rsvlm.pipeline.runtime import Runtime
from edge_rsvlm.pipeline.stream import TileBatch, View
from edge_rsvlm.tasks.encode import Features, encode

MOST_LABELS = 64
"""Bounds what the scores of one tile take."""
EXPERIMENTAL = "segmentation by this bundle was measured and is not yet to be relied on"
Shares = list[tuple[str, float]]


@dataclass
class SegmentOutcome(Outcome):
    """``labels`` with their share of the valid area, the largest first."""

    labels: Shares = field(default_factory=list)


class Segments:
    """A consumer that emits ``{"label", "score", "area_m2", "area_px", "polygon"}`` per region of one label.

    A region's score is the mean over its pixels, its polygon is in raster pixels. Rows of the mask are 0 where there is
    no label, or nothing valid, and k for the k-th of ``labels``. UsageError for more labels than MOST_LABELS.
    """

    def __init__(
        self,
        runtime: Runtime,
        task: SegmentTask,
        view: View,
        labels: Sequence[str],
        emit: Emit,
        mask_rows: MaskRows | None = None,
    ) -> None:
        if len(labels) > MOST_LABELS:
            problem = f"{len(labels)} labels, and a mask takes {MOST_LABELS}"
            raise UsageError(problem, fix="ask for some of them at a time")
        self.outcome = SegmentOutcome(warnings=[EXPERIMENTAL] if task.experimental else [])
        self._runtime, self._task, self._view, self._labels = runtime, task, view, labels
        self._mask_rows = mask_rows
        self._canvas = Canvas(*view.size, planes=2)
        self._regions = RegionRecords(
            view.size[0],
            (task.min_area_px, task.min_area_m2),
            mapper_of(view, self.outcome),
            emit,
            lambda value: {"label": labels[value - 1]},
        )
        self._pixels_K = np.zeros(len(labels) + 1, np.int64)

    def feed(self, tiles: TileBatch) -> None:
        kept = np.flatnonzero(tiles.valid_fraction_N > 0)
        if len(kept):
            with self.outcome.clock("engine"):
                segmenter = self._runtime.segmenter(self._task, self._labels)
                embeddings_NDhw = segmenter.embeddings(self._features(tiles, kept))
            with self.outcome.clock("merge"):
                for n, embeddings_Dhw in zip(kept, embeddings_NDhw, strict=True):
                    self._paint(tiles, int(n), segmenter.scores(embeddings_Dhw))
        with self.outcome.clock("merge"):
            self._finish_rows(np.floor(tiles.frontier_row))

    def finish(self) -> None:
        with self.outcome.clock("merge"):
            self._finish_rows(self._view.size[1])
            self._regions.finish()
        self.outcome.labels = _shares(self._labels, self._pixels_K)

    def _features(self, tiles: TileBatch, kept: Kept) -> Features:
        encoder = self._runtime.open(self._task.encoder)
        return encode(encoder, tiles.dates[0].pixels_NCHW(kept), self._task.encoder_outputs)

    def _paint(self, tiles: TileBatch, n: int, scores_Khw: NDArray[np.float32]) -> None:
        """Put onto the canvas the best label and its score of the raster pixels whose centres tile ``n`` owns."""
        for part in owned_parts(tiles, n, self._view, self._task.stride, STRIP_PIXELS // len(scores_Khw)):
            scores_KHW = sample(scores_Khw, part.x_W, part.y_H)
            best_HW, score_HW = scores_KHW.argmax(axis=0), scores_KHW.max(axis=0)
            value_HW = np.where(score_HW >= self._task.threshold, best_HW + 1, 0).astype(np.uint8)
            self._canvas.paint(part.col, part.row, np.stack([value_HW, levels(score_HW)]), part.valid_HW)

    def _finish_rows(self, until: float) -> None:
        for first, (value_HW, levels_HW) in strips(*self._canvas.take(until)):
            known = value_HW != UNKNOWN
            mask_HW = np.where(known, value_HW, np.uint8(0))
            self._pixels_K += np.bincount(value_HW[known], minlength=len(self._pixels_K))
            self._regions.feed(first, mask_HW, levels_HW)
            if self._mask_rows:
                self._mask_rows(first, mask_HW)


def _shares(labels: Sequence[str], pixels_K: NDArray[np.int64]) -> Shares:
    """Of the valid area; ``pixels_K`` begins with those of no label."""
    share_K = pixels_K[1:] / max(int(pixels_K.sum()), 1)
    return [(labels[k], round(float(share_K[k]), 4)) for k in np.argsort(-share_K, kind="stable")]
