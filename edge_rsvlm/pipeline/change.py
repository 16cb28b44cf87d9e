"""Change between two dates: probabilities on AFTER's grid, mask rows, and polygons as soon as they are complete."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edge_rsvlm.config.task_specs import ChangeTask
from edge_rsvlm.pipeline.canvas import LEVELS, UNKNOWN, Canvas, levels, owned_parts, sample
from edge_rsvlm.pipeline.outcome import Emit, Outcome
from edge_rsvlm.pipeline.per_tile import mapper_of
from edge_rsvlm.pipeline.polygons import STRIP_PIXELS, RegionRecords, strips
from edge_rsvlm.pipeline.runtime import Pace, Runtime
from edge_rsvlm.pipeline.stream import TileBatch, View, scene_batches

MaskRows = Callable[[int, NDArray[np.uint8]], None]
"""Called with the first row and rows [R, W] of a mask, in order; what the values mean is the task's to say."""


@dataclass
class ChangeOutcome(Outcome):
    """``changed_px`` of ``known_px`` raster pixels changed."""

    changed_px: int = 0
    known_px: int = 0

    @property
    def changed_fraction(self) -> float:
        return self.changed_px / self.known_px if self.known_px else 0.0


def change(
    runtime: Runtime, task: ChangeTask, view: View, pace: Pace, emit: Emit, mask_rows: MaskRows | None = None
) -> ChangeOutcome:
    """Compare the two rasters of ``view`` (before, after), which lie on one grid.

    Emits ``{"score", "area_m2", "area_px", "polygon"}`` per changed region, the polygon as a geometry in raster pixels.
    Rows of the mask are 0 unchanged, 1 changed, 255 not known.
    """
    outcome = ChangeOutcome()
    canvas = Canvas(*view.size)
    regions = RegionRecords(view.size[0], (task.min_area_px, task.min_area_m2), mapper_of(view, outcome), emit)
    least = int(np.ceil(task.threshold * LEVELS))

    def finish_rows(until: float) -> None:
        for first, (levels_HW,) in strips(*canvas.take(until)):
            known = levels_HW != UNKNOWN
            changed = (known & (levels_HW >= least)).astype(np.uint8)
            outcome.known_px += int(known.sum())
            outcome.changed_px += int(changed.sum())
            regions.feed(first, changed, levels_HW)
            if mask_rows:
                mask_rows(first, np.where(known, changed, np.uint8(UNKNOWN)))

    with scene_batches(view, pace, outcome) as source:
        for tiles in source:
            with outcome.clock("engine"):
                kept = np.flatnonzero(tiles.valid_fraction_N > 0)
                probability_Nhw = _compare(runtime, task, tiles, kept) if len(kept) else np.zeros((0, 1, 1), np.float32)
            with outcome.clock("merge"):
                for n, probability_hw in zip(kept, probability_Nhw, strict=True):
                    for part in owned_parts(tiles, int(n), view, task.stride, STRIP_PIXELS):
                        block_HW = sample(probability_hw, part.x_W, part.y_H)
                        canvas.paint(part.col, part.row, levels(block_HW)[None], part.valid_HW)
                # Rows that a later tile may own are below the top of its core, and so below its own top.
                finish_rows(np.floor(tiles.frontier_row))
    with outcome.clock("merge"):
        finish_rows(view.size[1])
        regions.finish()
    return outcome


def _compare(runtime: Runtime, task: ChangeTask, tiles: TileBatch, kept: NDArray[np.intp]) -> NDArray[np.float32]:
    before_NCHW, after_NCHW = (date.pixels_NCHW(kept) for date in tiles.dates)
    return runtime.change_detector(task)(before_NCHW, after_NCHW)
