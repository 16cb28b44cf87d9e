"""A rolling band of full-width rows: tiles paint what they own, finished rows leave at the top.

Probabilities are kept as one byte, so that the band stays small however wide the raster is.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

LEVELS = 250
UNKNOWN = 255


class ProbabilityCanvas:
    """Probabilities in steps of 1/250 on raster pixels; UNKNOWN where nothing valid was painted."""

    def __init__(self, width: int, height: int) -> None:
        self._size = (width, height)
        self._top = 0
        self._rows_HW = np.full((0, width), UNKNOWN, np.uint8)

    def paint(self, col: int, row: int, probability_HW: NDArray[np.floating], valid_HW: NDArray[np.uint8]) -> None:
        """Write a block at raster pixel (col, row); rows that were taken already may not be painted again."""
        height, width = probability_HW.shape
        self._grow_to(row + height)
        levels = np.rint(probability_HW * LEVELS).astype(np.uint8)
        start = row - self._top
        self._rows_HW[start : start + height, col : col + width] = np.where(valid_HW > 0, levels, UNKNOWN)

    def take(self, until_row: float) -> tuple[int, NDArray[np.uint8]]:
        """(first row, levels [rows, width]) of every row above ``until_row``, in order, each once."""
        end = int(max(self._top, min(until_row, self._size[1])))
        self._grow_to(end)
        first, count = self._top, end - self._top
        taken = self._rows_HW[:count]
        self._rows_HW, self._top = self._rows_HW[count:].copy(), end
        return first, taken

    def _grow_to(self, bottom: int) -> None:
        missing = min(bottom, self._size[1]) - self._top - len(self._rows_HW)
        if missing > 0:
            more = np.full((missing, self._size[0]), UNKNOWN, np.uint8)
            self._rows_HW = np.concatenate([self._rows_HW, more])


def sample(
    probability_hw: NDArray[np.float32],
    x: NDArray[np.float64],
    y: NDArray[np.float64],
) -> NDArray[np.float32]:
    """Bilinear values [len(y), len(x)] at map coordinates whose integers are the cells' centres; edges are held."""

    def taps(at: NDArray[np.float64], size: int) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.float32]]:
        at = np.clip(at, 0, size - 1)
        low = np.minimum(at.astype(np.intp), max(size - 2, 0))
        return low, np.minimum(low + 1, size - 1), (at - low).astype(np.float32)

    top, bottom, fy = taps(y, probability_hw.shape[0])
    left, right, fx = taps(x, probability_hw.shape[1])
    rows = probability_hw[top] * (1 - fy)[:, None] + probability_hw[bottom] * fy[:, None]
    return (rows[:, left] * (1 - fx) + rows[:, right] * fx).astype(np.float32)
