"""Stories of change as records: when each began, whether it lasts, how its area goes, and a sentence.

A story's area is geodesic, of its outline on the grid of the last date; what of it differs from the first date is
counted in cells. Letters: D dates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from affine import Affine
from numpy.typing import NDArray
from rasterio.features import shapes

from edge_rsvlm.config.cover import UNKNOWN
from edge_rsvlm.geo import PixelMapper, area_m2, feature_geometry
from edge_rsvlm.merge.stories import GRADUAL, Story
from edge_rsvlm.pipeline.polygons import PIXELS, joined, total
from edge_rsvlm.pipeline.sentences import area_words

BEGUN_SHARE = 0.1
"""Of its greatest area that a story must have to have begun: what was there before may be another thing beside it."""
LASTS_SHARE = 0.5
"""Of its greatest area that a story must have in the end to persist."""
MOVES_SHARE = 0.2
"""Of the greatest area that a trend must gain or lose over the dates to be one."""
Geometry = dict[str, Any]


@dataclass(frozen=True)
class Change:
    """What is known of a patch beside its cells: the pair's record of it, without its polygon."""

    pair: int
    record: dict[str, Any]


@dataclass(frozen=True)
class Dates:
    """``names`` are ISO 8601 where all dates are known (``years``: since the first), else names of images."""

    names: tuple[str, ...]
    years: tuple[float, ...] | None

    def __len__(self) -> int:
        return len(self.names)


@dataclass(frozen=True)
class StoryRecord:
    """``record`` as in ``--json``, ``geometry`` as in GeoJSON (None without a place); ``areas_D`` with -1 unknown."""

    story: Story
    record: dict[str, Any]
    geometry: Geometry | None
    areas_D: NDArray[np.float64]


def cell_rings(mask_HW: NDArray[np.bool_], to_raster: Affine) -> list[list[NDArray[np.float64]]]:
    """Polygons (exterior, then holes; closed) of the cells of a mask, in raster pixels."""
    found = shapes(mask_HW.astype(np.uint8), mask=mask_HW, connectivity=4, transform=to_raster)
    return [[np.array(ring, np.float64) for ring in geometry["coordinates"]] for geometry, _ in found]


def tell(story: Story, changes: Sequence[Change], dates: Dates, cell_px: int, mapper: PixelMapper) -> StoryRecord:
    """The record of a story whose patches are ``changes``."""
    to_raster = Affine.scale(cell_px) @ Affine.translation(story.col, story.row)
    pieces = cell_rings(story.mask_HW, to_raster)
    whole_m2 = total([area_m2(rings, mapper) for rings in pieces])
    unit = "area_px" if whole_m2 is None else "area_m2"
    whole = float(story.cells * cell_px**2) if whole_m2 is None else whole_m2
    areas_D = np.where(story.different_D < 0, -1.0, story.different_D * (whole / story.cells))
    record = {
        **_life(story, changes, dates, areas_D),
        **_trend(areas_D, dates, unit),
        "score": _score(changes),
        "area_m2": None if whole_m2 is None else round(whole_m2, 1),
        "area_px": story.cells * cell_px**2,
        **_covers(changes),
        "dates": [
            {"date": name, unit: None if area < 0 else round(float(area), 1)}
            for name, area in zip(dates.names, areas_D, strict=True)
        ],
        "polygon": joined([feature_geometry(rings, PIXELS) for rings in pieces]),
    }
    left = float(areas_D[-1] / areas_D.max()) if areas_D.max() > 0 else 0.0
    record = {"sentence": sentence(record, left), **record}
    return StoryRecord(story, record, joined([feature_geometry(rings, mapper) for rings in pieces]), areas_D)


def _life(story: Story, changes: Sequence[Change], dates: Dates, areas_D: NDArray[np.float64]) -> dict[str, Any]:
    """When it began, and when it was over."""
    seen = sorted({change.pair for change in changes if change.pair != GRADUAL})
    most = float(areas_D.max())
    begun = int(np.flatnonzero(areas_D >= BEGUN_SHARE * most)[0]) if most > 0 else len(dates) - 1
    first, last = (begun - 1, begun) if seen else (0, len(dates) - 1)
    persists = bool(areas_D[-1] >= LASTS_SHARE * most)
    ended = None
    if not persists:
        back = int(np.flatnonzero(areas_D >= LASTS_SHARE * most)[-1]) + 1
        # What only the first and the last date tell, happened at any time since its last change.
        since = min(back - 1, seen[-1] + 1) if seen and back == len(dates) - 1 else back - 1
        ended = [dates.names[since], dates.names[back]]
    return {
        "began": [dates.names[first], dates.names[last]],
        "ended": ended,
        "persists": persists,
        "confirmed": bool(story.confirmed >= LASTS_SHARE * story.cells),
        "changed_in": [[dates.names[pair], dates.names[pair + 1]] for pair in seen],
    }


def _trend(areas_D: NDArray[np.float64], dates: Dates, unit: str) -> dict[str, Any]:
    """The slope of the area by least squares, from the first date that shows it on."""
    shown = np.flatnonzero(areas_D > 0)
    known = np.arange(shown[0], len(areas_D)) if len(shown) else shown
    known = known[areas_D[known] >= 0]
    per_year = f"slope_{unit.removeprefix('area_')}_per_year"
    if len(known) < 2:
        return {"trend": "new", per_year: None}
    at = np.array(dates.years if dates.years else range(len(dates)), np.float64)[known]
    if at[0] == at[-1]:
        return {"trend": "stable", per_year: None}
    slope = float(np.polyfit(at - at[0], areas_D[known], 1)[0])
    gained = slope * (at[-1] - at[0]) / areas_D.max()
    trend = "growing" if gained > MOVES_SHARE else "shrinking" if gained < -MOVES_SHARE else "stable"
    return {"trend": trend, per_year: round(slope, 1) if dates.years else None}


def _score(changes: Sequence[Change]) -> float:
    """Mean over the area that its patches have."""
    scores, weights = zip(*((change.record["score"], change.record["area_px"]) for change in changes), strict=True)
    return round(float(np.average(scores, weights=weights)), 4)


def _covers(changes: Sequence[Change]) -> dict[str, str]:
    """What the ground was before its first change and is after its last one, by the largest patch of each.

    With what the spectrum says of the first, where it says something.
    """

    def largest(pair: int) -> dict[str, Any]:
        there = [change.record for change in changes if change.pair == pair]
        return max(there, key=lambda record: int(record["area_px"]))

    pairs = [change.pair for change in changes]
    first, last = largest(min(pairs)), largest(max(pairs))
    meaning = first.get("spectral", {}).get("meaning")
    covers = {"from": first.get("from", UNKNOWN), "to": last.get("to", UNKNOWN)}
    return {**covers, "meaning": meaning} if meaning else covers


def sentence(record: Mapping[str, Any], left: float) -> str:
    """A story in a line for people; ``left`` of its greatest area still differs in the end."""
    before, after, meaning = record["from"], record["to"], record.get("meaning")
    became = f" of {before} became {after}" if UNKNOWN not in (before, after) and before != after else " changed"
    why = f" ({meaning} at first)" if meaning else ""
    began = f"began between {' and '.join(record['began'])}"
    if record["ended"]:
        back = "was mostly as before" if left > BEGUN_SHARE else "was as before"
        return f"{area_words(record)}{became}{why}: {began}, {back} between {' and '.join(record['ended'])}."
    trend = f", {record['trend']}" if record["trend"] in ("growing", "shrinking") else ""
    return f"{area_words(record)}{became}{why}: {began}, still differs in {record['dates'][-1]['date']}{trend}."
