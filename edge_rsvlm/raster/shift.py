"""Where the earlier of two dates shows what the later one does, though their coordinates say that they agree."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Plane = tuple[float, float, float]
"""value = first + second * x + third * y."""
Place = TypeVar("Place", float, Floats)


@dataclass(frozen=True)
class Shift:
    """What lies at (x, y) of AFTER lies at (x + dx, y + dy) of BEFORE; raster pixels, both linear in x and y.

    ``windows`` were compared; ``agreeing`` of them say what it is, none where it could not be measured. ``centre_xy``
    is the middle of the raster.
    """

    dx: Plane = (0.0, 0.0, 0.0)
    dy: Plane = (0.0, 0.0, 0.0)
    windows: int = 0
    agreeing: int = 0
    centre_xy: tuple[float, float] = (0.0, 0.0)

    def at(self, x: Place, y: Place) -> tuple[Place, Place]:
        """(dx, dy) at a point, or at arrays of them."""
        (a, b, c), (d, e, f) = self.dx, self.dy
        return a + b * x + c * y, d + e * x + f * y

    def in_units_of(self, x_px: float, y_px: float) -> Shift:
        """The same in pixels that are ``x_px`` of these wide and ``y_px`` high."""
        (a, b, c), (d, e, f) = self.dx, self.dy
        centre_xy = self.centre_xy[0] / x_px, self.centre_xy[1] / y_px
        dx, dy = (a / x_px, b, c * y_px / x_px), (d / y_px, e * x_px / y_px, f)
        return replace(self, dx=dx, dy=dy, centre_xy=centre_xy)

    @property
    def corners(self) -> Floats:
        """The shift [4, 2] at the raster's corners, between which it lies everywhere."""
        width, height = (2 * v for v in self.centre_xy)
        return np.array([self.at(x, y) for x, y in itertools.product((0.0, width), (0.0, height))])

    @property
    def largest_px(self) -> float:
        """Along an axis, anywhere on the raster."""
        return float(np.abs(self.corners).max())

    @property
    def checked(self) -> bool:
        return self.agreeing > 0

    @property
    def varies(self) -> bool:
        return any((*self.dx[1:], *self.dy[1:]))

    @property
    def corrected(self) -> bool:
        return any((*self.dx, *self.dy))

    def record(self) -> dict[str, object]:
        """As in ``--json``; ``shift_px`` is that at the raster's middle."""
        return {
            "shift_px": [round(v, 2) for v in self.at(*self.centre_xy)],
            "windows": self.windows,
            "agreeing": self.agreeing,
            "varies": self.varies,
            "corrected": self.corrected,
        }


STILL = Shift()
