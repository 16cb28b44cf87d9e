"""Two dates on one grid: BEFORE is warped onto AFTER's pixels as it is read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from affine import Affine
from rasterio.crs import CRS
from rasterio.enums import Resampling
from rasterio.transform import from_gcps
from rasterio.vrt import WarpedVRT
from rasterio.warp import transform_bounds

from edge_rsvlm.errors import InputError
from edge_rsvlm.raster.reader import Raster, describe, foreign_errors, open_raster
from edge_rsvlm.types import Georeference

SAME_GRID_PX = 0.01


@contextmanager
def open_aligned(before: str, after: Raster) -> Iterator[Raster]:
    """BEFORE on AFTER's grid: read as it is where the grids agree, else warped (bilinear) through both CRS.

    Without coordinates two images of the same size are taken pixel by pixel. Raises InputError when they cannot be
    brought together.
    """
    with open_raster(before) as raster:
        if _same_grid(raster.georeference, after.georeference):
            yield raster
            return
        target = after.georeference
        located = [g.crs_wkt is not None and (g.transform is not None or g.gcps) for g in (raster.georeference, target)]
        size_equal = _size(raster.georeference) == _size(target)
        if not any(located) and size_equal:
            yield raster
            return
        if not all(located):
            raise InputError(
                f"{before} and {after.name} cannot be aligned: coordinates or size differ",
                fix="give both a CRS, or cut both to the same pixels",
            )
        with foreign_errors(before), WarpedVRT(raster.dataset, **_grid(target)) as warped:
            _check_overlap(before, warped, raster, after)
            aligned = describe(before, warped)
            aligned.georeference = target
            yield aligned


def _size(georeference: Georeference) -> tuple[int, int]:
    return georeference.width, georeference.height


def _same_grid(a: Georeference, b: Georeference) -> bool:
    if _size(a) != _size(b) or a.crs_wkt is None or b.crs_wkt is None or a.transform is None or b.transform is None:
        return False
    if CRS.from_wkt(a.crs_wkt) != CRS.from_wkt(b.crs_wkt):
        return False
    corners = np.array([(0, 0), (a.width, 0), (0, a.height), (a.width, a.height)], np.float64)
    back = ~b.transform @ a.transform
    moved = np.array([back @ tuple(c) for c in corners])
    return bool(np.abs(moved - corners).max() < SAME_GRID_PX)


def _grid(target: Georeference) -> dict[str, Any]:
    """WarpedVRT options of a grid; ground control points are fitted by an affine transform."""
    assert target.crs_wkt is not None
    transform = target.transform if target.transform is not None else _fitted(target)
    return {
        "crs": CRS.from_wkt(target.crs_wkt),
        "transform": transform,
        "width": target.width,
        "height": target.height,
        "resampling": Resampling.bilinear,
        "add_alpha": True,
    }


def _fitted(target: Georeference) -> Affine:
    from rasterio.control import GroundControlPoint

    return from_gcps([GroundControlPoint(row=p.row, col=p.col, x=p.x, y=p.y) for p in target.gcps])


def _check_overlap(before: str, warped: Any, raster: Raster, after: Raster) -> None:
    dataset = raster.dataset
    if raster.georeference.transform is None:
        return  # the extent of ground control points is only known by warping
    west, south, east, north = transform_bounds(dataset.crs, warped.crs, *dataset.bounds)
    a = warped.bounds
    if (
        east <= min(a.left, a.right)
        or west >= max(a.left, a.right)
        or north <= min(a.bottom, a.top)
        or (south >= max(a.bottom, a.top))
    ):
        raise InputError(f"{before} does not overlap {after.name}", fix="give two dates of the same place")
