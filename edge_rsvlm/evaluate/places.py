"""Where a mask is looked up: on labelled objects, and on a ring around each.

Letters: P places; points and centres are x, y in raster pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

DIRECTIONS = 16
F64 = NDArray[np.float64]


@dataclass(frozen=True)
class Objects:
    """Labelled objects of one image: ``centres_P2``, and half of their widths and heights, 0 of a point."""

    centres_P2: F64
    halves_P2: F64

    @classmethod
    def points(cls, points_P2: F64) -> Objects:
        return cls(points_P2, np.zeros_like(points_P2))

    @classmethod
    def boxes(cls, xywh_P4: F64) -> Objects:
        halves_P2 = xywh_P4[:, 2:] / 2
        return cls(xywh_P4[:, :2] + halves_P2, halves_P2)

    def semi_axes(self, distance_px: float) -> F64:
        """Of the ellipse [P, 2] through the corners of each object, widened by a distance; a circle round a point."""
        widened: F64 = self.halves_P2 * np.sqrt(2) + distance_px
        return widened


def ring_places(objects: Objects, ring_px: tuple[float, float], size: tuple[int, int]) -> F64:
    """Places [P, 2] around each object, half way between the two distances of ``ring_px`` from it.

    Those outside of an image of ``size`` (width, height), and those closer to any object than the first, are left out.
    """
    inner, outer = ring_px
    angle = np.arange(DIRECTIONS) * 2 * np.pi / DIRECTIONS
    direction_K2 = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    axes_P2 = objects.semi_axes((inner + outer) / 2)
    places = (objects.centres_P2[:, None] + direction_K2 * axes_P2[:, None]).reshape(-1, 2)
    places = places[inside(places, size)]
    offset = (places[:, None] - objects.centres_P2) / np.maximum(objects.semi_axes(inner), 1e-9)
    free = ((offset**2).sum(axis=2) >= 1 - 1e-9).all(axis=1)
    return np.asarray(places[free])


def inside(places_P2: F64, size: tuple[int, int]) -> NDArray[np.bool_]:
    """Which places are in an image of ``size`` (width, height)."""
    return np.asarray(((places_P2 >= 0) & (places_P2 < size)).all(axis=1))


def looked_up(mask_HW: NDArray[np.uint8], places_P2: F64) -> NDArray[np.uint8]:
    """Values [P] of the pixels that places lie in."""
    cols, rows = places_P2.astype(np.int64).T
    return np.asarray(mask_HW[rows, cols])
