"""Two dates on one grid: BEFORE is warped onto AFTER's pixels as it is read."""

from __future__ import annotations

import dataclasses
import itertools
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import rasterio
import rasterio.shutil
from affine import Affine
from rasterio.crs import CRS
from rasterio.enums import ColorInterp, Resampling
from rasterio.vrt import WarpedVRT
from rasterio.warp import transform_bounds

from edge_rsvlm.errors import InputError
from edge_rsvlm.geo import apply, fitted
from edge_rsvlm.raster.reader import Raster, foreign_errors, open_raster
from edge_rsvlm.types import Georeference

SAME_GRID_PX = 0.01
BEND_MOST_PX = 1.0
"""Of a grid that control points or rational polynomials give, from the affine transform that stands for it."""


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
        located = [_located(raster.georeference), _located(target)]
        size_equal = _size(raster.georeference) == _size(target)
        if not any(located) and size_equal:
            yield raster
            return
        if not all(located):
            raise InputError(
                f"{before} and {after.name} cannot be aligned: coordinates or size differ",
                fix="give both a CRS, or cut both to the same pixels",
            )
        raster = _at_height_of(raster, after)
        with ExitStack() as stack:
            with foreign_errors(before):
                source = _warpable(raster, stack)
                warped = stack.enter_context(_warped(raster, source, after, 1))
                _check_overlap(before, raster, after)
            aligned = dataclasses.replace(
                raster,
                dataset=warped,
                georeference=target,
                overviews=after.overviews,
                open_overview=lambda decimation: _warped(raster, source, after, decimation),
                _alpha=raster.alpha_band or warped.count,
                _opened={},
                _whole=None,
            )
            stack.callback(aligned.close)
            yield aligned


def _located(georeference: Georeference) -> bool:
    by_affine, by_points = georeference.transform is not None, bool(georeference.gcps)
    return georeference.crs_wkt is not None and (by_affine or by_points or georeference.rpcs is not None)


def _size(georeference: Georeference) -> tuple[int, int]:
    return georeference.width, georeference.height


def _same_grid(a: Georeference, b: Georeference) -> bool:
    if a == b and a.crs_wkt is not None:
        return True
    if _size(a) != _size(b) or a.crs_wkt is None or b.crs_wkt is None or a.transform is None or b.transform is None:
        return False
    if CRS.from_wkt(a.crs_wkt) != CRS.from_wkt(b.crs_wkt):
        return False
    corners = np.array([(0, 0), (a.width, 0), (0, a.height), (a.width, a.height)], np.float64)
    moved = apply(~b.transform, apply(a.transform, corners))
    return bool(np.abs(moved - corners).max() < SAME_GRID_PX)


def _at_height_of(raster: Raster, after: Raster) -> Raster:
    """BEFORE, with its rational polynomials taken at AFTER's height: the ground of both dates is at one height."""
    if raster.georeference.rpcs is None or after.georeference.rpcs is None:
        return raster
    placed = dataclasses.replace(raster.georeference, height_m=after.georeference.height_m)
    return dataclasses.replace(raster, georeference=placed)


def _warped(raster: Raster, source: Any, after: Raster, decimation: int) -> WarpedVRT:
    """BEFORE (its dataset is ``source``) on the grid of AFTER or of one of its overviews.

    GDAL's warper is given affine transforms, since it heeds neither control points nor rational polynomials where a
    grid is asked for.
    """
    own, target = raster.georeference, after.georeference
    assert own.crs_wkt is not None and target.crs_wkt is not None
    a, b, c, d, e, f = _fitted(after)[:6]
    width, height = after.size_at(decimation)
    x, y = target.width / width, target.height / height
    options: dict[str, Any] = {
        "src_crs": CRS.from_wkt(own.crs_wkt),
        "src_transform": _fitted(raster),
        "crs": CRS.from_wkt(target.crs_wkt),
        "transform": Affine(a * x, b * y, c, d * x, e * y, f),
        "width": width,
        "height": height,
        # Between the indices of a palette there are no colours.
        "resampling": Resampling.nearest if raster.indexed else Resampling.bilinear,
        "add_alpha": raster.alpha_band is None,
    }
    return WarpedVRT(source, **options)


def _warpable(raster: Raster, stack: ExitStack) -> Any:
    """The dataset, or a virtual one without the alpha mark of a band that is none: GDAL would warp it as a mask."""
    dataset = raster.dataset
    if raster.alpha_band is not None or ColorInterp.alpha not in dataset.colorinterp:
        return dataset
    path = f"/vsimem/{uuid.uuid4()}.vrt"
    rasterio.shutil.copy(dataset, path, driver="VRT")
    stack.callback(rasterio.shutil.delete, path)
    with rasterio.open(path, "r+") as virtual:
        virtual.colorinterp = [ColorInterp.undefined if c is ColorInterp.alpha else c for c in dataset.colorinterp]
    return stack.enter_context(rasterio.open(path))


def _fitted(raster: Raster) -> Affine:
    """InputError where an affine transform would not do."""
    transform, off_px = fitted(raster.georeference)
    if off_px > BEND_MOST_PX:
        raise InputError(
            f"{raster.name}: its control points or rational polynomials bend its grid by {off_px:.1f} px, so that "
            "another date cannot be laid over it",
            fix="rectify it first: gdalwarp -tps (control points) or -rpc -to RPC_DEM=DEM (rational polynomials)",
        )
    return transform


def _bounds(raster: Raster) -> tuple[float, float, float, float]:
    """West, south, east, north in its own CRS, however the raster is turned."""
    x, y = (0.0, float(raster.georeference.width)), (0.0, float(raster.georeference.height))
    corners = apply(_fitted(raster), np.array(list(itertools.product(x, y))))
    (west, south), (east, north) = corners.min(axis=0), corners.max(axis=0)
    return float(west), float(south), float(east), float(north)


def _check_overlap(before: str, raster: Raster, after: Raster) -> None:
    source, target = raster.georeference, after.georeference
    assert source.crs_wkt is not None and target.crs_wkt is not None
    crs = CRS.from_wkt(source.crs_wkt), CRS.from_wkt(target.crs_wkt)
    west, south, east, north = transform_bounds(*crs, *_bounds(raster))
    if west > east:
        return  # it crosses the antimeridian: what overlaps shows when it is warped
    a = _bounds(after)
    if east <= a[0] or west >= a[2] or north <= a[1] or south >= a[3]:
        raise InputError(f"{before} does not overlap {after.name}", fix="give two dates of the same place")
