"""The evidence of each change: what the ground was and is, what the spectrum says, a sentence, and pictures.

It is made as a region is released, one at a time, from the rasters that are open anyway. Under a deadline it may take
EVIDENCE_SHARE of the time: what was found without evidence is worth more than evidence of half a scene.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edge_rsvlm.budget import Demand
from edge_rsvlm.bundle import Bundle
from edge_rsvlm.config.cover import APPEARED, GAINED, GONE, LOST, UNKNOWN, VEGETATION
from edge_rsvlm.config.task_specs import SegmentTask
from edge_rsvlm.pipeline.covers import TILES_KEPT, Covers, cover_labels, too_coarse
from edge_rsvlm.pipeline.crops import MOST_READ_PX, Crops
from edge_rsvlm.pipeline.looks import CELL_PX, Polygon, middle
from edge_rsvlm.pipeline.outcome import Emit, Outcome
from edge_rsvlm.pipeline.runtime import Pace, Runtime
from edge_rsvlm.pipeline.sentences import sentence
from edge_rsvlm.pipeline.spectral import Spectral, named
from edge_rsvlm.pipeline.stream import View
from edge_rsvlm.pipeline.views import demand, scene_view

EVIDENCE_SHARE = 0.25
F32_BYTES = 4
SPECTRAL_PLANES = 12
"""Of a cell, in 32 bits: the bands of both dates, and indices of them while they are computed."""
UNNAMED = (
    "its files do not say which band is red, so that what the spectrum says is left out: name them "
    "(gdal_edit.py -colorinterp_1 red -colorinterp_2 green -colorinterp_3 blue FILE)"
)


@dataclass(frozen=True)
class Wanted:
    """The evidence that a caller asks for. ``name`` gives the id of a change from its polygon; pictures go to
    ``crops``, a folder, where it is given."""

    name: Callable[[Polygon], str]
    crops: Path | None = None


def label_views(bundle: Bundle, view: View) -> tuple[View, ...]:
    """How the segment task sees both dates; none where it cannot say what the ground is."""
    task = bundle.manifest.tasks.segment
    if task is None or not cover_labels(bundle) or too_coarse(task, view.rasters[-1].georeference):
        return ()
    return tuple(scene_view((raster,), task.input, None) for raster in view.rasters)


def demands(change: Demand, bundle: Bundle, labelled: Sequence[View], *, crops: bool) -> list[Demand]:
    """What ``change`` takes when it makes evidence on the way, and what the labels take beside it."""
    per_pixel = change.bytes_per_pixel
    looks = CELL_PX**2 * (2 * 2 * per_pixel + SPECTRAL_PLANES * F32_BYTES)
    if crops:
        # As decoded, as handed over, and red, green and blue in 32 bits.
        looks = max(looks, MOST_READ_PX**2 * (2 * 2 * per_pixel + 2 * 3 * F32_BYTES))
    found = [replace(change, map_bytes=change.map_bytes + looks)]
    task = bundle.manifest.tasks.segment
    if labelled and task is not None:
        found.append(_label_demand(task, labelled[0]))
    return found


def _label_demand(task: SegmentTask, view: View) -> Demand:
    """One tile at a time, and the scores of those that are kept for both dates."""
    alone = demand("segment", task, view)
    tile_px = math.prod(task.input.tile_px * scale for scale in alone.scale_xy)
    kept = 2 * TILES_KEPT * alone.map_bytes // 3
    held = 2 * math.ceil(tile_px) * alone.bytes_per_pixel + alone.tile_bytes + alone.map_bytes + kept
    return replace(alone, tiles=1, canvas_bytes=0, canvas_rows=0, map_bytes=held)


class Evidence:
    """Adds evidence to the changes of one pair of dates."""

    def __init__(
        self,
        runtime: Runtime,
        view: View,
        labelled: Sequence[View],
        wanted: Wanted,
        pace: Pace,
        deadline_s: float | None,
    ) -> None:
        self._view, self._wanted, self._pace = view, wanted, pace
        self._most_s = math.inf if deadline_s is None else EVIDENCE_SHARE * deadline_s
        task = runtime.manifest.tasks.segment
        labels = cover_labels(runtime.bundle)
        self._covers = [Covers(runtime, task, each, labels, pace.threads) for each in labelled] if task else []
        self._made: tuple[Spectral | None, Crops | None] | None = None
        self._seconds, self._last_s, self._left_out = 0.0, 0.0, 0

    def account(self, outcome: Outcome) -> None:
        """Tell what it took, which the outcome counts as merging so far, and for what there was no time."""
        outcome.timing_s.update({"evidence": self._seconds, "merge": -self._seconds})
        if self._made is not None and _guessed(self._view):
            outcome.warnings.append(UNNAMED)
        if self._left_out:
            outcome.warnings.append(f"evidence of {self._left_out} changes was left out: there was no time for it")

    def added_to(self, emit: Emit) -> Emit:
        """An ``emit`` that passes changes on with their evidence."""
        return lambda record, geometry: emit(self.record(record), geometry)

    def record(self, change: dict[str, Any]) -> dict[str, Any]:
        """The change with ``id``, ``from``, ``to``, ``sentence``; and ``spectral`` and ``crops`` where there are."""
        found = {"id": self._wanted.name(change["polygon"]), **change, "from": UNKNOWN, "to": UNKNOWN}
        if self._seconds + self._last_s < self._most_s and self._pace.deadline.allows(self._last_s):
            begun = time.monotonic()
            found |= self._looked_up(found)
            took = time.monotonic() - begun
            self._seconds, self._last_s = self._seconds + took, took
        else:
            self._left_out += 1
        return found | {"sentence": sentence(found)}

    def _looked_up(self, change: dict[str, Any]) -> dict[str, Any]:
        if self._made is None:
            crops = self._wanted.crops
            self._made = Spectral.of(self._view), None if crops is None else Crops.of(self._view, crops)
        (measure, pictures), found = self._made, dict[str, Any]()
        polygon, area_px = change["polygon"], change["area_px"]
        spectral = None if measure is None else measure(polygon, area_px)
        if spectral is not None:
            found["spectral"] = spectral
        before, after = self._labels(polygon, area_px)
        if not contradicted(before, after, spectral["meaning"] if spectral else None):
            found |= {"from": before, "to": after}
        if pictures is not None and (files := pictures.write(change["id"], polygon)):
            found["crops"] = files
        return found

    def _labels(self, polygon: Polygon, area_px: int) -> tuple[str, str]:
        if not self._covers:
            return UNKNOWN, UNKNOWN
        before, after = self._covers
        return before(polygon, area_px, self._view.shift.at(*middle(polygon))), after(polygon, area_px)


def _guessed(view: View) -> bool:
    """Whether near infrared is there on both dates, if bands are in the usual order, which their files do not say."""
    return all("nir" in raster.band_roles for raster in view.rasters) and not named(view)


def contradicted(before: str, after: str, meaning: str | None) -> bool:
    """Whether labels say the opposite of the spectrum, which is measured: then they are not to be believed."""
    green = {LOST: -1, GAINED: 1}.get(meaning or "", 0)
    wet = {GONE: -1, APPEARED: 1}.get(meaning or "", 0)
    if UNKNOWN in (before, after):
        return False
    greener = (after in VEGETATION) - (before in VEGETATION)
    wetter = (after == "water") - (before == "water")
    return green * greener < 0 or wet * wetter < 0
