"""Boxes over a scene of any size: they stream out as soon as no later tile can change them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from edge_rsvlm.geo import box_ring, feature_geometry
from edge_rsvlm.merge.boxes import BoxMerger, concatenate, empty_boxes
from edge_rsvlm.pipeline.outcome import Emit, Outcome
from edge_rsvlm.pipeline.per_tile import Kept, mapper_of
from edge_rsvlm.pipeline.stream import TileBatch, View
from edge_rsvlm.types import Boxes

Find = Callable[[TileBatch, Kept], Sequence[Boxes]]
"""Boxes of the kept tiles of a batch, in pixels of what the model sees of each."""
Describe = Callable[[float, int], dict[str, Any]]
"""From score and label of a box to what its record says beside ``box``."""
Use = Callable[[Boxes], None]
"""Of boxes in raster pixels, when they are final."""


class SceneBoxes:
    """A consumer that will ``use`` every box that suppression over the whole scene keeps; see ``_owned`` for
    ``margin_px``. ``conclude`` runs when all boxes were used."""

    def __init__(
        self,
        view: View,
        find: Find,
        use: Use,
        outcome: Outcome,
        *,
        nms_iou: float,
        margin_px: float,
        conclude: Callable[[], None] = lambda: None,
    ) -> None:
        self.outcome = outcome
        self._view, self._find, self._use, self._conclude = view, find, use, conclude
        self._margin_px, self._merger = margin_px, BoxMerger(nms_iou)

    def feed(self, tiles: TileBatch) -> None:
        kept = np.flatnonzero(tiles.valid_fraction_N > 0)
        with self.outcome.clock("engine"):
            found = self._find(tiles, kept) if len(kept) else []
        with self.outcome.clock("merge"):
            pairs = zip(kept, found, strict=True)
            owned = [_owned(boxes, tiles, int(n), self._view, self._margin_px) for n, boxes in pairs]
            self._use(self._merger.feed(concatenate([empty_boxes(), *owned]), tiles.frontier_row))

    def finish(self) -> None:
        with self.outcome.clock("merge"):
            self._use(self._merger.flush())
        self._conclude()


def emitting(view: View, describe: Describe, emit: Emit, outcome: Outcome) -> Use:
    """A use of boxes: each is emitted with what ``describe`` says of it; box x, y, w, h in raster pixels."""
    mapper = mapper_of(view, outcome)

    def use(boxes: Boxes) -> None:
        for xyxy, score, label in zip(boxes.xyxy_N4, boxes.scores_N, boxes.labels_N, strict=True):
            x0, y0, x1, y1 = (round(float(v), 2) for v in xyxy)
            box = [x0, y0, round(x1 - x0, 2), round(y1 - y0, 2)]
            geometry = feature_geometry([box_ring(xyxy)], mapper)
            emit({**describe(float(score), int(label)), "box": box}, geometry)

    return use


def _owned(boxes: Boxes, tiles: TileBatch, n: int, view: View, margin_px: float) -> Boxes:
    """Boxes in raster pixels of the objects whose centre tile ``n`` owns.

    Two tiles place the centre of one object a little differently, so each takes what lies up to ``margin_px`` tile
    pixels beyond its core: none is lost on the border, and suppression removes the second.
    """
    tile, core = tiles.boxes_N4[n], tiles.cores_N4[n]
    margin = margin_px * (tile[2:] - tile[:2]) / view.spec.tile_px
    limit = np.concatenate([np.maximum(tile[:2], 0), np.minimum(tile[2:], view.size)])
    xyxy = np.clip(tiles.to_raster(n, boxes.xyxy_N4), np.tile(limit[:2], 2), np.tile(limit[2:], 2))
    centre = (xyxy[:, :2] + xyxy[:, 2:]) / 2
    keep = ((centre >= core[:2] - margin) & (centre < core[2:] + margin)).all(axis=1)
    keep &= (xyxy[:, 2:] - xyxy[:, :2] > 0).all(axis=1)
    return Boxes(xyxy[keep], boxes.scores_N[keep], boxes.labels_N[keep])
