"""The specification of ``tile_gather``, in NumPy, readable first. Native code must match it.

Resampling is bilinear with antialias: a triangle filter whose half width is max(1, scale) source pixels, evaluated at
pixel centres and renormalised where the raster ends, as Pillow and ``torch.nn.functional.interpolate(antialias=True)``
do. Weights come from absolute raster coordinates, so a tile does not depend on the window it was cut from.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

ABSENT = -1
VALIDITY = -2
MIN_VALIDITY = 0.5


def axis_weights(start: float, end: float, out: int, origin: int, size: int, raster_size: int) -> NDArray[np.float64]:
    """Weights [out, size] of source pixels ``origin .. origin + size`` for ``out`` pixels spread over [start, end).

    A row is zero where the output pixel's centre lies outside the raster.
    """
    scale = (end - start) / out
    support = max(scale, 1.0)
    centre = start + (np.arange(out) + 0.5) * scale
    source = origin + np.arange(size)
    weights = np.maximum(0.0, 1.0 - np.abs((source[None, :] + 0.5 - centre[:, None]) / support))
    weights[:, (source < 0) | (source >= raster_size)] = 0.0
    weights[(centre < 0) | (centre >= raster_size)] = 0.0
    total = weights.sum(axis=1, keepdims=True)
    normalised: NDArray[np.float64] = np.divide(weights, total, out=np.zeros_like(weights), where=total > 0)
    return normalised


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
) -> tuple[NDArray[np.float64], float, float]:
    """One tile [C, H, W] before the cast, its valid fraction, and its texture.

    An output pixel is valid when at least half of its filter weight falls on valid pixels; its value is the weighted
    mean of those alone, times gain plus bias. Invalid pixels and absent bands are 0. Texture is the standard deviation,
    over valid pixels, of the mean over bands of value times gain.
    """
    _, height, width = source_CHW.shape
    rows = axis_weights(box[1], box[3], out_hw[0], origin[1], height, raster_size[1])
    cols = axis_weights(box[0], box[2], out_hw[1], origin[0], width, raster_size[0])
    mask = np.ones((height, width)) if valid_HW is None else (valid_HW != 0).astype(np.float64)
    validity = rows @ mask @ cols.T
    valid = validity >= MIN_VALIDITY - 1e-7
    tile = np.zeros((len(bands), *out_hw))
    scaled = []
    for channel, band in enumerate(bands):
        if band == VALIDITY:
            tile[channel][valid] = 1.0
        elif band != ABSENT:
            plane = np.where(mask > 0, source_CHW[band].astype(np.float64), 0.0)
            value = (rows @ plane @ cols.T)[valid] / validity[valid] * gain[channel]
            tile[channel][valid] = value + bias[channel]
            scaled.append(value)
    texture = float(np.std(np.mean(scaled, axis=0))) if scaled and valid.any() else 0.0
    return tile, float(valid.mean()), texture
