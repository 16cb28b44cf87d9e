"""From raster pixels to places on Earth: RFC 7946 geometry, geodesic areas, true ground resolution.

Raster pixel coordinates are edges (pixel (0, 0) spans 0..1), so pixel-is-point files need no special case: GDAL has
moved their origin already.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from affine import Affine
from geographiclib.geodesic import Geodesic
from numpy.typing import NDArray
from rasterio import warp
from rasterio.control import GroundControlPoint as RasterioPoint
from rasterio.crs import CRS
from rasterio.errors import CRSError
from rasterio.transform import GCPTransformer, RPCTransformer

from edge_rsvlm.types import Georeference

Ring = NDArray[np.float64]
WGS84 = Geodesic.WGS84
LONLAT = CRS.from_epsg(4326)
EARTH_SEMI_MAJOR_M = 6_378_137.0
DECIMALS = 7  # of a degree: 1 cm
PIXEL_DECIMALS = 2
LONGEST_SIDE_PX = 64
FIT_POINTS = 9
"""Along each side of a raster."""


class PixelMapper:
    """Maps raster pixels to WGS 84. ``georeference`` None, no CRS, or a CRS of another body: nothing is ``located``."""

    def __init__(self, georeference: Georeference | None) -> None:
        self._georeference = georeference
        self.warning: str | None = None
        self.located = False
        if georeference is None or georeference.crs_wkt is None:
            return
        if not on_earth(georeference.crs_wkt):
            self.warning = "its coordinate system is not on Earth: results are in pixel coordinates"
            return
        by_affine, by_points = georeference.transform is not None, len(georeference.gcps) >= 3
        self.located = by_affine or by_points or georeference.rpcs is not None
        if not self.located:
            self.warning = "it has a coordinate system but no transform: results are in pixel coordinates"

    @cached_property
    def _gcp_transformer(self) -> Any:
        assert self._georeference is not None
        points = [RasterioPoint(row=p.row, col=p.col, x=p.x, y=p.y) for p in self._georeference.gcps]
        return GCPTransformer(points)

    @cached_property
    def _rpc_transformer(self) -> Any:
        assert self._georeference is not None
        return RPCTransformer(self._georeference.rpcs)

    def to_crs(self, xy_N2: NDArray[np.float64]) -> NDArray[np.float64]:
        """Raster pixels [N, 2] -> coordinates of the raster's CRS [N, 2]."""
        assert self._georeference is not None
        if self._georeference.transform is not None:
            return apply(self._georeference.transform, xy_N2)
        if self._georeference.rpcs is not None:
            heights = np.full(len(xy_N2), self._georeference.height_m)
            x, y = self._rpc_transformer.xy(xy_N2[:, 1], xy_N2[:, 0], zs=heights, offset="ul")
        else:
            x, y = self._gcp_transformer.xy(xy_N2[:, 1], xy_N2[:, 0], offset="ul")
        return np.stack([np.asarray(x, np.float64), np.asarray(y, np.float64)], axis=1)

    @cached_property
    def _crs(self) -> CRS | None:
        """None where coordinates are WGS 84 longitude and latitude already."""
        assert self._georeference is not None and self._georeference.crs_wkt is not None
        crs = CRS.from_wkt(self._georeference.crs_wkt)
        return None if crs == LONLAT else crs

    def to_lonlat(self, xy_N2: NDArray[np.float64]) -> NDArray[np.float64]:
        """Raster pixels [N, 2] -> longitude and latitude in degrees [N, 2]; infinite where the CRS is not defined.

        Only where ``located``.
        """
        crs_xy = self.to_crs(np.asarray(xy_N2, np.float64).reshape(-1, 2))
        if self._crs is None or not len(crs_xy):
            return crs_xy
        found = _transformed(self._crs, crs_xy)
        if found is None:
            # One point outside the projection's domain fails the whole call.
            alone = [_transformed(self._crs, point[None]) for point in crs_xy]
            found = np.concatenate([np.full((1, 2), np.inf) if point is None else point for point in alone])
        return found


def _transformed(crs: CRS, xy_N2: NDArray[np.float64]) -> NDArray[np.float64] | None:
    """Longitudes and latitudes [N, 2], or None when a point has none."""
    try:
        lon, lat = warp.transform(crs, LONLAT, xy_N2[:, 0], xy_N2[:, 1])
    except Exception as exc:
        if "CPLE" not in type(exc).__name__:
            raise
        return None
    return np.stack([lon, lat], axis=1)


def apply(transform: Affine, xy_N2: NDArray[np.float64]) -> NDArray[np.float64]:
    """Points [N, 2] through an affine transform."""
    x, y = xy_N2.T
    a, b, c, d, e, f = transform[:6]
    return np.stack([a * x + b * y + c, d * x + e * y + f], axis=1)


def spread_over(width: int, height: int) -> NDArray[np.float64]:
    """Points [N, 2] evenly over a raster, its edges among them."""
    grid = np.meshgrid(np.linspace(0, width, FIT_POINTS), np.linspace(0, height, FIT_POINTS))
    return np.stack(grid, axis=-1).reshape(-1, 2)


def affine_through(from_N2: NDArray[np.float64], to_N2: NDArray[np.float64]) -> Affine:
    """The affine transform nearest to ``from`` -> ``to``, by least squares; ValueError where all lie on one line."""
    x0, y0 = to_N2.mean(axis=0)
    from_N3 = np.column_stack([from_N2, np.ones(len(from_N2))])
    (a, d), (b, e), (c, f) = np.linalg.lstsq(from_N3, to_N2 - (x0, y0), rcond=None)[0]
    if math.isclose(a * e, b * d, rel_tol=1e-9):
        raise ValueError("its pixels lie on one line of the ground")
    return Affine(a, b, c + x0, d, e, f + y0)


def fitted(georeference: Georeference) -> tuple[Affine, float]:
    """The affine transform that is nearest to where a located raster lies, and how far it is off at most, in pixels.

    ValueError where its pixels have no place.
    """
    if georeference.transform is not None:
        return georeference.transform, 0.0
    xy_N2 = spread_over(georeference.width, georeference.height)
    crs_N2 = PixelMapper(georeference).to_crs(xy_N2)
    if not np.isfinite(crs_N2).all():
        raise ValueError("its pixels have no place on the ground")
    transform = affine_through(xy_N2, crs_N2)
    return transform, float(np.hypot(*(apply(~transform, crs_N2) - xy_N2).T).max())


def between(source: Georeference, target: Georeference) -> Callable[[NDArray[np.float64]], NDArray[np.float64]]:
    """From pixels [N, 2] of one raster to those of another that shows the same ground.

    Rasters without a place on Earth are taken pixel by pixel. Raises ValueError where the target's pixels have none.
    """
    mapper = PixelMapper(source)
    if source == target or not (mapper.located and PixelMapper(target).located):
        return lambda xy_N2: xy_N2
    assert target.crs_wkt is not None
    crs, to_pixels = CRS.from_wkt(target.crs_wkt), ~fitted(target)[0]

    def move(xy_N2: NDArray[np.float64]) -> NDArray[np.float64]:
        lon_N, lat_N = mapper.to_lonlat(xy_N2).T
        return apply(to_pixels, np.stack(warp.transform(LONLAT, crs, lon_N, lat_N), axis=1))

    return move


def on_earth(crs_wkt: str) -> bool:
    """Whether a CRS is geographic or projected on an ellipsoid of Earth's size; local and planetary ones are not."""
    try:
        crs = CRS.from_wkt(crs_wkt)
    except CRSError:
        return False
    semi_major = _semi_major_m(crs_wkt)
    earthly = semi_major is None or abs(semi_major / EARTH_SEMI_MAJOR_M - 1) < 0.01
    return earthly and bool(crs.is_geographic or crs.is_projected)


def _semi_major_m(crs_wkt: str) -> float | None:
    """Semi-major axis of the first ellipsoid that a WKT names."""
    for keyword in ("SPHEROID[", "ELLIPSOID["):
        _, found, rest = crs_wkt.partition(keyword)
        if found:
            after_name = rest.split('"', 2)[2]
            return float(after_name.lstrip(",").split(",")[0])
    return None


def metres_per_pixel(georeference: Georeference) -> tuple[float, float] | None:
    """True ground metres per pixel along the columns and rows at the raster's centre, or None where not located.

    Geodesic, since degrees and Web Mercator metres are not ground metres (Karney 2013, "Algorithms for geodesics").
    """
    mapper = PixelMapper(georeference)
    if not mapper.located:
        return None
    x, y = georeference.width / 2, georeference.height / 2
    lonlat = mapper.to_lonlat(np.array([[x - 0.5, y], [x + 0.5, y], [x, y - 0.5], [x, y + 0.5]]))
    if not np.isfinite(lonlat).all():
        return None
    left, right, top, bottom = lonlat[:, ::-1]
    across = WGS84.Inverse(*left, *right)["s12"]
    down = WGS84.Inverse(*top, *bottom)["s12"]
    return (float(across), float(down)) if across > 0 and down > 0 else None


def box_ring(xyxy: NDArray[np.float64]) -> Ring:
    """The closed ring of a box."""
    x0, y0, x1, y1 = xyxy
    return np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1], [x0, y0]], np.float64)


def area_m2(rings_px: Sequence[Ring], mapper: PixelMapper) -> float | None:
    """Geodesic area of a polygon (exterior, then holes) in raster pixels, or None where it has no place on Earth."""
    if not mapper.located:
        return None
    lonlat = [mapper.to_lonlat(_dense(ring)) for ring in rings_px]
    if not all(np.isfinite(ring).all() for ring in lonlat):
        return None
    exterior, *holes = (_geodesic_area(ring) for ring in lonlat)
    return exterior - sum(holes)


def _dense(ring_M2: Ring) -> Ring:
    """More points on long sides, since a straight line of the raster is not a geodesic."""
    steps = np.diff(ring_M2, axis=0)
    parts = np.maximum(np.ceil(np.abs(steps).max(axis=1) / LONGEST_SIDE_PX), 1).astype(int)
    side = np.repeat(np.arange(len(parts)), parts)
    share = (np.arange(len(side)) - np.repeat(np.cumsum(parts) - parts, parts)) / parts[side]
    return np.concatenate([ring_M2[side] + steps[side] * share[:, None], ring_M2[-1:]])


def _geodesic_area(lonlat_M2: NDArray[np.float64]) -> float:
    polygon = WGS84.Polygon()
    for lon, lat in lonlat_M2[:-1]:
        polygon.AddPoint(lat, lon)
    return abs(float(polygon.Compute()[2]))


def feature_geometry(rings_px: Sequence[Ring], mapper: PixelMapper) -> dict[str, Any] | None:
    """RFC 7946 geometry of a polygon (exterior, then holes; closed) in raster pixels.

    Exteriors wind counter-clockwise, holes clockwise; seven decimals; cut where it crosses the antimeridian. Where not
    located, coordinates are raster pixels. None where a corner has no longitude and latitude, as off the disk of a
    geostationary image.
    """
    if not mapper.located:
        rings = [[[round(float(x), PIXEL_DECIMALS), round(float(y), PIXEL_DECIMALS)] for x, y in r] for r in rings_px]
        return {"type": "Polygon", "coordinates": rings}
    lonlat = [mapper.to_lonlat(ring) for ring in rings_px]
    if not all(np.isfinite(ring).all() for ring in lonlat):
        return None
    first = _unwrapped(lonlat[0], lonlat[0][0, 0])
    unwrapped = [first, *(_unwrapped(ring, first[0, 0]) for ring in lonlat[1:])]
    parts = [_written(piece) for piece in _cut_at_antimeridian(unwrapped)]
    if len(parts) == 1:
        return {"type": "Polygon", "coordinates": parts[0]}
    return {"type": "MultiPolygon", "coordinates": parts}


def _unwrapped(ring: Ring, near_lon: float) -> Ring:
    """Longitudes made continuous along the ring, which may leave [-180, 180]."""
    steps = np.diff(ring[:, 0], prepend=near_lon)
    turns = -360.0 * np.cumsum(np.rint(steps / 360.0))
    return np.stack([ring[:, 0] + turns, ring[:, 1]], axis=1)


def _cut_at_antimeridian(rings: list[Ring]) -> list[list[Ring]]:
    """The polygon's parts in each 360-degree strip, moved into [-180, 180]."""
    low, high = rings[0][:, 0].min(), rings[0][:, 0].max()
    first, last = int(np.floor((low + 180) / 360)), int(np.ceil((high + 180) / 360))
    parts = []
    for strip in range(first, max(last, first + 1)):
        west = -180.0 + 360.0 * strip
        inside = [_clip(_clip(ring, west, 1), west + 360.0, -1) for ring in rings]
        kept = [np.stack([r[:, 0] - 360.0 * strip, r[:, 1]], axis=1) for r in inside if len(r) >= 4]
        if len(inside[0]) >= 4:
            parts.append(kept)
    return parts


def _clip(ring: Ring, lon: float, side: int) -> Ring:
    """The part of a closed ring east (side 1) or west (-1) of a meridian (Sutherland & Hodgman 1974)."""
    if len(ring) == 0 or (side * (ring[:, 0] - lon) >= 0).all():
        return ring
    out: list[NDArray[np.float64]] = []
    for a, b in itertools.pairwise(ring):
        a_in, b_in = side * (a[0] - lon) >= 0, side * (b[0] - lon) >= 0
        if a_in:
            out.append(a)
        if a_in != b_in:
            t = (lon - a[0]) / (b[0] - a[0])
            out.append(np.array([lon, a[1] + t * (b[1] - a[1])]))
    if len(out) < 3:
        return np.zeros((0, 2))
    return np.array([*out, out[0]])


def _written(rings: list[Ring]) -> list[list[list[float]]]:
    """Rings wound as RFC 7946 asks and rounded; a ring that collapses in rounding is dropped, the exterior never."""
    written = []
    for i, ring in enumerate(rings):
        counter_clockwise = _signed_area(ring) > 0
        wound = ring if counter_clockwise == (i == 0) else ring[::-1]
        points = [[round(float(lon), DECIMALS), round(float(lat), DECIMALS)] for lon, lat in wound]
        if i == 0 or len({tuple(p) for p in points}) >= 3:
            written.append(points)
    return written


def _signed_area(ring: Ring) -> float:
    x, y = ring[:, 0] - ring[0, 0], ring[:, 1] - ring[0, 1]
    return float((x[:-1] * y[1:] - x[1:] * y[:-1]).sum() / 2)
