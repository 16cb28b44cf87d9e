"""What the spectrum says of a change: indices of both dates over its pixels, and what became of the ground in words.

NDVI (Rouse et al. 1974, "Monitoring vegetation systems in the Great Plains with ERTS"), NDWI (McFeeters 1996, "The use
of the Normalized Difference Water Index in the delineation of open water features") and NBR (Key & Benson 2006,
"Landscape Assessment", FIREMON). All three are (a - b) / (a + b) of two bands.

Values of the earlier date are first brought to the radiometry of the later one (``raster.radiometry``), since haze and
season move an index as changes on the ground do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_rsvlm.config.cover import APPEARED, BURNT, GAINED, GONE, LOST
from edge_rsvlm.pipeline.looks import Polygon, both_dates, parts
from edge_rsvlm.pipeline.scaling import role_bands
from edge_rsvlm.pipeline.stream import View
from edge_rsvlm.raster.bands import roles_said
from edge_rsvlm.raster.radiometry import matched, sample_both
from edge_rsvlm.types import Pixels

INDICES = {"ndvi": ("nir", "red"), "ndwi": ("green", "nir"), "nbr": ("nir", "swir2")}
VEGETATION_CHANGE, VEGETATION_LEAST = 0.15, 0.2
"""NDVI that must be lost or gained, and that must have been or be there."""
WATER_CHANGE, WATER_LEAST = 0.2, 0.1
"""NDWI likewise. Water is above 0 (McFeeters 1996), and some shadow a little; on the other date it must be below."""
BURN_CHANGE, BURN_LEAST = 0.27, 0.1
"""NBR that must be lost, from moderate severity on (Key & Benson 2006), and that must have been there."""
PIGMENTS = ("red", "blue")
"""What chlorophyll absorbs. Roofs of painted steel have the NDVI of a meadow, and are brighter in one of these."""
BRIGHT_DEVIATIONS = 1.0
"""Vegetation is no brighter there than the scene's mean by so many deviations; water is no brighter than the mean in
near infrared, which it absorbs, as roofs whose NDWI is above 0 do not."""
DECIMALS = 2
Floats = NDArray[np.float32]
Dates = tuple[float, float]
"""A value before and after."""


@dataclass(frozen=True)
class Spectral:
    """Measures regions of one pair. ``bands`` of each date by role; ``linear`` (gain, offset) brings BEFORE to AFTER,
    and ``usual`` (mean, deviation) is what a role is in AFTER's scene."""

    view: View
    bands: tuple[Mapping[str, int], Mapping[str, int]]
    linear: Mapping[str, tuple[float, float]]
    usual: Mapping[str, tuple[float, float]]

    @staticmethod
    def of(view: View) -> Spectral | None:
        """None where no index can be computed of both dates: near infrared or the names of bands are missing.

        Samples both rasters.
        """
        earlier, later = view.rasters
        before, after = role_bands(earlier), role_bands(later)
        shared = [role for role in after if role in before]
        wanted = {role for pair in INDICES.values() if set(pair) <= set(shared) for role in pair}
        if not wanted or not named(view):
            return None
        roles = [role for role in shared if role in wanted or role in PIGMENTS]
        chosen = [[lookup[role] for role in roles] for lookup in (before, after)]
        samples = sample_both(earlier, later, chosen[0], chosen[1], view.shift)
        gain_C, offset_C = matched(samples)
        linear = zip(gain_C.tolist(), offset_C.tolist(), strict=True)
        known = len(samples.after_NC) > 0
        usual = [(float(band.mean()), float(band.std())) if known else (0.0, 0.0) for band in samples.after_NC.T]
        return Spectral(
            view, (before, after), dict(zip(roles, linear, strict=True)), dict(zip(roles, usual, strict=True))
        )

    def __call__(self, polygon: Polygon, area_px: int) -> dict[str, Any] | None:
        """``{"ndvi": {"before", "after", "difference"}, ..., "meaning", "share"}``; None where no pixel is valid.

        Means over the pixels of the region that are valid in both dates; ``share`` of its pixels were.
        """
        sums, count = dict[str, NDArray[np.float64]](), 0
        for part in parts(polygon):
            dates = both_dates(self.view, part.window)
            if dates is None:
                continue
            window = dates[1].window
            rows, cols = window.row - part.window.row, window.col - part.window.col
            inside_HW = part.inside_HW[rows : rows + window.height, cols : cols + window.width]
            kept_HW = (inside_HW > 0) & (dates[0].valid_HW > 0) & (dates[1].valid_HW > 0)
            count += int(kept_HW.sum())
            for name, sum_2 in self._sums(dates, kept_HW).items():
                sums[name] = sums.get(name, np.zeros(2)) + sum_2
        if not count:
            return None
        means = {name: (float(total[0]) / count, float(total[1]) / count) for name, total in sums.items()}
        indices = {name: means[name] for name in INDICES if name in means}
        said = meaning(indices, {role: self._deviations(role, means[role]) for role in self.usual})
        written = {name: _written(dates) for name, dates in indices.items()}
        return {**written, "meaning": said, "share": round(min(count / area_px, 1.0), DECIMALS)}

    def _sums(self, dates: Sequence[Pixels], kept_HW: NDArray[np.bool_]) -> dict[str, NDArray[np.float64]]:
        """By role and by index its sums [2] over the kept pixels of each date."""
        values = [{role: self._values(date, number, role, kept_HW) for role in self.linear}
                  for number, date in enumerate(dates)]  # fmt: skip
        indices = {
            name: np.array([float(normalized_difference(of[a], of[b]).sum()) for of in values])
            for name, (a, b) in INDICES.items()
            if a in self.linear and b in self.linear
        }
        roles = {role: np.array([float(of[role].sum(dtype=np.float64)) for of in values]) for role in self.linear}
        return roles | indices

    def _values(self, date: Pixels, number: int, role: str, kept_HW: NDArray[np.bool_]) -> Floats:
        values = date.data_CHW[self.bands[number][role]][kept_HW].astype(np.float32)
        gain, offset = self.linear[role] if number == 0 else (1.0, 0.0)
        found: Floats = values * np.float32(gain) + np.float32(offset)
        return found

    def _deviations(self, role: str, dates: Dates) -> Dates:
        """How far from what is usual, in deviations of the scene."""
        mean, deviation = self.usual[role]
        before, after = ((value - mean) / deviation if deviation else 0.0 for value in dates)
        return before, after


def named(view: View) -> bool:
    """Whether both files say which band is which. The usual order of unnamed bands is a guess, and not enough here."""
    return all(roles_said(raster.dataset) for raster in view.rasters)


def normalized_difference(a: Floats, b: Floats) -> Floats:
    """(a - b) / (a + b) of values that are not negative; 0 where both are dark."""
    a, b = np.maximum(a, 0), np.maximum(b, 0)
    total = a + b
    found: Floats = np.divide(a - b, total, out=np.zeros_like(total), where=total > 0)
    return found


def meaning(indices: Mapping[str, Dates], deviations: Mapping[str, Dates]) -> str | None:
    """What became of the ground, by the first index that is sure; None where none is.

    ``deviations`` are those of each role from the scene's mean, as far as they are known.
    """
    nbr, ndwi, ndvi = (indices.get(name) for name in ("nbr", "ndwi", "ndvi"))
    nir = deviations.get("nir", (0.0, 0.0))
    pigments = [deviations[role] for role in PIGMENTS if role in deviations]
    brightest = [max((dates[date] for dates in pigments), default=0.0) for date in (0, 1)]
    if ndwi and ndwi[0] <= 0 and _rose(ndwi, WATER_CHANGE, WATER_LEAST) and nir[1] <= 0:
        return APPEARED
    if ndwi and ndwi[1] <= 0 and _rose(ndwi[::-1], WATER_CHANGE, WATER_LEAST) and nir[0] <= 0:
        return GONE
    if nbr and _rose(nbr[::-1], BURN_CHANGE, BURN_LEAST):
        return BURNT
    if ndvi and _rose(ndvi[::-1], VEGETATION_CHANGE, VEGETATION_LEAST) and brightest[0] <= BRIGHT_DEVIATIONS:
        return LOST
    if ndvi and _rose(ndvi, VEGETATION_CHANGE, VEGETATION_LEAST) and brightest[1] <= BRIGHT_DEVIATIONS:
        return GAINED
    return None


def _rose(dates: Dates, change: float, least: float) -> bool:
    return dates[1] - dates[0] >= change and dates[1] >= least


def _written(dates: Dates) -> dict[str, float]:
    before, after = (round(value, DECIMALS) for value in dates)
    return {"before": before, "after": after, "difference": round(dates[1] - dates[0], DECIMALS)}
