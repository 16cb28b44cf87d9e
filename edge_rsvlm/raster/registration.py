"""How far the earlier of two dates lies off the later one, though their coordinates say that they agree.

The shift is measured in windows spread over the scene by phase correlation (Kuglin & Hines 1975) of the directions of
their gradients (Fitch et al. 2002, "Orientation correlation"), which light, season and single changes move little: of
labelled pairs that lie years apart more windows agree than by band means or gradient magnitudes. The peak is placed
between pixels by a finer inverse transform around it (Guizar-Sicairos et al. 2008). Windows whose peak does not stand
out say nothing; of the others a median, or a plane where the shift clearly varies, is what most agree on.

Letters: M windows, P pixels of a window's side.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edge_rsvlm.errors import InputError
from edge_rsvlm.raster.reader import Raster
from edge_rsvlm.raster.shift import Shift
from edge_rsvlm.types import Window

Floats = NDArray[np.float64]

WINDOWS_PER_SIDE = 5
SMALL_PX, LARGE_PX = 128, 256
"""Sides of a window; large ones from LARGE_FROM_PX pixels of the raster's shorter side on."""
LARGE_FROM_PX = 1280
LEAST_VALID = 0.5
"""Share of a window that must be valid in both dates."""
PASS_CYCLES = 0.25
"""Standard deviation of the low pass, in cycles per pixel: what is finer is noise and resampling."""
LOBE_PX = 5
"""The second peak is looked for farther than this from the first."""
CONFIDENT = 1.6
"""Least ratio of the first peak to the second: false peaks of the labelled pairs stayed below 1.5."""
FINE_STEPS = 20
"""Per pixel, of the finer transform."""
LEAST_AGREEING = 3
LEAST_FOR_PLANE = 9
AGREE_PX = (0.3, 1.0)
"""Least and greatest residual of a window that agrees; between them it is three robust deviations."""
VARIES_PX = 0.5
"""A plane must span more than this over the windows."""
STILL_PX = 0.05
"""Less is not corrected: it is what the measurement itself may be off."""
LIMIT_PX = 8.0
"""Along an axis. What lies farther off was placed wrongly, which its owner should know."""
MOST_MOVED_PX = 2 * LIMIT_PX
"""Along an axis, at a corner of a raster between whose windows the shift varies as far as it may."""
MAD_TO_DEVIATION = 1.4826


@dataclass(frozen=True)
class _Measured:
    """Shifts [M, 2] at the windows' centres [M, 2], those of confident windows; raster pixels."""

    centre_M2: Floats
    shift_M2: Floats

    def __len__(self) -> int:
        return len(self.shift_M2)


def estimate_shift(before: Raster, after: Raster, decimation: int = 1) -> Shift:
    """The shift between two rasters of one grid, read at the overview that ``decimation`` names.

    Raises InputError where it exceeds LIMIT_PX.
    """
    size = np.array([after.georeference.width, after.georeference.height], np.float64)
    to_raster = size / after.size_at(decimation)
    found: list[tuple[float, ...]] = []
    windows = 0
    for window in _windows(*after.size_at(decimation)):
        planes = [_plane(raster, window, decimation) for raster in (before, after)]
        if min(float(np.isfinite(plane).mean()) for plane in planes) < LEAST_VALID:
            continue
        windows += 1
        dx, dy, ratio = correlate(*planes)
        if ratio >= CONFIDENT:
            found.append((window.col + window.width / 2, window.row + window.height / 2, dx, dy))
    values = np.array(found, np.float64).reshape(-1, 4) * np.tile(to_raster, 2)
    measured = _Measured(values[:, :2], values[:, 2:])
    shift = _consensus(measured, windows, (float(size[0] / 2), float(size[1] / 2)))
    _check_limit(shift, measured, before.name, after.name)
    return shift


def _windows(width: int, height: int) -> Iterator[Window]:
    """At most WINDOWS_PER_SIDE along each axis, spread evenly; none on a raster smaller than one."""
    side = LARGE_PX if min(width, height) >= LARGE_FROM_PX else SMALL_PX
    if min(width, height) < side:
        return
    for row, col in itertools.product(_starts(height, side), _starts(width, side)):
        yield Window(col, row, side, side)


def _starts(size: int, side: int) -> list[int]:
    """They overlap by half at most."""
    count = min(WINDOWS_PER_SIDE, (size - side) * 2 // side + 1)
    return [int(v) for v in np.linspace(0, size - side, count)]


def _plane(raster: Raster, window: Window, decimation: int) -> Floats:
    """The mean of the visible bands [P, P], not a number where invalid."""
    pixels = raster.read(window, decimation)
    visible = [i for i, role in enumerate(raster.band_roles) if role in ("red", "green", "blue", "gray")]
    mean_PP = pixels.data_CHW[visible or slice(None)].mean(axis=0, dtype=np.float64)
    return np.where(pixels.valid_HW > 0, mean_PP, np.nan)


def correlate(before_PP: Floats, after_PP: Floats) -> tuple[float, float, float]:
    """(dx, dy, ratio of the first peak to the second) of two square windows; what is not a number does not count."""
    side = len(after_PP)
    before, after = (np.fft.fft2(_directions(plane) * _hann(side)) for plane in (before_PP, after_PP))
    cross = before * np.conj(after)
    size = np.abs(cross)
    phase = cross / np.maximum(size, max(float(size.max()) * 1e-12, 1e-300)) * _low_pass(side)
    peaks = np.fft.ifft2(phase).real
    row, col = np.unravel_index(int(peaks.argmax()), peaks.shape)
    apart = np.hypot(_around(side, int(row))[:, None], _around(side, int(col)))
    second = float(peaks[apart > LOBE_PX].max())
    dx, dy = _refined(phase, int(col), int(row))
    return dx, dy, float(peaks[row, col]) / second if second > 0 else 0.0


def _directions(plane_PP: Floats) -> NDArray[np.complex128]:
    """Gradients as complex numbers, shortened towards unit length; 0 at the border and beside what is not a number."""
    field = np.zeros(plane_PP.shape, np.complex128)
    field[1:-1, 1:-1].real = plane_PP[1:-1, 2:] - plane_PP[1:-1, :-2]
    field[1:-1, 1:-1].imag = plane_PP[2:, 1:-1] - plane_PP[:-2, 1:-1]
    field[~np.isfinite(field)] = 0
    length = np.abs(field)
    some = length[length > 0]
    return field / (length + np.median(some)) if len(some) else field


def _hann(side: int) -> Floats:
    ramp = np.hanning(side + 2)[1:-1]
    return np.outer(ramp, ramp)


def _low_pass(side: int) -> Floats:
    cycles = np.fft.fftfreq(side)
    ramp = np.exp(-0.5 * (cycles / PASS_CYCLES) ** 2)
    return np.outer(ramp, ramp)


def _around(side: int, at: int) -> NDArray[np.int64]:
    """Distances [P] from a place on an axis that is closed to a ring."""
    return (np.arange(side) - at + side // 2) % side - side // 2


def _refined(phase_PP: NDArray[np.complex128], col: int, row: int) -> tuple[float, float]:
    """The peak (x, y) within a pixel of (col, row), in steps of 1 / FINE_STEPS."""
    side = len(phase_PP)
    cycles = np.fft.fftfreq(side)
    steps = np.arange(-FINE_STEPS, FINE_STEPS + 1) / FINE_STEPS
    x, y = ((at + side // 2) % side - side // 2 + steps for at in (col, row))
    fine = (np.exp(2j * np.pi * np.outer(y, cycles)) @ phase_PP @ np.exp(2j * np.pi * np.outer(cycles, x))).real
    best_y, best_x = np.unravel_index(int(fine.argmax()), fine.shape)
    return float(x[best_x]), float(y[best_y])


def _consensus(measured: _Measured, windows: int, centre_xy: tuple[float, float]) -> Shift:
    """What most confident windows agree on: one shift, a plane where they clearly lie on one, else nothing."""
    if len(measured) < LEAST_AGREEING:
        return Shift(windows=windows, centre_xy=centre_xy)
    middle = np.median(measured.shift_M2, axis=0)
    residual_M = np.hypot(*(measured.shift_M2 - middle).T)
    agree_M = residual_M <= _tolerance(residual_M)
    found = np.zeros((3, 2))
    found[0] = np.mean(measured.shift_M2[agree_M], axis=0) if agree_M.any() else middle
    plane = _plane_of_most(measured)
    if plane is not None and plane[1].sum() >= agree_M.sum() and _clearly_varies(measured, *plane):
        found, agree_M = plane
    if agree_M.sum() < max(LEAST_AGREEING, math.ceil(len(measured) / 2)):
        return Shift(windows=windows, centre_xy=centre_xy)
    dx, dy = ((float(a), float(b), float(c)) for a, b, c in found.T)
    shift = Shift(dx, dy, windows, int(agree_M.sum()), centre_xy)
    return shift if shift.largest_px >= STILL_PX else Shift((0.0,) * 3, (0.0,) * 3, windows, shift.agreeing, centre_xy)


def _tolerance(residual_M: Floats) -> float:
    return float(np.clip(3 * MAD_TO_DEVIATION * np.median(residual_M), *AGREE_PX))


def _plane_of_most(measured: _Measured) -> tuple[Floats, NDArray[np.bool_]] | None:
    """Coefficients [3, 2] of x and y, and which windows agree; by least median of squares (Rousseeuw 1984).

    Every plane through three windows is tried, the best is fitted to those that agree with it.
    """
    if len(measured) < LEAST_FOR_PLANE:
        return None
    place_M3 = np.column_stack([np.ones(len(measured)), measured.centre_M2])
    threes = np.array(list(itertools.combinations(range(len(measured)), 3)))
    spread = np.linalg.det(place_M3[threes])
    threes = threes[np.abs(spread) > np.abs(spread).max() / 8]
    if not len(threes):
        return None
    planes = np.linalg.solve(place_M3[threes], measured.shift_M2[threes])
    residual = np.linalg.norm(place_M3 @ planes - measured.shift_M2, axis=2)
    best = int(np.median(residual, axis=1).argmin())
    agree_M: NDArray[np.bool_] = residual[best] <= _tolerance(residual[best])
    fitted = np.linalg.lstsq(place_M3[agree_M], measured.shift_M2[agree_M], rcond=None)[0]
    return np.asarray(fitted, np.float64), agree_M


def _clearly_varies(measured: _Measured, plane: Floats, agree_M: NDArray[np.bool_]) -> bool:
    """Whether enough windows lie on a plane, which spans more than the windows scatter about it."""
    if agree_M.sum() < LEAST_FOR_PLANE:
        return False
    on_plane = np.column_stack([np.ones(len(measured)), measured.centre_M2]) @ plane
    scatter = np.sqrt(np.mean((measured.shift_M2 - on_plane)[agree_M] ** 2))
    span = np.ptp(on_plane[agree_M], axis=0).max()
    return bool(span > max(VARIES_PX, 4 * scatter))


def _check_limit(shift: Shift, measured: _Measured, before: str, after: str) -> None:
    """Where it was measured: at the corners a plane may well be a little beyond."""
    if not shift.corrected:
        return
    shifts = np.array([shift.at(x, y) for x, y in measured.centre_M2])
    worst = shifts[np.abs(shifts).max(axis=1).argmax()]
    if np.abs(worst).max() > LIMIT_PX:
        raise InputError(
            f"{before} lies {worst[0]:.1f} pixels to the right of {after} and {worst[1]:.1f} below it, and up to "
            f"{LIMIT_PX:g} can be corrected",
            fix="bring it there first: gdal_edit.py -a_ullr moves its coordinates, ground control points bend it",
        )
