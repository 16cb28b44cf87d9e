"""Regions of pixels that stream in by rows -> records with polygons and geodesic areas."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_rsvlm.geo import PixelMapper, area_m2, feature_geometry
from edge_rsvlm.merge.regions import Region, RegionMerger
from edge_rsvlm.pipeline.canvas import LEVELS
from edge_rsvlm.pipeline.outcome import Emit

STRIP_PIXELS = 1 << 18
PIXELS = PixelMapper(None)
"""Leaves geometry in raster pixels."""


class RegionRecords:
    """Emits ``{"score", "area_m2", "area_px", "polygon"}`` of every region that is not too small.

    ``describe`` says by the region's value what the record begins with. The polygon is in raster pixels; its area is
    geodesic.
    """

    def __init__(
        self,
        width: int,
        smallest: tuple[int, float],
        mapper: PixelMapper,
        emit: Emit,
        describe: Callable[[int], dict[str, Any]] = lambda _: {},
    ) -> None:
        min_area_px, self._min_area_m2 = smallest
        self._regions = RegionMerger(width, min_area_px)
        self._mapper, self._emit, self._describe = mapper, emit, describe

    def feed(self, first: int, value_HW: NDArray[np.uint8], levels_HW: NDArray[np.uint8]) -> None:
        """Add rows from ``first`` on: values, of which 0 is no region, and probabilities in steps of 1 / LEVELS."""
        self._release(self._regions.feed(first, value_HW, levels_HW.astype(np.float32) / np.float32(LEVELS)))

    def finish(self) -> None:
        self._release(self._regions.flush())

    def _release(self, regions: list[Region]) -> None:
        for region in regions:
            pieces = region.polygons
            area = total([area_m2(rings, self._mapper) for rings in pieces])
            if area is not None and area < self._min_area_m2:
                continue
            record = {
                **self._describe(region.value),
                "score": round(float(region.score), 4),
                "area_m2": None if area is None else round(area, 1),
                "area_px": int(region.area_px),
                "polygon": joined([feature_geometry(rings, PIXELS) for rings in pieces]),
            }
            self._emit(record, joined([feature_geometry(rings, self._mapper) for rings in pieces]))


def strips(first: int, planes_PHW: NDArray[np.uint8]) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """(first row, planes) of a few rows at a time: what is computed on them is larger than they are."""
    _, height, width = planes_PHW.shape
    step = max(STRIP_PIXELS // width, 1)
    for start in range(0, height, step):
        yield first + start, planes_PHW[:, start : start + step]


def total(areas: list[float | None]) -> float | None:
    known = [area for area in areas if area is not None]
    return sum(known) if len(known) == len(areas) else None


def joined(geometries: list[dict[str, Any] | None]) -> dict[str, Any] | None:
    """One Polygon, or a MultiPolygon of all parts; None when no part has a place."""
    parts: list[Any] = []
    for geometry in geometries:
        if geometry is not None:
            coordinates = geometry["coordinates"]
            parts += coordinates if geometry["type"] == "MultiPolygon" else [coordinates]
    if len(parts) == 1:
        return {"type": "Polygon", "coordinates": parts[0]}
    return {"type": "MultiPolygon", "coordinates": parts} if parts else None
