"""What a time line shows of a series: every date on the ground of the last one, and the outlines of its stories."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from affine import Affine
from numpy.typing import NDArray

from edge_rsvlm.errors import InputError
from edge_rsvlm.geo import metres_per_pixel
from edge_rsvlm.pipeline.scaling import role_bands
from edge_rsvlm.pipeline.series import SeriesOutcome
from edge_rsvlm.pipeline.stories import Dates, StoryRecord, cell_rings
from edge_rsvlm.raster.align import open_aligned
from edge_rsvlm.raster.reader import Raster, open_raster
from edge_rsvlm.report.timeline import COLOURS, Rings, StoryView, TimelineView

DATE_PX, LAST_PX = 480, 1040
"""Longest sides of the pictures of a date, and of the last one, which is shown large."""
SHOWN_PERCENTILES = (0.5, 99.5)
NO_DATA = 24
MOST_OUTLINED = 200
"""Smaller stories count in the areas and are not drawn."""
Picture = NDArray[np.uint8]


def timeline_view(outcome: SeriesOutcome) -> TimelineView:
    """Reads each date once more, shrunk. Raises InputError when the last one cannot be read."""
    dates, stories = outcome.order.dates, outcome.stories
    told = [_view(each, outcome.cell_px, len(dates)) for each in stories[: len(COLOURS)]]
    others = [_view(each, outcome.cell_px, len(dates)) for each in stories[len(COLOURS) : MOST_OUTLINED]]
    where = outcome.where
    metres = metres_per_pixel(where) or (1.0, 1.0)
    known = [np.maximum(each.areas_D, 0.0) for each in stories]
    total = np.sum(known, axis=0) if known else np.zeros(len(dates))
    unit = "px" if metres_per_pixel(where) is None else "m²"
    return TimelineView(
        f"What changed, {dates.names[0]} to {dates.names[-1]}", _summary(stories), dates.names, _places(dates),
        tuple(_pictures(outcome)), (where.width, where.height), where.width * metres[0] / (where.height * metres[1]),
        tuple(told), tuple(others), tuple(float(area) for area in total), unit,
    )  # fmt: skip


def _summary(stories: Sequence[StoryRecord]) -> str:
    lasting, count = sum(each.record["persists"] for each in stories), len(stories)
    if not count:
        return "Nothing changed."
    counted = "1 story" if count == 1 else f"{count} stories"
    return f"{counted} of change: {lasting} still there, {count - lasting} as before again"


def _places(dates: Dates) -> tuple[float, ...]:
    """Between 0 and 1, by time where it is known."""
    at = dates.years if dates.years and dates.years[-1] > 0 else tuple(float(k) for k in range(len(dates)))
    return tuple(value / at[-1] for value in at)


def _view(each: StoryRecord, cell_px: int, dates: int) -> StoryView:
    story = each.story
    to_raster = Affine.scale(cell_px) @ Affine.translation(story.col, story.row)

    def rings(mask_HW: NDArray[np.bool_]) -> Rings:
        return tuple(ring for piece in cell_rings(mask_HW, to_raster) for ring in piece)

    by_date = (), *(rings(story.changed_HW(pair)) for pair in range(dates - 1))
    areas = tuple(None if area < 0 else float(area) for area in each.areas_D)
    return StoryView(each.record["sentence"], rings(story.mask_HW), by_date, areas)


def _pictures(outcome: SeriesOutcome) -> Iterator[Picture]:
    """Red, green and blue [H, W, 3]; a date that cannot be laid over the last one is left dark."""
    *earlier, last = outcome.order.sources
    with open_raster(last.path, last.name) as after:
        values = _range(after)
        for source in earlier:
            try:
                with open_aligned(source.path, after) as raster:
                    yield _picture(raster, values, DATE_PX)
            except InputError:  # which the series has reported
                yield np.full((DATE_PX // 4, DATE_PX // 4, 3), NO_DATA, np.uint8)
        yield _picture(after, values, LAST_PX)


def _range(raster: Raster) -> tuple[float, float]:
    """The values shown as black and white on every date."""
    if raster.dtype == np.uint8:
        return 0.0, 255.0
    values = raster.sample()
    low, high = np.percentile(values, SHOWN_PERCENTILES) if len(values) else (0.0, 1.0)
    return float(low), float(max(high, low + 1e-6))


def _picture(raster: Raster, values: tuple[float, float], longest_px: int) -> Picture:
    pixels, lookup = raster.shrunk(longest_px), role_bands(raster)
    bands = [lookup[role] for role in ("red", "green", "blue")]
    low, high = values
    rgb_3HW = np.clip((pixels.data_CHW[bands].astype(np.float32) - low) / (high - low), 0, 1)
    picture_HW3: Picture = np.rint(rgb_3HW.transpose(1, 2, 0) * 255).astype(np.uint8)
    picture_HW3[pixels.valid_HW == 0] = NO_DATA
    return picture_HW3
