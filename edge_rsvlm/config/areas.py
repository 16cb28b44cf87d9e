"""Areas of interest: polygons of a GeoJSON file (RFC 7946), in WGS 84."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from edge_rsvlm.errors import UsageError

Point = tuple[float, float]
"""Longitude and latitude in degrees."""
Polygon = tuple[tuple[Point, ...], ...]
"""Closed rings: the exterior, then holes."""
Area = tuple[Polygon, ...]

FIX = "give a Polygon, MultiPolygon, Feature or FeatureCollection in longitude and latitude (RFC 7946)"
LEAST_POINTS = 4


def read_area(path: Path) -> Area:
    """All polygons of a file; UsageError says what is wrong with it."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as exc:
        raise UsageError(f"cannot read {path}: {exc.strerror}", fix="name an existing GeoJSON file") from exc
    except (json.JSONDecodeError, UnicodeDecodeError) as exc:
        raise UsageError(f"{path} is not JSON: {exc}", fix=FIX) from exc
    try:
        area = tuple(_polygons(data))
    except ValueError as exc:
        raise UsageError(f"{path}: {exc}", fix=FIX) from exc
    if not area:
        raise UsageError(f"{path} has no polygon", fix=FIX)
    return area


def _polygons(value: Any) -> Iterator[Polygon]:
    """Of a geometry, or of everything that holds geometries; ValueError for what is none."""
    kind = value.get("type") if isinstance(value, dict) else None
    if isinstance(value, dict) and "crs" in value and value["crs"] is not None:
        raise ValueError("it names a coordinate system of its own")
    if kind == "FeatureCollection":
        for feature in _list(value, "features"):
            yield from _polygons(feature)
    elif kind == "Feature":
        yield from _polygons(value.get("geometry"))
    elif kind == "Polygon":
        yield _polygon(_list(value, "coordinates"))
    elif kind == "MultiPolygon":
        for rings in _list(value, "coordinates"):
            yield _polygon(rings)
    else:
        raise ValueError(f"a {kind} is no area" if kind else "it holds something that is no GeoJSON")


def _list(value: dict[str, Any], key: str) -> list[Any]:
    found = value.get(key)
    if not isinstance(found, list):
        raise ValueError(f"a {value['type']} has no {key}")
    return found


def _polygon(rings: Any) -> Polygon:
    if not isinstance(rings, list) or not rings:
        raise ValueError("a polygon has no rings")
    return tuple(_ring(ring) for ring in rings)


def _ring(ring: Any) -> tuple[Point, ...]:
    if not isinstance(ring, list) or len(ring) < LEAST_POINTS:
        raise ValueError(f"a ring has fewer than {LEAST_POINTS} points")
    points = tuple(_point(point) for point in ring)
    if points[0] != points[-1]:
        raise ValueError("a ring does not end where it begins")
    return points


def _point(point: Any) -> Point:
    numbers = isinstance(point, list) and len(point) >= 2 and all(isinstance(v, (int, float)) for v in point[:2])
    if not numbers:
        raise ValueError("a point is not two numbers")
    lon, lat = float(point[0]), float(point[1])
    if not (-180 <= lon <= 180 and -90 <= lat <= 90):
        raise ValueError(f"({lon:g}, {lat:g}) is no longitude and latitude")
    return lon, lat
