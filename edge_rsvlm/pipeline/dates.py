"""Windows of one or two dates, read where both show the same ground, and which of their pixels can be compared.

The earlier date is read and cut where it shows what the later one does (``Shift``); its pixels are not resampled for
that. Coordinates are read pixels. Letters: H, W rows and columns of the later date's window.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from edge_rsvlm.raster.flaws import SATURATED, Flaws
from edge_rsvlm.raster.moved import moved_map, moved_window
from edge_rsvlm.raster.reader import Raster
from edge_rsvlm.raster.shift import Shift
from edge_rsvlm.types import Pixels, Window


@dataclass(frozen=True)
class Read:
    """Pixels of each date, later last. ``valid_HW`` are those of ``window``, the later one's, to be compared.

    ``flaw_HW`` says by code why others that are valid in both dates are not; None where nothing looks for flaws.
    """

    dates: tuple[Pixels, ...]
    window: Window
    valid_HW: NDArray[np.uint8]
    flaw_HW: NDArray[np.uint8] | None = None


def read_window(
    rasters: tuple[Raster, ...], window: Window, decimation: int, shift: Shift, flaws: Flaws | None = None
) -> Read:
    """Read ``window`` of the last raster, and of the other what shows the same ground; more where flaws need it."""
    size = rasters[-1].size_at(decimation)
    if flaws is not None:
        window = _wider(window, flaws.reach_xy(), size)
    windows = [window] * len(rasters)
    if shift.corrected:
        windows[0] = moved_window(window, shift, size)
    dates = tuple(raster.read(part, decimation) for raster, part in zip(rasters, windows, strict=True))
    valid = [pixels.valid_HW for pixels in dates]
    if shift.corrected:
        valid[0] = moved_map(valid[0], windows[0], window, shift)
    read = Read(dates, window, np.minimum.reduce(valid))
    return read if flaws is None else _without(read, flaws.find(dates[0], dates[-1], shift))


def _wider(window: Window, by_xy: tuple[int, int], size: tuple[int, int]) -> Window:
    (x, y), (width, height) = by_xy, size
    col, row = max(window.col - x, 0), max(window.row - y, 0)
    end_col, end_row = min(window.col + window.width + x, width), min(window.row + window.height + y, height)
    return Window(col, row, end_col - col, end_row - row)


def _without(read: Read, flaw_HW: NDArray[np.uint8]) -> Read:
    """Flaws are not compared; the model does not see clouds and shadows either, at whose edges it would find change."""
    flaw_HW[read.valid_HW == 0] = 0
    if not flaw_HW.any():
        return replace(read, flaw_HW=flaw_HW)
    before, after = read.dates
    hidden_HW = (flaw_HW > 0) & (flaw_HW != SATURATED)
    seen = replace(after, valid_HW=np.where(hidden_HW, np.uint8(0), after.valid_HW))
    valid_HW = np.where(flaw_HW > 0, np.uint8(0), read.valid_HW)
    return Read((before, seen), read.window, valid_HW, flaw_HW)
