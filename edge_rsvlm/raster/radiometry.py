"""Two dates in one radiometry: a gain and an offset per band for the whole scene, so that tiles have no seams.

Season, haze and sun differ between dates and are no change on the ground. Mean and standard deviation of each band of
the earlier date are brought to those of the later one (relative radiometric normalisation; Yuan & Elvidge 1996), over
the pixels that this brings together: what changed, clouds, shadows and saturation do not steer it.

Letters: N samples, C bands.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from edge_rsvlm.raster.reader import Raster
from edge_rsvlm.raster.shift import STILL, Shift
from edge_rsvlm.types import Window

WINDOWS_PER_SIDE = 8
WINDOW_PX = 64
LEAST_PIXELS = 1024
GAIN_RANGE = (0.5, 2.0)
"""A scene whose contrast differs by more was not made darker or hazier: it shows something else."""

OUTLIER = 3.0
MAD_TO_DEVIATION = 1.4826
"""Median absolute deviation to standard deviation, of a normal distribution."""
ROUNDING = 1e-9
MOST_ROUNDS = 10

Floats = NDArray[np.float64]
Linear = tuple[NDArray[np.float64], NDArray[np.float64]]
"""(gain [C], offset [C]): value * gain + offset."""


@dataclass(frozen=True)
class Samples:
    """Values [N, C] of both dates at pixels that are valid in both."""

    before_NC: NDArray[np.float32]
    after_NC: NDArray[np.float32]


def matched(samples: Samples) -> Linear:
    """What brings ``before`` to the mean and deviation of ``after``; nothing where too few pixels say so.

    Pixels that are left far apart in any band are dropped and the rest is matched anew, until the same ones stay.
    """
    if len(samples.before_NC) < LEAST_PIXELS:
        bands = samples.before_NC.shape[1]
        return np.ones(bands), np.zeros(bands)
    before, after = samples.before_NC.astype(np.float64), samples.after_NC.astype(np.float64)
    kept_N = np.ones(len(before), bool)
    for _ in range(MOST_ROUNDS):
        gain, offset = _moments_matched(before[kept_N], after[kept_N])
        alike_N = _alike(after - (gain * before + offset), kept_N)
        if alike_N.sum() < LEAST_PIXELS or np.array_equal(alike_N, kept_N):
            break
        kept_N = alike_N
    return gain, offset


def _moments_matched(before_NC: Floats, after_NC: Floats) -> Linear:
    spread = before_NC.std(axis=0)
    gain = np.divide(after_NC.std(axis=0), spread, out=np.ones(len(spread)), where=spread > 0)
    gain = np.clip(gain, *GAIN_RANGE)
    return gain, after_NC.mean(axis=0) - gain * before_NC.mean(axis=0)


def _alike(residual_NC: Floats, kept_N: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Whose residual is within OUTLIER robust deviations of the median of those that were kept, in every band."""
    middle = np.median(residual_NC[kept_N], axis=0)
    deviation = MAD_TO_DEVIATION * np.median(np.abs(residual_NC[kept_N] - middle), axis=0)
    within_NC: NDArray[np.bool_] = np.abs(residual_NC - middle) <= OUTLIER * deviation + ROUNDING
    return np.asarray(within_NC.all(axis=1), np.bool_)


def sample_both(
    before: Raster, after: Raster, before_bands: Sequence[int], after_bands: Sequence[int], shift: Shift = STILL
) -> Samples:
    """The named bands in windows spread evenly over two rasters of one grid, which small rasters fill.

    The windows of BEFORE are moved by whole pixels to where they show the same ground.
    """
    width, height = after.georeference.width, after.georeference.height
    chosen = list(before_bands), list(after_bands)
    found: tuple[list[NDArray[np.float32]], list[NDArray[np.float32]]] = ([], [])
    for col, row in itertools.product(_starts(width), _starts(height)):
        window = Window(col, row, min(WINDOW_PX, width - col), min(WINDOW_PX, height - row))
        both = _same_ground(window, shift, width, height)
        if both is None:
            continue
        dates = [raster.read(part) for raster, part in zip((before, after), both, strict=True)]
        valid = (dates[0].valid_HW > 0) & (dates[1].valid_HW > 0)
        for values, pixels, bands in zip(found, dates, chosen, strict=True):
            values.append(pixels.data_CHW[bands][:, valid].astype(np.float32).T)
    return Samples(np.concatenate(found[0]), np.concatenate(found[1]))


def _same_ground(window: Window, shift: Shift, width: int, height: int) -> tuple[Window, Window] | None:
    """What of a window of AFTER lies on BEFORE too: where it lies there, and what it is of AFTER."""
    dx, dy = (round(v) for v in shift.at(window.col + window.width / 2, window.row + window.height / 2))
    col, row = max(window.col, -dx), max(window.row, -dy)
    end_col, end_row = min(window.col + window.width, width - dx), min(window.row + window.height, height - dy)
    if end_col <= col or end_row <= row:
        return None
    part = Window(col, row, end_col - col, end_row - row)
    return replace(part, col=col + dx, row=row + dy), part


def _starts(size: int) -> list[int]:
    """First pixels of the windows along one axis."""
    if size <= WINDOWS_PER_SIDE * WINDOW_PX:
        return list(range(0, size, WINDOW_PX))
    return [int(v) for v in np.linspace(0, size - WINDOW_PX, WINDOWS_PER_SIDE)]
