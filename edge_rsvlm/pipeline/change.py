"""Change between two dates: probabilities on AFTER's grid, mask rows, and polygons as soon as they are complete."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_rsvlm.config.task_specs import ChangeTask
from edge_rsvlm.errors import InputError
from edge_rsvlm.pipeline.canvas import LEVELS, UNKNOWN, Canvas, levels, owned_parts, sample
from edge_rsvlm.pipeline.outcome import Emit, Outcome
from edge_rsvlm.pipeline.per_tile import mapper_of
from edge_rsvlm.pipeline.polygons import STRIP_PIXELS, RegionRecords, strips
from edge_rsvlm.pipeline.runtime import Pace, Runtime
from edge_rsvlm.pipeline.scaling import find_flaws
from edge_rsvlm.pipeline.stream import TileBatch, View, scene_batches
from edge_rsvlm.raster.flaws import REASONS
from edge_rsvlm.raster.registration import LIMIT_PX, estimate_shift
from edge_rsvlm.raster.shift import STILL, Shift

TOLD_FROM_PX = 0.5
"""A larger shift that was corrected is told in words."""

MaskRows = Callable[[int, NDArray[np.uint8]], None]
"""Called with the first row and rows [R, W] of a mask, in order; what the values mean is the task's to say."""


@dataclass
class ChangeOutcome(Outcome):
    """``changed_px`` of ``known_px`` raster pixels changed.

    ``registration`` is the shift between the dates that was measured, and corrected where it says so. ``masked_px``
    are pixels that are valid in both dates and yet not known, by reason (``edge_rsvlm.raster.flaws``); a reason that
    was not looked for is not there.
    """

    changed_px: int = 0
    known_px: int = 0
    registration: Shift = STILL
    masked_px: Counter[str] = field(default_factory=Counter)

    @property
    def changed_fraction(self) -> float:
        return self.changed_px / self.known_px if self.known_px else 0.0

    def record(self) -> dict[str, Any]:
        masked = {reason: self.masked_px.get(reason) for reason in REASONS.values()}
        return {**super().record(), "registration": self.registration.record(), "masked_px": masked}

    def count_masked(self, flaw_HW: NDArray[np.uint8] | None) -> None:
        """Add the pixels that have a flaw."""
        if flaw_HW is not None and flaw_HW.any():
            counts = np.bincount(flaw_HW.ravel(), minlength=len(REASONS) + 1)
            self.masked_px.update({reason: int(counts[code]) for code, reason in REASONS.items() if counts[code]})


def registered(view: View, outcome: ChangeOutcome) -> View:
    """``view`` with the shift between its two dates, which is told, and with what looks for flaws in them.

    Raises InputError where the shift is too large, and where it is not known of dates that were placed approximately.
    """
    before, after = view.rasters
    with outcome.clock("register"):
        shift = estimate_shift(before, after, view.decimation)
    if not shift.checked and (before.approximate or after.approximate):
        raise InputError(
            f"{before.name} and {after.name}: their positions are approximate, and do not lie on each other within "
            f"{LIMIT_PX:g} px",
            fix="rectify them first, as with a photogrammetry tool, and give the orthophotos",
        )
    outcome.registration = shift
    outcome.warnings += _told(shift)
    flaws = find_flaws(view.spec, view.rasters, view.to_raster_xy, outcome)
    outcome.masked_px = Counter(dict.fromkeys(flaws.reasons, 0))
    return replace(view, shift=shift, flaws=flaws)


def _told(shift: Shift) -> list[str]:
    """What the user should know of how the two dates lie on each other."""
    if not shift.checked:
        return ["how well the two dates lie on each other could not be checked (too small, or too little alike)"]
    if shift.largest_px <= TOLD_FROM_PX:
        return []
    dx, dy = shift.at(*shift.centre_xy)
    most = f" in the middle and by up to {shift.largest_px:.1f} elsewhere" if shift.varies else ""
    return [f"the earlier date lay {dx:+.1f} pixels to the right and {dy:+.1f} down{most}, which was corrected"]


def change(
    runtime: Runtime,
    task: ChangeTask,
    view: View,
    pace: Pace,
    emit: Emit,
    mask_rows: MaskRows | None = None,
    outcome: ChangeOutcome | None = None,
) -> ChangeOutcome:
    """Compare the two rasters of ``view`` (before, after), which lie on one grid but for its ``shift``.

    Emits ``{"score", "area_m2", "area_px", "polygon"}`` per changed region, the polygon as a geometry in raster pixels.
    Rows of the mask are 0 unchanged, 1 changed, 255 not known.
    """
    outcome = outcome or ChangeOutcome()
    canvas = Canvas(*view.size)
    smallest = _least_px(task, view), task.min_area_m2
    regions = RegionRecords(view.size[0], smallest, mapper_of(view, outcome), emit)
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
                found = dict(zip(kept.tolist(), probability_Nhw, strict=True))
                for n in range(len(tiles)):
                    for part in owned_parts(tiles, n, view, task.stride, STRIP_PIXELS):
                        outcome.count_masked(part.flaw_HW)
                        if n in found:
                            block_HW = sample(found[n], part.x_W, part.y_H)
                            canvas.paint(part.col, part.row, levels(block_HW)[None], part.valid_HW)
                # Rows that a later tile may own are below the top of its core, and so below its own top.
                finish_rows(np.floor(tiles.frontier_row))
    with outcome.clock("merge"):
        finish_rows(view.size[1])
        regions.finish()
    return outcome


def _least_px(task: ChangeTask, view: View) -> int:
    """Raster pixels of the smallest region."""
    return max(1, round(task.min_cells * task.stride**2 * math.prod(view.scale_xy)))


def _compare(runtime: Runtime, task: ChangeTask, tiles: TileBatch, kept: NDArray[np.intp]) -> NDArray[np.float32]:
    before_NCHW, after_NCHW = (date.pixels_NCHW(kept) for date in tiles.dates)
    return runtime.change_detector(task)(before_NCHW, after_NCHW)
