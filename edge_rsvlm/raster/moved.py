"""The earlier of two dates where it shows the ground of the later one: windows, boxes and maps moved by a shift.

All coordinates and the shift are read pixels. Letters: C bands, H, W rows and columns.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_rsvlm.raster.shift import Shift
from edge_rsvlm.types import Window

Floats = NDArray[np.float64]
ROWS_AT_ONCE = 64
SPARE_PX = 3
"""What the widest filter reaches beyond a window that is moved by a part of a pixel."""


def moved_window(window: Window, shift: Shift, size: tuple[int, int]) -> Window:
    """What of a raster of ``size`` (width, height) shows the ground of ``window``, and SPARE_PX beyond."""
    start = np.array([window.col, window.row])
    end = np.array([window.col + window.width, window.row + window.height])
    moves = np.array([shift.at(float(x), float(y)) for x in (start[0], end[0]) for y in (start[1], end[1])])
    first = start + np.floor(moves.min(axis=0)).astype(int) - SPARE_PX
    last = end + np.ceil(moves.max(axis=0)).astype(int) + SPARE_PX
    col, row = (int(v) for v in np.clip(first, 0, np.array(size) - 1))
    end_col, end_row = (int(v) for v in np.minimum(last, size))
    return Window(col, row, max(end_col - col, 1), max(end_row - row, 1))


def moved_boxes(boxes_N4: Floats, shift: Shift, size: tuple[int, int]) -> Floats:
    """Boxes moved by the shift at their centres, as far as those lie on a raster of ``size``."""
    if not shift.corrected:
        return boxes_N4
    centres = np.minimum((boxes_N4[:, :2] + boxes_N4[:, 2:]) / 2, size)
    moves = np.array([shift.at(float(x), float(y)) for x, y in centres], np.float64)
    return np.asarray(boxes_N4 + np.tile(moves, 2))


def moved_rows(
    data_Chw: NDArray[Any], source: Window, target: Window, rows: slice, shift: Shift
) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """Data of ``source`` as seen from some rows of ``target``, by whole pixels, [C, rows, W]; and where it reaches."""
    if source == target and not shift.corrected:
        return data_Chw[:, rows], np.ones((rows.stop - rows.start, target.width), bool)
    x: Floats = np.arange(target.width)[None] + np.float64(target.col + 0.5)
    y: Floats = np.arange(rows.start, rows.stop)[:, None] + np.float64(target.row + 0.5)
    dx, dy = shift.at(x, y)
    cols_HW, rows_HW = (np.floor(v).astype(np.intp) for v in (x + dx - source.col, y + dy - source.row))
    inside_HW = (cols_HW >= 0) & (cols_HW < source.width) & (rows_HW >= 0) & (rows_HW < source.height)
    taken = data_Chw[:, np.clip(rows_HW, 0, source.height - 1), np.clip(cols_HW, 0, source.width - 1)]
    return taken, inside_HW


def moved_map(map_hw: NDArray[np.uint8], source: Window, target: Window, shift: Shift) -> NDArray[np.uint8]:
    """A map of ``source`` as seen from ``target``; 0 where it does not reach."""
    found_HW = np.zeros((target.height, target.width), np.uint8)
    for rows in row_strips(target.height):
        taken_1HW, inside_HW = moved_rows(map_hw[None], source, target, rows, shift)
        found_HW[rows] = np.where(inside_HW, taken_1HW[0], 0)
    return found_HW


def row_strips(height: int) -> list[slice]:
    """A few rows at a time: what is computed on them is larger than they are."""
    return [slice(start, min(start + ROWS_AT_ONCE, height)) for start in range(0, height, ROWS_AT_ONCE)]
