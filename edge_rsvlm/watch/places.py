"""Which scenes show the same place: those whose footprints on Earth overlap enough, or whose names and sizes agree."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edge_rsvlm.alerts.entries import Corner
from edge_rsvlm.geo import PixelMapper
from edge_rsvlm.types import Georeference

SAME_PLACE = 0.5
"""Of the later scene's footprint, what the earlier one must cover."""
Footprint = Sequence[Corner]


def footprint(georeference: Georeference) -> tuple[Corner, ...] | None:
    """The raster's four corners in WGS 84, around it; None without a place on Earth.

    Longitudes run on over the antimeridian, so that they may leave [-180, 180].
    """
    mapper = PixelMapper(georeference)
    if not mapper.located:
        return None
    width, height = georeference.width, georeference.height
    lonlat_42 = mapper.to_lonlat(np.array([(0, 0), (width, 0), (width, height), (0, height)], np.float64))
    if not np.isfinite(lonlat_42).all():
        return None
    lonlat_42[:, 0] -= 360 * np.rint((lonlat_42[:, 0] - lonlat_42[0, 0]) / 360)
    return tuple((round(float(lon), 7), round(float(lat), 7)) for lon, lat in lonlat_42)


def alike(path: str, georeference: Georeference) -> str:
    """What scenes of one place have in common that have no CRS: their size, and their name but for its numbers."""
    return f"{georeference.width}x{georeference.height} {re.sub(r'[0-9]+', '#', Path(path).stem)}"


def share_covered(by: Footprint, of: Footprint) -> float:
    """The share of the area of ``of`` that lies in ``by``, on the plane of longitude and latitude."""
    target, shifted = np.array(of, np.float64), _near(np.array(by, np.float64), of[0][0])
    if (shifted.max(axis=0) < target.min(axis=0)).any() or (target.max(axis=0) < shifted.min(axis=0)).any():
        return 0.0
    area = _area(target)
    return _area(_clipped(target, shifted)) / area if area else 0.0


def _near(corners: NDArray[np.float64], lon: float) -> NDArray[np.float64]:
    """The same corners, whole turns of the Earth away, so that they are nearest to a longitude."""
    turns: NDArray[np.float64] = np.array([360 * np.rint((corners[0, 0] - lon) / 360), 0.0])
    return corners - turns


def _area(corners_N2: NDArray[np.float64]) -> float:
    """Of a polygon that is not closed (shoelace formula)."""
    if len(corners_N2) < 3:
        return 0.0
    x, y = (corners_N2 - corners_N2[0]).T
    return float(abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2)


def _clipped(subject: NDArray[np.float64], window: NDArray[np.float64]) -> NDArray[np.float64]:
    """A polygon cut to a convex one (Sutherland & Hodgman 1974)."""
    x, y = (window - window[0]).T
    turn = np.sign(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1)))
    for a, b in zip(window, np.roll(window, -1, axis=0), strict=True):
        if len(subject) == 0:
            break
        side = turn * ((b[0] - a[0]) * (subject[:, 1] - a[1]) - (b[1] - a[1]) * (subject[:, 0] - a[0]))
        kept = []
        for i, j in itertools.pairwise([*range(len(subject)), 0]):
            if side[i] >= 0:
                kept.append(subject[i])
            if (side[i] >= 0) != (side[j] >= 0):
                kept.append(subject[i] + (subject[j] - subject[i]) * side[i] / (side[i] - side[j]))
        subject = np.array(kept, np.float64).reshape(-1, 2)
    return subject
