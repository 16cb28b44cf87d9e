"""Where a drone's frame lies, from what the drone wrote into it: about, since its GPS and gimbal say so and no more.

The camera is a pinhole at the GPS position, at its height above the take-off point, and the ground is flat there.
Exif 2.32 (CIPA DC-008) gives position and focal length; the 35 mm equivalent is by the diagonal (CIPA DCG-001). XMP of
DJI gives height and angles: yaw clockwise from north, pitch 0 at the horizon and -90 straight down, roll clockwise;
angles of the gimbal, unlike those of the flight, are relative to the Earth (DJI, "Meta Data of Photos").
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rasterio import warp
from rasterio.crs import CRS

from edge_rsvlm.geo import LONLAT, WGS84, affine_through, apply, spread_over
from edge_rsvlm.raster.embedded import Embedded, read_embedded
from edge_rsvlm.types import Georeference

NOTE = "position is approximate: from the drone's own GPS and gimbal, flat ground assumed"
PIXELS = "results are in pixel coordinates"
DJI = "{http://www.dji.com/drone-dji/1.0/}"
NADIR_WITHIN_DEG = 10.0
"""An affine transform shows a view tilted by more too wrongly."""
DIAGONAL_35_MM = math.hypot(36, 24)
UNIT_MM = {2.0: 25.4, 3.0: 10.0}
"""Of FocalPlaneResolutionUnit."""
FOCAL_AGREE, ASPECT_AGREE = 0.1, 0.01
HEIGHT_RANGE_M = (1.0, 10_000.0)
UTM_LATITUDES = (-80.0, 84.0)


class Unusable(Exception):
    """What a frame lacks to be placed."""


@dataclass(frozen=True)
class Camera:
    """A pinhole camera: ``focal_px`` over an image of (width, height), ``height_m`` above the ground.

    Angles in degrees, of the gimbal: ``yaw`` clockwise from north, ``pitch`` -90 straight down.
    """

    lon: float
    lat: float
    height_m: float
    yaw: float
    pitch: float
    roll: float
    focal_px: float
    size: tuple[int, int]

    @property
    def axes_33(self) -> NDArray[np.float64]:
        """Columns: where the image's right and down and the view's direction point, as (north, east, down)."""
        yaw, pitch, roll = np.radians([self.yaw, self.pitch, self.roll])
        turn = np.array([[np.cos(yaw), -np.sin(yaw), 0], [np.sin(yaw), np.cos(yaw), 0], [0, 0, 1]])
        tilt = np.array([[np.cos(pitch), 0, np.sin(pitch)], [0, 1, 0], [-np.sin(pitch), 0, np.cos(pitch)]])
        bank = np.array([[1, 0, 0], [0, np.cos(roll), -np.sin(roll)], [0, np.sin(roll), np.cos(roll)]])
        forward_right_down: NDArray[np.float64] = turn @ tilt @ bank
        return forward_right_down[:, [1, 2, 0]]

    @property
    def off_nadir_deg(self) -> float:
        """Between the view's direction and straight down."""
        return math.degrees(math.acos(float(np.clip(self.axes_33[2, 2], -1, 1))))

    def ground(self, xy_N2: NDArray[np.float64]) -> NDArray[np.float64]:
        """Pixels [N, 2] -> metres north and east [N, 2] of the point below the camera; only of rays that go down."""
        centred_N2 = (xy_N2 - np.array(self.size) / 2) / self.focal_px
        rays_N3 = np.column_stack([centred_N2, np.ones(len(xy_N2))]) @ self.axes_33.T
        ground_N2: NDArray[np.float64] = rays_N3[:, :2] * (self.height_m / rays_N3[:, 2:])
        return ground_N2


def place_by_flight(dataset: Any) -> tuple[Georeference | None, tuple[str, ...]]:
    """The georeference of a drone's frame in UTM, and what the user should know of it.

    (None, ()) for what is no drone's frame. One that cannot be placed, as in an oblique view, has none, and the note
    says why.
    """
    embedded = read_embedded(dataset)
    if "GPSLatitude" not in embedded.exif and not any(name.startswith(DJI) for name in embedded.xmp):
        return None, embedded.complaints
    try:
        camera = _camera(embedded, (dataset.width, dataset.height))
        return _placed(camera)
    except Unusable as exc:
        return None, (*embedded.complaints, f"it has no place on the ground, since {exc}: {PIXELS}")


def _placed(camera: Camera) -> tuple[Georeference, tuple[str, ...]]:
    if not UTM_LATITUDES[0] <= camera.lat <= UTM_LATITUDES[1]:
        raise Unusable("UTM does not reach there")
    if camera.pitch > 0:
        raise Unusable("the camera looked above the horizon")
    if camera.off_nadir_deg > NADIR_WITHIN_DEG:
        raise Unusable(f"the camera looked {camera.off_nadir_deg:.0f} degrees from straight down")
    width, height = camera.size
    xy_N2 = spread_over(width, height)
    crs = _utm(camera)
    crs_N2 = _projected(camera, camera.ground(xy_N2), crs)
    transform = affine_through(xy_N2, crs_N2)
    off_m = float(np.hypot(*(apply(transform, xy_N2) - crs_N2).T).max())
    tilted = (
        f", and corners are off by up to {off_m:.0f} m: the camera looked {camera.off_nadir_deg:.0f} degrees from "
        "straight down"
    )
    note = NOTE + tilted if off_m >= 1 else NOTE
    return Georeference(width, height, crs.to_wkt(), transform), (note,)


def _utm(camera: Camera) -> CRS:
    zone = min(int((camera.lon + 180) // 6) + 1, 60)
    return CRS.from_epsg((32600 if camera.lat >= 0 else 32700) + zone)


def _projected(camera: Camera, north_east_N2: NDArray[np.float64], crs: CRS) -> NDArray[np.float64]:
    """Coordinates [N, 2] of points that lie so many metres from the camera; yaw is from true north, not the grid's."""
    lonlat = []
    for north, east in north_east_N2:
        found = WGS84.Direct(camera.lat, camera.lon, math.degrees(math.atan2(east, north)), math.hypot(north, east))
        lonlat.append((found["lon2"], found["lat2"]))
    return np.stack(warp.transform(LONLAT, crs, *zip(*lonlat, strict=True)), axis=1)


def _camera(embedded: Embedded, size: tuple[int, int]) -> Camera:
    """Unusable where something is missing or makes no sense."""
    if embedded.exif.get("Orientation", "1") != "1":
        raise Unusable("it is stored turned")
    lat, lon = _degrees(embedded, "GPSLatitude", "NS"), _degrees(embedded, "GPSLongitude", "EW")
    if abs(lat) > 90 or abs(lon) > 180 or lat == lon == 0:
        raise Unusable("its GPS had no position")
    height_m = _flown(embedded, "RelativeAltitude")
    if not HEIGHT_RANGE_M[0] <= height_m <= HEIGHT_RANGE_M[1]:
        raise Unusable(f"it flew {height_m:g} m above its take-off")
    yaw = "GimbalYawDegree" if DJI + "GimbalYawDegree" in embedded.xmp else "FlightYawDegree"
    roll = _flown(embedded, "GimbalRollDegree") if DJI + "GimbalRollDegree" in embedded.xmp else 0.0
    pitch = _flown(embedded, "GimbalPitchDegree")
    return Camera(lon, lat, height_m, _flown(embedded, yaw), pitch, roll, _focal_px(embedded, size), size)


def _flown(embedded: Embedded, name: str) -> float:
    value = embedded.xmp_number(DJI + name)
    if value is None:
        raise Unusable(f"its XMP says nothing of drone-dji:{name}")
    return value


def _degrees(embedded: Embedded, tag: str, signs: str) -> float:
    """GDAL writes six digits of each number, which is too coarse for degrees alone."""
    parts, sign = embedded.exif_numbers(tag), embedded.exif.get(f"{tag}Ref", "")[:1]
    if len(parts) != 3 or not sign or sign not in signs or parts[0] % 1:
        raise Unusable(f"its {tag} is not in degrees, minutes and seconds")
    degrees = parts[0] + parts[1] / 60 + parts[2] / 3600
    return -degrees if sign == signs[1] else degrees


def _focal_px(embedded: Embedded, size: tuple[int, int]) -> float:
    """Focal length in pixels of the image: by the sensor's resolution, else by the 35 mm equivalent."""
    width, height = size
    taken_wh = embedded.exif_number("PixelXDimension") or width, embedded.exif_number("PixelYDimension") or height
    if abs(taken_wh[0] * height / (taken_wh[1] * width) - 1) > ASPECT_AGREE:
        raise Unusable("it was cropped")
    if embedded.exif_number("DigitalZoomRatio") not in (None, 0, 1):
        raise Unusable("it was zoomed digitally")
    found = []
    per_unit, unit_mm = embedded.exif_number("FocalPlaneXResolution"), _unit_mm(embedded)
    focal_mm, focal_35_mm = embedded.exif_number("FocalLength"), embedded.exif_number("FocalLengthIn35mmFilm")
    if per_unit and unit_mm and focal_mm:
        found.append(focal_mm * per_unit / unit_mm * width / taken_wh[0])
    if focal_35_mm:
        found.append(focal_35_mm / DIAGONAL_35_MM * math.hypot(width, height))
    if not found:
        raise Unusable("its Exif has neither FocalLengthIn35mmFilm nor FocalPlaneXResolution")
    if min(found) <= 0 or max(found) / min(found) > 1 + FOCAL_AGREE:
        raise Unusable("its focal lengths contradict each other")
    return found[0]


def _unit_mm(embedded: Embedded) -> float | None:
    return UNIT_MM.get(embedded.exif_number("FocalPlaneResolutionUnit") or 2.0)  # inches where it is not said
