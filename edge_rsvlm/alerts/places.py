"""Where changes lie: boxes to know a place again by, and whether a change touches an area.

Coordinates are longitude and latitude, or pixels of the raster where it has no place on Earth.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Place = tuple[float, float, float, float]
"""x0, y0, x1, y1."""
Floats = NDArray[np.float64]


def place_of(geometry: Mapping[str, Any]) -> Place:
    """The box around a Polygon or MultiPolygon; one across the antimeridian goes on beyond 180 degrees."""
    rings = [np.array(ring, np.float64)[:, :2] for rings in _polygons(geometry) for ring in rings[:1]]
    xy = np.concatenate(rings)
    xs = xy[:, 0]
    if len(rings) > 1 and xs.max() - xs.min() > 180 and np.abs(xy).max() <= 180:
        xs = np.where(xs < 0, xs + 360, xs)
    return float(xs.min()), float(xy[:, 1].min()), float(xs.max()), float(xy[:, 1].max())


def union(a: Place, b: Place) -> Place:
    return min(a[0], b[0]), min(a[1], b[1]), max(a[2], b[2]), max(a[3], b[3])


def overlaps_at_all(a: Place, b: Place) -> bool:
    """Whether two boxes share more than an edge."""
    return max(a[0], b[0]) < min(a[2], b[2]) and max(a[1], b[1]) < min(a[3], b[3])


def overlaps(places_N4: Floats, place: Place) -> Floats:
    """Of each box the area shared with ``place`` over that of both together (intersection over union) [N]."""
    low = np.maximum(places_N4[:, :2], place[:2])
    high = np.minimum(places_N4[:, 2:], place[2:])
    shared_N = np.clip(high - low, 0, None).prod(axis=1)
    sizes_N = (places_N4[:, 2:] - places_N4[:, :2]).prod(axis=1)
    own = (place[2] - place[0]) * (place[3] - place[1])
    both_N = sizes_N + own - shared_N
    found: Floats = np.divide(shared_N, both_N, out=np.zeros(len(places_N4)), where=both_N > 0)
    return found


def touches(geometry: Mapping[str, Any], area: Sequence[Sequence[Sequence[Sequence[float]]]]) -> bool:
    """Whether a Polygon or MultiPolygon shares a point with one of the polygons of ``area``."""
    parts = [[np.array(ring, np.float64)[:, :2] for ring in rings] for rings in _polygons(geometry)]
    others = [[np.array(ring, np.float64)[:, :2] for ring in rings] for rings in area]
    return any(_meet(a, b) for a, b in itertools.product(parts, others))


def _polygons(geometry: Mapping[str, Any]) -> Any:
    return [geometry["coordinates"]] if geometry["type"] == "Polygon" else geometry["coordinates"]


def _meet(a: list[Floats], b: list[Floats]) -> bool:
    """Two polygons meet where one has a corner of the other inside, or their edges cross."""
    if (a[0].max(axis=0) < b[0].min(axis=0)).any() or (b[0].max(axis=0) < a[0].min(axis=0)).any():
        return False
    return _inside(a[0][0], b) or _inside(b[0][0], a) or any(_cross(p, q) for p in a for q in b)


def _inside(point: Floats, rings: list[Floats]) -> bool:
    """By the crossings of a ray to the right with all rings (even-odd rule)."""
    crossings = 0
    for ring in rings:
        (x0, y0), (x1, y1) = ring[:-1].T, ring[1:].T
        spans = (y0 > point[1]) != (y1 > point[1])
        rise = np.where(spans, y1 - y0, 1.0)
        at = x0 + (point[1] - y0) * (x1 - x0) / rise
        crossings += int((spans & (at > point[0])).sum())
    return crossings % 2 == 1


def _cross(ring: Floats, other: Floats) -> bool:
    """Whether an edge of one ring meets an edge of another, touching included."""
    return any(_edge_meets(*edge, ring) for edge in _edges(other))


def _edges(ring: Floats) -> Iterator[tuple[Floats, Floats]]:
    return itertools.pairwise(ring)


def _edge_meets(start: Floats, end: Floats, ring: Floats) -> bool:
    """By the sides of each other's lines on which the ends lie; on a line counts as both."""
    first, last = ring[:-1], ring[1:]
    boxes = (np.maximum(first, last) >= np.minimum(start, end)) & (np.minimum(first, last) <= np.maximum(start, end))
    near = boxes.all(axis=1)
    if not near.any():
        return False
    first, last = first[near], last[near]
    a, b = _side(first, last, start), _side(first, last, end)
    c, d = _side(start, end, first), _side(start, end, last)
    return bool(((a * b <= 0) & (c * d <= 0)).any())


def _side(start: Floats, end: Floats, point: Floats) -> Floats:
    """The sign of the turn from an edge to a point."""
    along, to = end - start, point - start
    found: Floats = np.sign(along[..., 0] * to[..., 1] - along[..., 1] * to[..., 0])
    return found
