"""A rolling band of full-width rows: tiles paint what they own, finished rows leave at the top.

Values are single bytes, so that the band stays small however wide the raster is. Letters: P planes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edge_rsvlm.pipeline.stream import TileBatch, View

LEVELS = 250
UNKNOWN = 255


class Canvas:
    """Planes of bytes on raster pixels; UNKNOWN where nothing valid was painted."""

    def __init__(self, width: int, height: int, planes: int = 1) -> None:
        self._size = (width, height)
        self._top = 0
        self._rows_PHW = np.full((planes, 0, width), UNKNOWN, np.uint8)

    def paint(self, col: int, row: int, planes_PHW: NDArray[np.uint8], valid_HW: NDArray[np.uint8]) -> None:
        """Write a block at raster pixel (col, row); rows that were taken already may not be painted again."""
        _, height, width = planes_PHW.shape
        self._grow_to(row + height)
        start = row - self._top
        self._rows_PHW[:, start : start + height, col : col + width] = np.where(valid_HW > 0, planes_PHW, UNKNOWN)

    def take(self, until_row: float) -> tuple[int, NDArray[np.uint8]]:
        """(first row, planes [P, rows, width]) of every row above ``until_row``, in order, each once."""
        end = int(max(self._top, min(until_row, self._size[1])))
        self._grow_to(end)
        first, count = self._top, end - self._top
        taken = self._rows_PHW[:, :count]
        self._rows_PHW, self._top = self._rows_PHW[:, count:].copy(), end
        return first, taken

    def _grow_to(self, bottom: int) -> None:
        missing = min(bottom, self._size[1]) - self._top - self._rows_PHW.shape[1]
        if missing > 0:
            more = np.full((len(self._rows_PHW), missing, self._size[0]), UNKNOWN, np.uint8)
            self._rows_PHW = np.concatenate([self._rows_PHW, more], axis=1)


def levels(probability: NDArray[np.floating]) -> NDArray[np.uint8]:
    """Probabilities in steps of 1 / LEVELS, which leaves room for UNKNOWN."""
    return np.asarray(np.rint(probability * LEVELS), np.uint8)


@dataclass(frozen=True)
class Part:
    """Raster pixels from (col, row) on whose centres one tile owns.

    ``x_W`` and ``y_H`` are their centres on the map of the tile's cells, whose integers are the cells' centres.
    ``valid_HW`` and ``flaw_HW`` are as of the tiles.
    """

    col: int
    row: int
    x_W: NDArray[np.float64]
    y_H: NDArray[np.float64]
    valid_HW: NDArray[np.uint8]
    flaw_HW: NDArray[np.uint8] | None


def owned_parts(tiles: TileBatch, n: int, view: View, stride: int, most_px: int) -> Iterator[Part]:
    """What tile ``n`` owns, in parts of about ``most_px`` pixels; ``stride`` is of its cells in pixels of the model."""
    core = tiles.cores_N4[n]
    # Pixel k is owned when its centre k + 0.5 lies in [core start, core end).
    col0, row0, col1, row1 = (int(v) for v in np.ceil(core - 0.5))
    cols, rows = np.arange(col0, min(col1, view.size[0])), np.arange(row0, min(row1, view.size[1]))
    if not len(cols) or not len(rows):
        return
    x0, y0, x1, y1 = tiles.to_raster(n, np.array([[0.0, 0.0, stride, stride]]))[0]
    x_W, y_H = (cols + 0.5 - x0) / (x1 - x0) - 0.5, (rows + 0.5 - y0) / (y1 - y0) - 0.5
    to_read = 1 / view.to_raster_xy
    read_cols = np.minimum(((cols + 0.5) * to_read[0]).astype(int), view.read_size[0] - 1) - tiles.window.col
    read_rows = np.minimum(((rows + 0.5) * to_read[1]).astype(int), view.read_size[1] - 1) - tiles.window.row
    step = max(most_px // len(cols), 1)
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        at = np.ix_(read_rows[part], read_cols)
        flaw_HW = None if tiles.flaw_HW is None else tiles.flaw_HW[at]
        yield Part(col0, row0 + start, x_W, y_H[part], tiles.valid_HW[at], flaw_HW)


def sample(map_hw: NDArray[np.float32], x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float32]:
    """Bilinear values [..., len(y), len(x)] of a map [..., h, w] at coordinates whose integers are the cells' centres.

    Edges are held.
    """

    def taps(at: NDArray[np.float64], size: int) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.float32]]:
        at = np.clip(at, 0, size - 1)
        low = np.minimum(at.astype(np.intp), max(size - 2, 0))
        return low, np.minimum(low + 1, size - 1), (at - low).astype(np.float32)

    top, bottom, fy = taps(y, map_hw.shape[-2])
    left, right, fx = taps(x, map_hw.shape[-1])
    rows = map_hw[..., top, :] * (1 - fy)[:, None] + map_hw[..., bottom, :] * fy[:, None]
    return (rows[..., left] * (1 - fx) + rows[..., right] * fx).astype(np.float32)
