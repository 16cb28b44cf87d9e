"""Training crops. Every pixel the model sees goes through the runtime's `tile_gather`: one definition of a pixel.

Shapes: tiles [5,h,w] f32 in the stem's band order (red, green, blue, nir, validity).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_rsvlm.tiles import ABSENT, VALIDITY, tile_gather

F32 = npt.NDArray[np.float32]
RGB_BANDS = (0, 1, 2, ABSENT, VALIDITY)
# OSCD files hold B02 B03 B04 B08: blue, green, red, near infrared.
BGRN_BANDS = (2, 1, 0, 3, VALIDITY)
U8_RANGE = 255.0
# Top-of-atmosphere reflectance x 10,000 of Sentinel-2; land rarely exceeds 0.3, and brighter values are not clipped.
S2_RANGE = 3000.0
MEAN, STD = 0.5, 0.5


@dataclass(frozen=True)
class Radiometry:
    """One random linear change of the scaled value: v -> v * gain + offset, per colour band."""

    gain: tuple[float, float, float, float] = (1.0, 1.0, 1.0, 1.0)
    offset: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)


NO_JITTER = Radiometry()


def jitter(rng: np.random.Generator, common: float, per_band: float, offset: float) -> Radiometry:
    """Random radiometry: a common gain, a smaller gain per band, and offsets in units of the scaled value."""
    gain = np.exp(rng.normal(0, common) + rng.normal(0, per_band, 4))
    shift = rng.normal(0, offset) + rng.normal(0, offset / 2, 4)
    return Radiometry(tuple(gain.tolist()), tuple(shift.tolist()))


def scaling(value_range: float, radiometry: Radiometry = NO_JITTER) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Per-channel (gain, bias) of tile_gather: value / range -> jitter -> (x - MEAN) / STD; validity unchanged."""
    gain = tuple(g / value_range / STD for g in radiometry.gain)
    bias = tuple((o - MEAN) / STD for o in radiometry.offset)
    return (*gain, 1.0), (*bias, 0.0)


def cut(
    source: npt.NDArray[Any],
    box: tuple[float, float, float, float],
    out_hw: tuple[int, int],
    bands: tuple[int, ...],
    value_range: float,
    radiometry: Radiometry = NO_JITTER,
) -> F32:
    """One tile [5,h,w] of `source` under `box` (x0, y0, x1, y1 in raster px)."""
    gain, bias = scaling(value_range, radiometry)
    result = tile_gather(source, np.array([box], np.float64), out_hw=out_hw, bands=bands, gain=gain, bias=bias)
    tile: F32 = np.asarray(result.tiles_NCHW[0], np.float32)
    return tile


def dihedral(array: npt.NDArray[Any], view: int) -> npt.NDArray[Any]:
    """View 0..7 of the square's symmetries on the last two axes: `view % 4` quarter turns, then a mirror from 4 on."""
    turned = np.rot90(array, view % 4, axes=(-2, -1))
    return turned[..., ::-1] if view >= 4 else turned


def dihedral_boxes(boxes_xyxy: npt.NDArray[np.float64], size_px: int, view: int) -> npt.NDArray[np.float64]:
    """Boxes [n,4] of a square tile under the same view as `dihedral`."""
    x0, y0, x1, y1 = boxes_xyxy.T
    for _ in range(view % 4):
        x0, y0, x1, y1 = y0, size_px - x1, y1, size_px - x0
    if view >= 4:
        x0, x1 = size_px - x1, size_px - x0
    return np.stack([x0, y0, x1, y1], axis=1)
