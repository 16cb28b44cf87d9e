"""The specification of ``tile_gather``, in NumPy, readable first. Native code must match it.

Filters are evaluated at pixel centres. Bilinear (a triangle), bicubic (Keys 1981, a = -0.5) and lanczos3 are widened
by max(1, scale), scale being source pixels per output pixel (antialias), and renormalised where the raster ends, as
Pillow does and ``torch.nn.functional.interpolate(antialias=True)``. Nearest is the pixel that holds the centre.
Gaussian is scikit-image's ``resize``: linear interpolation after a Gaussian of sigma (scale - 1) / 2, the raster
mirrored at its borders. Weights come from absolute raster coordinates, so a tile does not depend on the window it was
cut from, as long as that holds all taps.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edge_rsvlm.config.prepare import Filter

ABSENT = -1
VALIDITY = -2
MIN_VALIDITY = 0.5
FIXED_BITS = 22
"""Of Pillow's weights for 8-bit images."""

Floats = NDArray[np.float64]


def triangle(x: Floats) -> Floats:
    return np.maximum(0.0, 1.0 - x)


def cubic(x: Floats, a: float = -0.5) -> Floats:
    near = ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0
    far = (((x - 5.0) * x + 8.0) * x - 4.0) * a
    return np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))


def lanczos3(x: Floats) -> Floats:
    return np.where(x < 3.0, np.sinc(x) * np.sinc(x / 3.0), 0.0)


KERNELS = {"bilinear": triangle, "bicubic": cubic, "lanczos3": lanczos3}
"""By distance from the centre, in source pixels times min(1, 1 / scale)."""
REACH_PX = {"nearest": 1, "bilinear": 1, "bicubic": 2, "lanczos3": 3}
"""Where each of them ends, in those pixels."""


def gaussian_weights(centre: Floats, scale: float, source: NDArray[np.int64], raster_size: int) -> Floats:
    """Linear interpolation [out, source] of the raster after a Gaussian that is cut at four sigma."""
    sigma = max(0.0, (scale - 1.0) / 2.0)
    radius = int(4.0 * sigma + 0.5)
    bell = np.exp(-0.5 * (np.arange(-radius, radius + 1) / (sigma or 1.0)) ** 2)
    bell /= bell.sum()
    left = np.floor(centre - 0.5).astype(np.int64)
    share = (centre - 0.5 - left)[:, None]
    taps = (1.0 - share) * np.append(bell, 0.0) + share * np.append(0.0, bell)
    period = max(2 * (raster_size - 1), 1)
    position = np.abs(left[:, None] + np.arange(-radius, radius + 2)) % period
    position = np.minimum(position, period - position) if raster_size > 1 else 0 * position
    weights = np.zeros((len(centre), max(raster_size, source[-1] + 1)))
    np.add.at(weights, (np.arange(len(centre))[:, None], position), taps)
    return weights[:, np.maximum(source, 0)]


def axis_weights(
    start: float, end: float, out: int, origin: int, size: int, raster_size: int, resampling: Filter
) -> Floats:
    """Weights [out, size] of source pixels ``origin .. origin + size`` for ``out`` pixels spread over [start, end).

    A row is zero where the output pixel's centre lies outside the raster, and where the source holds so little of its
    filter that negative lobes take half of that away.
    """
    scale = (end - start) / out
    centre: Floats = start + (np.arange(out, dtype=np.float64) + 0.5) * scale
    source = origin + np.arange(size)
    if resampling == "nearest":
        centre = np.cumsum([start + 0.5 * scale] + [scale] * (out - 1))  # Pillow's steps: ties fall the same way
        weights = (source[None, :] == np.floor(centre)[:, None]).astype(np.float64)
    elif resampling == "gaussian":
        weights = gaussian_weights(centre, scale, source, raster_size)
    else:
        weights = KERNELS[resampling](np.abs((source[None, :] + 0.5 - centre[:, None]) / max(scale, 1.0)))
    weights[:, (source < 0) | (source >= raster_size)] = 0.0
    weights[(centre < 0) | (centre >= raster_size)] = 0.0
    total = weights.sum(axis=1, keepdims=True)
    whole = (total > 0) & (total >= 0.5 * np.abs(weights).sum(axis=1, keepdims=True))
    normalised: Floats = np.divide(weights, total, out=np.zeros_like(weights), where=whole)
    return normalised


def pillow_pass(plane_HW: NDArray[np.int64], weights: Floats) -> NDArray[np.int64]:
    """``plane_HW`` resampled along its rows as Pillow does with 8 bits: weights in fixed point, rounded and clipped."""
    fixed = np.trunc(weights * (1 << FIXED_BITS) + np.copysign(0.5, weights)).astype(np.int64)
    sums: NDArray[np.int64] = plane_HW @ fixed.T + (1 << (FIXED_BITS - 1))
    rounded: NDArray[np.int64] = np.clip(sums >> FIXED_BITS, 0, 255)
    return rounded


def pillow_resize(plane_HW: NDArray[np.int64], rows: Floats, cols: Floats, down_first: bool) -> NDArray[np.int64]:
    first, second = (rows, cols) if down_first else (cols, rows)
    between_HW = pillow_pass(plane_HW.T if down_first else plane_HW, first).T
    resized = pillow_pass(between_HW, second)
    return resized if down_first else resized.T


def gather_tile(
    source_CHW: NDArray[np.generic],
    valid_HW: NDArray[np.uint8] | None,
    box: NDArray[np.float64],
    out_hw: tuple[int, int],
    bands: NDArray[np.int32],
    gain: NDArray[np.float32],
    bias: NDArray[np.float32],
    origin: tuple[int, int],
    raster_size: tuple[int, int],
    resampling: Filter,
    pillow_rounding: bool,
) -> tuple[NDArray[np.float64], float, float]:
    """One tile [C, H, W] before the cast, its valid fraction, and its texture.

    An output pixel is valid when at least half of its filter weight falls on valid pixels; its value is the weighted
    mean of those alone, times gain plus bias. Negative lobes count as they are: so the mean of a constant stays that
    constant, and no weight grows by more than two. Invalid pixels and absent bands are 0. Texture is the standard
    deviation, over valid pixels, of the mean over bands of value times gain.

    With ``pillow_rounding`` rows are resampled first, then columns, each rounded and clipped to 8 bits; columns first
    where the raster is higher than the tile, by more than twice what it is wider (Pillow 13; earlier ones never did).
    """
    _, height, width = source_CHW.shape
    rows = axis_weights(box[1], box[3], out_hw[0], origin[1], height, raster_size[1], resampling)
    cols = axis_weights(box[0], box[2], out_hw[1], origin[0], width, raster_size[0], resampling)
    mask = np.ones((height, width)) if valid_HW is None else (valid_HW != 0).astype(np.float64)
    validity = rows @ mask @ cols.T
    valid = validity >= MIN_VALIDITY - 1e-7
    tile = np.zeros((len(bands), *out_hw))
    scaled = []
    for channel, band in enumerate(bands):
        if band == VALIDITY:
            tile[channel][valid] = 1.0
        elif band != ABSENT:
            if pillow_rounding:
                down_first = raster_size[1] - out_hw[0] > max(0, 2 * (raster_size[0] - out_hw[1]))
                resampled = pillow_resize(source_CHW[band].astype(np.int64), rows, cols, down_first)[valid]
            else:
                plane = np.where(mask > 0, source_CHW[band].astype(np.float64), 0.0)
                resampled = (rows @ plane @ cols.T)[valid] / validity[valid]
            value = resampled * gain[channel]
            tile[channel][valid] = value + bias[channel]
            scaled.append(value)
    texture = float(np.std(np.mean(scaled, axis=0))) if scaled and valid.any() else 0.0
    return tile, float(valid.mean()), texture
