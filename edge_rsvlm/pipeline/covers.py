"""What covers the ground inside a region, on one date: labels of the ``segment`` task, or "unknown".

A label is what its scores are on average over the region's pixels. Tiles lie on a lattice of a quarter of their side,
so that regions near each other are seen in one, and none depends on which came first. Letters: K labels, W words for
them, of which the best counts.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from affine import Affine
from numpy.typing import NDArray

from edge_rsvlm.bundle import Bundle
from edge_rsvlm.config.cover import COVER, UNKNOWN
from edge_rsvlm.config.task_specs import SegmentTask
from edge_rsvlm.geo import metres_per_pixel
from edge_rsvlm.pipeline.cut import cut
from edge_rsvlm.pipeline.looks import Polygon, filled, middle
from edge_rsvlm.pipeline.outcome import Outcome
from edge_rsvlm.pipeline.runtime import Runtime
from edge_rsvlm.pipeline.scaling import Scaling, scalings
from edge_rsvlm.pipeline.stream import View
from edge_rsvlm.pipeline.vocabulary import understood
from edge_rsvlm.tasks.encode import encode
from edge_rsvlm.types import Georeference

LEAST_MARGIN = 0.2
"""Between the best label and the next. Chosen with the task's own threshold on aerial images that were trained on, by
how green ground is that is called trees, and how bare what is called otherwise: nine in ten agree, and a quarter of the
ground has a label."""
LEAST_SHARE = 0.25
"""Of the region's pixels that the tile must see."""
COARSER = 1.25
"""Pixels so many times coarser than the task was trained for show other things than it knows: of 1.5 m, where it knew
1 m, houses were called trees. Finer pixels are brought to what it knows."""
TILES_KEPT = 8
LATTICE = 4
"""Steps per side of a tile."""
Scores = NDArray[np.float32]


def cover_labels(bundle: Bundle) -> tuple[str, ...]:
    """The ground that a bundle can tell apart, of COVER; none without a ``segment`` task."""
    if bundle.manifest.tasks.segment is None:
        return ()
    labels = tuple(label for label, words in COVER.items() if len(understood(bundle, "segment", words)) == len(words))
    return labels if len(labels) > 1 else ()


def too_coarse(task: SegmentTask, georeference: Georeference) -> bool:
    """Whether the ground resolution is coarser than the task was trained for, or unknown where that matters."""
    if task.input.resolution_m is None:
        return False
    metres = metres_per_pixel(georeference)
    return metres is None or math.sqrt(metres[0] * metres[1]) > COARSER * task.input.resolution_m[1]


@dataclass
class Covers:
    """Labels of regions of one raster, as ``view`` (of the segment task) sees it."""

    runtime: Runtime
    task: SegmentTask
    view: View
    labels: Sequence[str]
    threads: int
    _scaling: Scaling | None = None
    _tiles: OrderedDict[tuple[float, ...], tuple[Scores, Affine]] = field(default_factory=OrderedDict)

    def __call__(self, polygon: Polygon, area_px: int, moved_px: tuple[float, float] = (0.0, 0.0)) -> str:
        """The label of a region that lies ``moved_px`` (right, down) of where the polygon does."""
        x, y = (at + move for at, move in zip(middle(polygon), moved_px, strict=True))
        scores_Khw, to_raster = self._seen(self._tile_at(x, y))
        stride = self.task.stride
        size = (scores_Khw.shape[2] * stride, scores_Khw.shape[1] * stride)
        a, b, c, d, e, f = to_raster[:6]
        to_polygon = Affine(a, b, c - moved_px[0], d, e, f - moved_px[1])
        inside_HW = filled(polygon, size, to_polygon)
        if not inside_HW.any():  # thinner than the pixels of the tile
            inside_HW = filled(polygon, size, to_polygon, touched=True)
        share = float(inside_HW.sum()) * abs(to_raster.determinant) / area_px
        if share < LEAST_SHARE:
            return UNKNOWN
        return self._best(scores_Khw, inside_HW.reshape(size[1] // stride, stride, -1, stride).sum(axis=(1, 3)))

    def _best(self, scores_Khw: Scores, weight_hw: NDArray[np.int64]) -> str:
        mean_K = (scores_Khw * weight_hw).sum(axis=(1, 2)) / weight_hw.sum()
        second, first = np.argsort(mean_K)[-2:]
        sure = mean_K[first] >= self.task.threshold and mean_K[first] - mean_K[second] >= LEAST_MARGIN
        return self.labels[int(first)] if sure else UNKNOWN

    def _tile_at(self, x: float, y: float) -> tuple[float, ...]:
        """The tile, in read pixels, whose place on the lattice is nearest to a point in raster pixels."""
        grid = self.view.grid()
        steps = [grid.tile_px * scale / LATTICE for scale in grid.scale_xy]
        read_xy = np.array([x, y]) / self.view.to_raster_xy
        return grid.centred(*(float(round(at / step) * step) for at, step in zip(read_xy, steps, strict=True)))

    def _seen(self, tile: tuple[float, ...]) -> tuple[Scores, Affine]:
        """Scores [K, h, w] of a tile, and what maps its model pixels to raster pixels. The last few are kept."""
        if tile not in self._tiles:
            if len(self._tiles) >= TILES_KEPT:
                self._tiles.popitem(last=False)
            self._tiles[tile] = self._look(tile)
        self._tiles.move_to_end(tile)
        return self._tiles[tile]

    def _look(self, tile: tuple[float, ...]) -> tuple[Scores, Affine]:
        view, raster = self.view, self.view.rasters[0]
        if self._scaling is None:
            (self._scaling,) = scalings(view.spec, view.rasters, Outcome())
        box = np.array(tile)
        corner = (tile[0], tile[1], tile[2], tile[3])
        pixels = raster.read(view.grid().window(corner, corner), view.decimation)
        made = cut(pixels, view.spec, view.cut_hw, view.read_size, box[None], self._scaling, self.threads)
        words = [word for label in self.labels for word in COVER[label]]
        segmenter = self.runtime.segmenter(self.task, words)
        encoder = self.runtime.open(self.task.encoder)
        features = encode(encoder, made.pixels_NCHW([0]), self.task.encoder_outputs)
        # From what the model sees to the tile, to read pixels, to raster pixels.
        to_tile, px = np.array(made.images[0].to_image), (box[2:] - box[:2]) / made.hw[::-1]
        scale_x, scale_y = to_tile[:2] * px * view.to_raster_xy
        left, top = (to_tile[2:] * px + box[:2]) * view.to_raster_xy
        scores_Whw = segmenter.scores(segmenter.embeddings(features)[0])
        first = np.cumsum([0, *(len(COVER[label]) for label in self.labels)])[:-1]
        scores_Khw: Scores = np.maximum.reduceat(scores_Whw, first, axis=0)
        return scores_Khw, Affine(scale_x, 0, left, 0, scale_y, top)
