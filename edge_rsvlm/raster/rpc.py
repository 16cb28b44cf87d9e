"""Where a raster with rational polynomial coefficients lies: at the height its coefficients are centred on.

The coefficients (OGC 06-121r9 / STDI-0002 RPC00B) go from longitude, latitude and height to pixels; GDAL inverts them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from rasterio.crs import CRS
from rasterio.errors import TransformWarning

from edge_rsvlm.geo import apply, fitted
from edge_rsvlm.raster.embedded import read_tags
from edge_rsvlm.types import Georeference

UNUSABLE = "its rational polynomials cannot be used ({reason}): results are in pixel coordinates"
LONGITUDE_LIMIT, LATITUDE_LIMIT = 360.0, 90.0


def place_by_polynomials(dataset: Any) -> tuple[Georeference | None, tuple[str, ...]]:
    """The georeference of a dataset by its RPC, and what the user should know of it; (None, ()) for one without."""
    if not read_tags(dataset, "RPC", []):
        return None, ()
    try:
        found = _checked(lambda: _georeference(dataset))
    except (ValueError, KeyError, IndexError) as exc:
        return None, (UNUSABLE.format(reason=str(exc) or type(exc).__name__),)
    note = (
        f"position is approximate: from its rational polynomials at {found.height_m:g} m above the ellipsoid, since "
        "the height of the terrain is not known"
    )
    return found, (note,)


def _checked(make: Callable[[], Georeference]) -> Georeference:
    """ValueError for coefficients that GDAL refuses or that lead nowhere on Earth."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", TransformWarning)  # of points that have no place, which is asked below
            found = make()
            transform, _ = fitted(found)
    except Exception as exc:
        if "CPLE" not in type(exc).__name__:
            raise
        raise ValueError(str(exc)) from exc
    ((lon, lat),) = apply(transform, np.array([[found.width / 2, found.height / 2]]))
    if abs(lon) > LONGITUDE_LIMIT or abs(lat) > LATITUDE_LIMIT:
        raise ValueError("they lead off the Earth")
    return found


def _georeference(dataset: Any) -> Georeference:
    rpcs = dataset.rpcs
    numbers = np.concatenate([np.ravel(value) for value in rpcs.to_dict().values() if value is not None])
    scales = (rpcs.lat_scale, rpcs.long_scale, rpcs.height_scale, rpcs.line_scale, rpcs.samp_scale)
    if not np.isfinite(numbers).all() or 0 in scales:
        raise ValueError("a number is missing or 0")
    crs_wkt = CRS.from_epsg(4326).to_wkt()
    return Georeference(dataset.width, dataset.height, crs_wkt, rpcs=rpcs, height_m=float(rpcs.height_off))
