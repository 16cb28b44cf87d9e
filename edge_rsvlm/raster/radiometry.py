"""Two dates in one radiometry: a gain and an offset per band for the whole scene, so that tiles have no seams.

Season, haze and sun differ between dates and are no change on the ground. Mean and standard deviation of each band of
the earlier date are brought to those of the later one (relative radiometric normalisation; Yuan & Elvidge 1996).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edge_rsvlm.raster.reader import Raster
from edge_rsvlm.types import Window

WINDOWS_PER_SIDE = 8
WINDOW_PX = 64
LEAST_PIXELS = 1024
GAIN_RANGE = (0.5, 2.0)
"""A scene whose contrast differs by more was not made darker or hazier: it shows something else."""

Linear = tuple[NDArray[np.float64], NDArray[np.float64]]
"""(gain [C], offset [C]): value * gain + offset."""


@dataclass(frozen=True)
class Samples:
    """Values [N, C] of both dates at pixels that are valid in both."""

    before_NC: NDArray[np.float32]
    after_NC: NDArray[np.float32]


def matched(samples: Samples) -> Linear:
    """What brings ``before`` to the mean and deviation of ``after``; nothing where too few pixels say so."""
    bands = samples.before_NC.shape[1]
    if len(samples.before_NC) < LEAST_PIXELS:
        return np.ones(bands), np.zeros(bands)
    before, after = samples.before_NC.astype(np.float64), samples.after_NC.astype(np.float64)
    spread = before.std(axis=0)
    gain = np.clip(np.divide(after.std(axis=0), spread, out=np.ones(bands), where=spread > 0), *GAIN_RANGE)
    return gain, after.mean(axis=0) - gain * before.mean(axis=0)


def sample_both(before: Raster, after: Raster, before_bands: Sequence[int], after_bands: Sequence[int]) -> Samples:
    """The named bands in windows spread evenly over two rasters of one grid, which small rasters fill."""
    width, height = after.georeference.width, after.georeference.height
    chosen = list(before_bands), list(after_bands)
    found: tuple[list[NDArray[np.float32]], list[NDArray[np.float32]]] = ([], [])
    for col, row in itertools.product(_starts(width), _starts(height)):
        window = Window(col, row, min(WINDOW_PX, width - col), min(WINDOW_PX, height - row))
        dates = [raster.read(window) for raster in (before, after)]
        valid = (dates[0].valid_HW > 0) & (dates[1].valid_HW > 0)
        for values, pixels, bands in zip(found, dates, chosen, strict=True):
            values.append(pixels.data_CHW[bands][:, valid].astype(np.float32).T)
    return Samples(np.concatenate(found[0]), np.concatenate(found[1]))


def _starts(size: int) -> list[int]:
    """First pixels of the windows along one axis."""
    if size <= WINDOWS_PER_SIDE * WINDOW_PX:
        return list(range(0, size, WINDOW_PX))
    return [int(v) for v in np.linspace(0, size - WINDOW_PX, WINDOWS_PER_SIDE)]
