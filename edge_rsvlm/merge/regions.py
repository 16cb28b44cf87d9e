"""Connected regions of a raster that arrives in bands of rows, with their outlines.

A region is 8-connected and of one value. It is kept as runs of pixels, so memory follows the open regions and not the
raster, and nothing depends on where the raster was cut into bands. Letters: H, W rows and columns of a band, R runs,
E links.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edge_rsvlm.merge.outlines import Ring, outlines
from edge_rsvlm.merge.runs import Runs, components, concatenate, links, take


@dataclass(frozen=True)
class Region:
    """``polygons``: per 4-connected piece its closed rings [M, 2] in raster pixels, exterior first, then holes."""

    polygons: list[list[Ring]]
    value: int
    area_px: int
    score: float
    """Mean probability over its pixels."""


class RegionMerger:
    """Regions of at least ``min_area_px`` pixels of a raster of ``width`` columns, in the order of their last rows."""

    def __init__(self, width: int, min_area_px: int) -> None:
        self._width, self._min_area_px = width, min_area_px
        self._runs = Runs.none()
        self._region_R = np.zeros(0, np.intp)

    def feed(self, first_row: int, value_HW: NDArray[np.uint8], probability_HW: NDArray[np.float32]) -> list[Region]:
        """Add the rows from ``first_row`` on; return the regions that do not touch the last of them. 0 is no region."""
        if not len(value_HW):
            return []
        found = Runs.of(first_row, value_HW, probability_HW)
        runs = concatenate([self._runs, found])
        upper_E, lower_E = links(runs, self._width, diagonal=True, since_row=first_row)
        # Runs that were one region already stay one: their first run stands for all.
        known, first = np.unique(self._region_R, return_index=True)
        stands_R = np.concatenate([first[np.searchsorted(known, self._region_R)], self._fresh(len(found))])
        region_R = components(len(runs), stands_R[upper_E], stands_R[lower_E])[stands_R]
        return self._release(runs, region_R, first_row + len(value_HW) - 1)

    def flush(self) -> list[Region]:
        """The regions that are left."""
        return self._release(self._runs, self._region_R, None)

    def _fresh(self, count: int) -> NDArray[np.intp]:
        return np.arange(len(self._runs), len(self._runs) + count)

    def _release(self, runs: Runs, region_R: NDArray[np.intp], last_row: int | None) -> list[Region]:
        open_R = np.isin(region_R, region_R[runs.row_R == last_row])
        self._runs, self._region_R = take(runs, open_R), region_R[open_R]
        return self._regions(take(runs, ~open_R), region_R[~open_R])

    def _regions(self, runs: Runs, region_R: NDArray[np.intp]) -> list[Region]:
        """Whole regions, sorted by last row and then by first pixel."""
        _, region_R = np.unique(region_R, return_inverse=True)
        area = np.bincount(region_R, weights=runs.length_R).astype(np.int64)
        large_R = area[region_R] >= self._min_area_px
        runs, region_R = take(runs, large_R), region_R[large_R]
        if not len(runs):
            return []
        order = np.lexsort((runs.col_R, runs.row_R, region_R))
        runs, region_R = take(runs, order), region_R[order]
        starts = np.flatnonzero(np.diff(region_R, prepend=-1))
        last_row = np.append(runs.row_R[starts[1:] - 1], runs.row_R[-1])
        pixels = np.add.reduceat(runs.length_R, starts)
        # Runs are in raster order here, so that the sum's rounding does not depend on the bands either.
        score = np.add.reduceat(runs.probability_R, starts) / pixels
        polygons = _polygons(runs, self._width, region_R)
        first = np.lexsort((runs.col_R[starts], runs.row_R[starts], last_row))
        return [
            Region(polygons[int(region_R[starts[i]])], int(runs.value_R[starts[i]]), int(pixels[i]), float(score[i]))
            for i in first
        ]


def _polygons(runs: Runs, width: int, region_R: NDArray[np.intp]) -> dict[int, list[list[Ring]]]:
    """Polygons of every region, in the order of their first pixels; runs are sorted by region, row and column."""
    rows = np.lexsort((runs.col_R, runs.row_R))
    upper_E, lower_E = links(take(runs, rows), width, diagonal=False)
    piece_R = components(len(runs), rows[upper_E], rows[lower_E])
    found: dict[int, list[list[Ring]]] = {}
    for piece, rings in outlines(runs, piece_R):
        found.setdefault(int(region_R[piece]), []).append(rings)
    return found
