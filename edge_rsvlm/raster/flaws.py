"""Pixels whose values say nothing of the ground: saturated ones, clouds, and the shadows of clouds.

Saturated is a pixel at the largest 8- or 16-bit value, or twice as bright as a white surface, in most visible bands. It
is a flaw where it is so on both dates, and on one alone where such pixels cover more than a roof or an aircraft would:
CLOUD_FULL of a square of CLOUD_M, which is looked for where pixels are of COARSE_M or more.

Clouds are looked for where pixels are of COARSE_M or more and both dates give blue, green, red and near infrared as
reflectance, not in 8 bits that were stretched for the eye. A pixel is cloudy if it is bright, white and hazy and no
vegetation (Zhu & Woodcock 2012, "Object-based cloud and cloud shadow detection in Landsat imagery", whiteness, haze and
basic tests; those of short-wave and thermal infrared cannot be made), and brighter in blue than on the other date: what
is white on both is ground. A cloud is where such pixels fill CLOUD_FULL of a square of CLOUD_M, and CLOUD_EDGE_M
around. Shadows are darker than on the other date in near infrared and in visible light, over SHADOW_M, near a cloud.

All tests reach so many pixels and no farther (``reach_xy``): what is found does not depend on the window that is read.
Letters: C bands, H, W rows and columns.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edge_rsvlm.raster.moved import moved_rows, row_strips
from edge_rsvlm.raster.shift import Shift
from edge_rsvlm.types import Pixels

CLOUD, SHADOW, SATURATED = 1, 2, 3
REASONS = {CLOUD: "cloud", SHADOW: "shadow", SATURATED: "saturated"}
COARSE_M = 2.0
BRIGHT, WHITE, HAZE, GREEN = 0.15, 0.7, 0.08, 0.8
"""Mean visible reflectance; whiteness; haze offset; vegetation index."""
BRIGHTER = 0.08
"""In blue reflectance, than on the other date."""
DARKER, DIMMER, DARK = 0.65, 0.85, 0.25
"""The most that a shadow may have: of the other date's near infrared and visible light, and reflectance."""
CLOUD_M, CLOUD_FULL, CLOUD_EDGE_M = 200.0, 0.8, 150.0
SHADOW_M, SHADOW_FULL, SHADOW_EDGE_M = 50.0, 0.8, 50.0
SHADOW_FAR_M, SHADOW_FAR_PX = 1000.0, 96
"""How far from a cloud its shadow is looked for: the nearer of the two."""
MOST_REACH_PX = 127
"""Of one square: its sums are kept in 16 bits."""
TWICE_WHITE = 2.0
WORK_BYTES = 12
"""Per pixel of a window while flaws are found."""

Bools = NDArray[np.bool_]
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Optics:
    """How one raster's values tell light.

    ``visible`` are its bands of blue, green, red, or gray. ``colours`` are blue, green, red and near infrared where it
    has all four. value * ``gain`` + ``offset`` is reflectance; None where its values are none.
    """

    visible: tuple[int, ...]
    colours: tuple[int, ...] | None
    saturated_at: float
    gain: float | None = None
    offset: float = 0.0

    def saturated(self, data_CHW: NDArray[np.generic]) -> Bools:
        found = np.zeros(data_CHW.shape[1:], np.uint8)
        for band in self.visible:
            found += data_CHW[band] >= self.saturated_at
        return found * 2 > len(self.visible)

    def reflectance(self, data_CHW: NDArray[np.generic]) -> Floats:
        """Blue, green, red and near infrared [4, H, W]."""
        assert self.colours is not None and self.gain is not None
        found: Floats = data_CHW[list(self.colours)].astype(np.float32)
        found *= np.float32(self.gain)
        found += np.float32(self.offset)
        return found


@dataclass(frozen=True)
class Flaws:
    """Looks for flaws in windows of two dates whose pixels are ``metres_xy`` wide and high, where that is known."""

    before: Optics
    after: Optics
    metres_xy: tuple[float, float] | None

    @property
    def coarse(self) -> bool:
        """Whether what is larger than a roof can be told: pixels are of known size, and not too fine."""
        return self.metres_xy is not None and min(self.metres_xy) >= COARSE_M

    @property
    def clouds(self) -> bool:
        """Whether clouds and shadows are looked for."""
        return self.coarse and all(date.colours is not None for date in (self.before, self.after))

    @property
    def reasons(self) -> tuple[str, ...]:
        """What is looked for."""
        return tuple(REASONS.values()) if self.clouds else (REASONS[SATURATED],)

    def reach_xy(self) -> tuple[int, int]:
        """How far away a pixel may lie that decides on another."""
        if not self.coarse:
            return 0, 0
        half, edge, far = self._px(CLOUD_M / 2), self._px(CLOUD_EDGE_M), self._far_px()
        dark, dark_edge = self._px(SHADOW_M / 2), self._px(SHADOW_EDGE_M)
        x, y = (2 * half[i] + (edge[i] + far[i] + dark[i] + dark_edge[i] if self.clouds else 0) for i in (0, 1))
        return x, y

    def find(self, before: Pixels, after: Pixels, shift: Shift) -> NDArray[np.uint8]:
        """Flaws [H, W] of either date on AFTER's window, by code, 0 none; ``shift`` in read pixels."""
        height, width = after.valid_HW.shape
        found_HW = np.zeros((height, width), np.uint8)
        white_HW = np.zeros((height, width), bool)
        suspects = np.zeros((4 if self.clouds else 0, height, width), bool)
        for rows in row_strips(height):
            other_CHW, inside_HW = moved_rows(before.data_CHW, before.window, after.window, rows, shift)
            (valid_HW,), _ = moved_rows(before.valid_HW[None], before.window, after.window, rows, shift)
            mine_CHW, both_HW = after.data_CHW[:, rows], inside_HW & (valid_HW > 0) & (after.valid_HW[rows] > 0)
            saturated = self.after.saturated(mine_CHW), self.before.saturated(other_CHW)
            found_HW[rows][saturated[0] & saturated[1] & both_HW] = SATURATED
            white_HW[rows] = (saturated[0] | saturated[1]) & both_HW
            if self.clouds:
                mine, other = self.after.reflectance(mine_CHW), self.before.reflectance(other_CHW)
                tests = cloudy(mine, other), cloudy(other, mine), shaded(mine, other), shaded(other, mine)
                suspects[:, rows] = np.stack(tests) & both_HW
        if self.coarse:
            half = self._px(CLOUD_M / 2)
            found_HW[white_HW & grown(filled(white_HW, half, CLOUD_FULL), half)] = SATURATED
        for cloud, dark in ((0, 2), (1, 3)) if self.clouds else ():
            self._mark(found_HW, suspects[cloud], suspects[dark])
        return found_HW

    def _mark(self, found_HW: NDArray[np.uint8], cloudy_HW: Bools, dark_HW: Bools) -> None:
        """The clouds and shadows of one date."""
        core_HW = filled(cloudy_HW, self._px(CLOUD_M / 2), CLOUD_FULL)
        if not core_HW.any():
            return
        half, edge = self._px(CLOUD_M / 2), self._px(CLOUD_EDGE_M)
        cloud_HW = grown(core_HW, (half[0] + edge[0], half[1] + edge[1]))
        half, edge = self._px(SHADOW_M / 2), self._px(SHADOW_EDGE_M)
        dark_HW = filled(dark_HW, half, SHADOW_FULL) & grown(cloud_HW, self._far_px())
        found_HW[grown(dark_HW, (half[0] + edge[0], half[1] + edge[1])) & (found_HW != CLOUD)] = SHADOW
        found_HW[cloud_HW] = CLOUD

    def _px(self, metres: float) -> tuple[int, int]:
        """So many pixels along x and y, one at least."""
        assert self.metres_xy is not None
        x, y = (min(max(round(metres / size), 1), MOST_REACH_PX // 2) for size in self.metres_xy)
        return x, y

    def _far_px(self) -> tuple[int, int]:
        assert self.metres_xy is not None
        x, y = (min(math.ceil(SHADOW_FAR_M / size), SHADOW_FAR_PX) for size in self.metres_xy)
        return x, y


def cloudy(mine_4HW: Floats, other_4HW: Floats) -> Bools:
    """Pixels that are bright, white, hazy and no vegetation, and brighter in blue than on the other date."""
    blue, green, red, nir = mine_4HW
    mean = np.maximum((blue + green + red) / 3, 1e-6)
    whiteness = (np.abs(blue - mean) + np.abs(green - mean) + np.abs(red - mean)) / mean
    found: Bools = (mean > BRIGHT) & (whiteness < WHITE) & (blue - 0.5 * red > HAZE)
    found &= (nir - red < GREEN * (nir + red)) & (blue - other_4HW[0] > BRIGHTER)
    return found


def shaded(mine_4HW: Floats, other_4HW: Floats) -> Bools:
    """Pixels that are dark in near infrared, and darker than on the other date: there and, unlike bare soil, in visible
    light."""
    found: Bools = (mine_4HW[3] < DARK) & (mine_4HW[3] < DARKER * other_4HW[3])
    found &= mine_4HW[:3].sum(axis=0) < DIMMER * other_4HW[:3].sum(axis=0)
    return found


def filled(mask_HW: Bools, half_xy: tuple[int, int], share: float) -> Bools:
    """Where the square around a pixel, as far as it lies inside, is set by at least this share."""
    count_HW = _box_sum(mask_HW, half_xy)
    height, width = mask_HW.shape
    inside_W, inside_H = (
        np.minimum(np.arange(n) + half + 1, n) - np.maximum(np.arange(n) - half, 0)
        for n, half in ((width, half_xy[0]), (height, half_xy[1]))
    )
    found: Bools = count_HW >= np.float32(share) * inside_H.astype(np.float32)[:, None] * inside_W.astype(np.float32)
    return found


def grown(mask_HW: Bools, by_xy: tuple[int, int]) -> Bools:
    """Where a pixel within this reach, along each axis, is set."""
    found: Bools = _box_sum(mask_HW, by_xy) > 0
    return found


def _box_sum(mask_HW: Bools, half_xy: tuple[int, int]) -> NDArray[np.uint16]:
    """Set pixels within ``half_xy`` of each. Running sums wrap around in 16 bits; their differences are right."""
    total: NDArray[np.uint16] = mask_HW.astype(np.uint16)
    for axis, half in ((1, half_xy[0]), (0, half_xy[1])):
        size = total.shape[axis]
        running = np.insert(np.cumsum(total, axis=axis, dtype=np.uint16), 0, 0, axis=axis)
        at = np.arange(size)
        total = running.take(np.minimum(at + half + 1, size), axis) - running.take(np.maximum(at - half, 0), axis)
    return total
