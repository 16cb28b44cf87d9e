"""The pixels of a region, looked at again once it is known: window by window, of both dates on the same ground.

Letters: H, W rows and columns of a window.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from affine import Affine
from numpy.typing import NDArray
from rasterio.features import rasterize

from edge_rsvlm.pipeline.stream import View
from edge_rsvlm.types import Pixels, Window

Polygon = Mapping[str, Any]
"""A Polygon or MultiPolygon in raster pixels."""
CELL_PX = 256
MOST_CELLS = 64
"""A larger region is looked at in so many cells, spread over it."""


@dataclass(frozen=True)
class Part:
    """``inside_HW`` is 1 on the pixels of ``window`` whose centres lie in the region."""

    window: Window
    inside_HW: NDArray[np.uint8]


def bounds_px(polygon: Polygon) -> tuple[float, float, float, float]:
    """x0, y0, x1, y1 of a region."""
    parts = [polygon["coordinates"]] if polygon["type"] == "Polygon" else polygon["coordinates"]
    xy = np.concatenate([np.array(rings[0], np.float64) for rings in parts])
    (x0, y0), (x1, y1) = xy.min(axis=0), xy.max(axis=0)
    return float(x0), float(y0), float(x1), float(y1)


def filled(polygon: Polygon, size: tuple[int, int], to_raster: Affine, *, touched: bool = False) -> NDArray[np.uint8]:
    """1 where the centre of a cell lies in the region, or where it is ``touched``.

    ``size`` is (columns, rows) of cells, which ``to_raster`` maps to raster pixels.
    """
    found: NDArray[np.uint8] = rasterize(
        [(polygon, 1)], out_shape=size[::-1], transform=to_raster, all_touched=touched, dtype=np.uint8
    )
    return found


def parts(polygon: Polygon) -> Iterator[Part]:
    """The region in windows of at most CELL_PX a side; see MOST_CELLS."""
    cells = _cells(polygon)
    step = math.ceil(len(cells) / MOST_CELLS)
    x0, y0, x1, y1 = (int(v) for v in bounds_px(polygon))
    for col, row in cells[::step]:
        left, top = max(col, x0), max(row, y0)
        window = Window(left, top, min(col + CELL_PX, x1) - left, min(row + CELL_PX, y1) - top)
        inside_HW = filled(polygon, (window.width, window.height), Affine.translation(left, top))
        if inside_HW.any():
            yield Part(window, inside_HW)


def middle(polygon: Polygon) -> tuple[float, float]:
    """A point to look at a region from: the middle of its box where it is small, else of one of its cells."""
    x0, y0, x1, y1 = bounds_px(polygon)
    if max(x1 - x0, y1 - y0) <= CELL_PX:
        return (x0 + x1) / 2, (y0 + y1) / 2
    cells = _cells(polygon)
    col, row = cells[len(cells) // 2]
    return col + CELL_PX / 2, row + CELL_PX / 2


def _cells(polygon: Polygon) -> list[tuple[int, int]]:
    """First pixels of the cells of a lattice that the region touches, in raster order."""
    x0, y0, x1, y1 = bounds_px(polygon)
    col, row = (int(v) // CELL_PX for v in (x0, y0))
    size = math.ceil(x1 / CELL_PX) - col, math.ceil(y1 / CELL_PX) - row
    lattice = Affine(CELL_PX, 0, col * CELL_PX, 0, CELL_PX, row * CELL_PX)
    rows, cols = np.nonzero(filled(polygon, size, lattice, touched=True))
    return [(int(c + col) * CELL_PX, int(r + row) * CELL_PX) for r, c in zip(rows, cols, strict=True)]


def both_dates(view: View, window: Window, decimation: int = 1) -> tuple[Pixels, Pixels] | None:
    """The pixels of BEFORE and AFTER that show one ground, by whole pixels, as far as both rasters reach.

    ``window`` is of AFTER, in pixels of the overview that ``decimation`` names.
    """
    before, after = view.rasters
    width, height = after.size_at(decimation)
    shift = view.shift.in_units_of(view.size[0] / width, view.size[1] / height)
    dx, dy = (round(v) for v in shift.at(window.col + window.width / 2, window.row + window.height / 2))
    col, row = max(window.col, -dx, 0), max(window.row, -dy, 0)
    end_col = min(window.col + window.width, width, width - dx)
    end_row = min(window.row + window.height, height, height - dy)
    if end_col <= col or end_row <= row:
        return None
    part = Window(col, row, end_col - col, end_row - row)
    moved = Window(col + dx, row + dy, part.width, part.height)
    return before.read(moved, decimation), after.read(part, decimation)
