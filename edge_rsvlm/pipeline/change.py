"""Change between two dates: probabilities on AFTER's grid, mask rows, and polygons as soon as they are complete."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_rsvlm.config.task_specs import ChangeTask
from edge_rsvlm.geo import PixelMapper, area_m2, feature_geometry
from edge_rsvlm.merge.regions import Region, RegionMerger
from edge_rsvlm.pipeline.canvas import LEVELS, UNKNOWN, ProbabilityCanvas, sample
from edge_rsvlm.pipeline.outcome import Emit, Outcome
from edge_rsvlm.pipeline.per_tile import mapper_of
from edge_rsvlm.pipeline.runtime import Pace, Runtime
from edge_rsvlm.pipeline.stream import TileBatch, View, scene_batches

STRIP_PIXELS = 1 << 18
MaskRows = Callable[[int, NDArray[np.uint8]], None]
"""Called with the first row and rows [R, W] of the mask: 0 unchanged, 1 changed, 255 not known."""


@dataclass
class ChangeOutcome(Outcome):
    """``changed_px`` of ``known_px`` raster pixels changed."""

    changed_px: int = 0
    known_px: int = 0

    @property
    def changed_fraction(self) -> float:
        return self.changed_px / self.known_px if self.known_px else 0.0


class _Results:
    """Finished rows of probability -> mask rows and changes."""

    def __init__(self, task: ChangeTask, mapper: PixelMapper, width: int, outcome: ChangeOutcome, emit: Emit) -> None:
        self._task, self._mapper, self._outcome, self._emit = task, mapper, outcome, emit
        self._level = int(np.ceil(task.threshold * LEVELS))
        self._regions = RegionMerger(width, task.min_area_px)

    def rows(self, first: int, levels_HW: NDArray[np.uint8]) -> Iterator[tuple[int, NDArray[np.uint8]]]:
        """(first row, mask rows), a few rows at a time: what is computed on them is larger than they are."""
        step = max(STRIP_PIXELS // levels_HW.shape[1], 1)
        for start in range(0, len(levels_HW), step):
            yield first + start, self._strip(first + start, levels_HW[start : start + step])

    def _strip(self, first: int, levels_HW: NDArray[np.uint8]) -> NDArray[np.uint8]:
        known = levels_HW != UNKNOWN
        changed = known & (levels_HW >= self._level)
        self._outcome.known_px += int(known.sum())
        self._outcome.changed_px += int(changed.sum())
        self._release(self._regions.feed(first, changed, levels_HW.astype(np.float32) / np.float32(LEVELS)))
        return np.where(known, changed, UNKNOWN).astype(np.uint8)

    def finish(self) -> None:
        self._release(self._regions.flush())

    def _release(self, regions: list[Region]) -> None:
        for region in regions:
            pieces = region.polygons
            area = _total([area_m2(rings, self._mapper) for rings in pieces])
            if area is not None and area < self._task.min_area_m2:
                continue
            record = {
                "score": round(float(region.score), 4),
                "area_m2": None if area is None else round(area, 1),
                "area_px": int(region.area_px),
                "polygon": _joined([feature_geometry(rings, PIXELS) for rings in pieces]),
            }
            self._emit(record, _joined([feature_geometry(rings, self._mapper) for rings in pieces]))


PIXELS = PixelMapper(None)
"""Leaves geometry in raster pixels."""


def _total(areas: list[float | None]) -> float | None:
    known = [area for area in areas if area is not None]
    return sum(known) if len(known) == len(areas) else None


def _joined(geometries: list[dict[str, Any] | None]) -> dict[str, Any] | None:
    """One Polygon, or a MultiPolygon of all parts; None when no part has a place."""
    parts: list[Any] = []
    for geometry in geometries:
        if geometry is not None:
            coordinates = geometry["coordinates"]
            parts += coordinates if geometry["type"] == "MultiPolygon" else [coordinates]
    if len(parts) == 1:
        return {"type": "Polygon", "coordinates": parts[0]}
    return {"type": "MultiPolygon", "coordinates": parts} if parts else None


def change(
    runtime: Runtime, task: ChangeTask, view: View, pace: Pace, emit: Emit, mask_rows: MaskRows | None = None
) -> ChangeOutcome:
    """Compare the two rasters of ``view`` (before, after), which lie on one grid.

    Emits ``{"score", "area_m2", "area_px", "polygon"}`` per changed region, the polygon as a geometry in raster pixels.
    """
    outcome = ChangeOutcome()
    mapper = mapper_of(view, outcome)
    canvas = ProbabilityCanvas(*view.size)
    results = _Results(task, mapper, view.size[0], outcome, emit)

    def finish_rows(until: float) -> None:
        first, levels_HW = canvas.take(until)
        if len(levels_HW):
            for row, rows in results.rows(first, levels_HW):
                if mask_rows:
                    mask_rows(row, rows)

    with scene_batches(view, pace, outcome) as source:
        for tiles in source:
            with outcome.clock("engine"):
                kept = np.flatnonzero(tiles.valid_fraction_N > 0)
                probability_Nhw = _compare(runtime, task, tiles, kept) if len(kept) else np.zeros((0, 1, 1), np.float32)
            with outcome.clock("merge"):
                for n, probability_hw in zip(kept, probability_Nhw, strict=True):
                    _paint(canvas, tiles, int(n), probability_hw, view, task.stride)
                # Rows that a later tile may own are below the top of its core, and so below its own top.
                finish_rows(np.floor(tiles.frontier_row))
    with outcome.clock("merge"):
        finish_rows(view.size[1])
        results.finish()
    return outcome


def _compare(runtime: Runtime, task: ChangeTask, tiles: TileBatch, kept: NDArray[np.intp]) -> NDArray[np.float32]:
    before_NCHW, after_NCHW = (date.pixels_NCHW(kept) for date in tiles.dates)
    return runtime.change_detector(task)(before_NCHW, after_NCHW)


def _paint(
    canvas: ProbabilityCanvas, tiles: TileBatch, n: int, probability_hw: NDArray[np.float32], view: View, stride: int
) -> None:
    """Put onto the canvas the raster pixels whose centres tile ``n`` owns."""
    tile, core = tiles.boxes_N4[n], tiles.cores_N4[n]
    # Pixel k is owned when its centre k + 0.5 lies in [core start, core end).
    col0, row0, col1, row1 = (int(v) for v in np.ceil(core - 0.5))
    cols, rows = np.arange(col0, min(col1, view.size[0])), np.arange(row0, min(row1, view.size[1]))
    if not len(cols) or not len(rows):
        return
    cell = (tile[2:] - tile[:2]) / view.spec.tile_px * stride
    block = sample(probability_hw, (cols + 0.5 - tile[0]) / cell[0] - 0.5, (rows + 0.5 - tile[1]) / cell[1] - 0.5)
    to_read = 1 / view.to_raster_xy
    read_cols = np.minimum(((cols + 0.5) * to_read[0]).astype(int), view.read_size[0] - 1) - tiles.window.col
    read_rows = np.minimum(((rows + 0.5) * to_read[1]).astype(int), view.read_size[1] - 1) - tiles.window.row
    canvas.paint(col0, row0, block, tiles.valid_HW[np.ix_(read_rows, read_cols)])
