"""An alert as a GeoJSON feature, and where it is."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timezone
from typing import Any

from edge_rsvlm.errors import DeliveryError
from edge_rsvlm.types import Alert

LonLat = tuple[float, float]
Polygon = Sequence[Sequence[Sequence[float]]]
"""Rings of (longitude, latitude): the exterior, then holes."""


def alert_feature(alert: Alert) -> dict[str, Any]:
    """RFC 7946; its ``id`` is the alert's, by which a receiver drops repeats.

    ``geometry`` is null where the scene has no place on Earth: the polygon among the properties is in raster pixels.
    """
    properties = {
        "rule": alert.rule,
        "time": alert.time,
        "score": alert.score,
        "sentence": alert.sentence,
        **{key: value for key, value in alert.record.items() if key != "polygon" or alert.geometry is None},
        "crops": list(alert.crops),
    }
    return {"type": "Feature", "id": alert.id, "geometry": alert.geometry, "properties": properties}


def moment(alert: Alert) -> datetime:
    """When the later scene was taken, in UTC. DeliveryError for what is no time."""
    try:
        found = datetime.fromisoformat(alert.time.replace("Z", "+00:00"))
    except ValueError as exc:
        raise DeliveryError(
            f"alert {alert.id} has the time '{alert.time}'", fix="report it: that is not ISO 8601", retry=False
        ) from exc
    return found.astimezone(timezone.utc) if found.tzinfo else found.replace(tzinfo=timezone.utc)


def polygons(geometry: Mapping[str, Any] | None) -> list[Polygon]:
    """The polygons of a Polygon or MultiPolygon."""
    if geometry is None:
        return []
    coordinates: Any = geometry["coordinates"]
    return [coordinates] if geometry["type"] == "Polygon" else list(coordinates)


def bounds(geometry: Mapping[str, Any]) -> tuple[float, float, float, float]:
    """West, south, east, north."""
    points = [point for polygon in polygons(geometry) for point in polygon[0]]
    return (
        min(p[0] for p in points),
        min(p[1] for p in points),
        max(p[0] for p in points),
        max(p[1] for p in points),
    )


def centroid(geometry: Mapping[str, Any]) -> LonLat:
    """Of the largest polygon's exterior, in degrees: a point to show, not to measure from.

    Parts on both sides of the antimeridian have no centre between them.
    """
    exteriors = [polygon[0] for polygon in polygons(geometry)]
    ring = max(exteriors, key=lambda ring: abs(sum(cross for _, _, cross in _sides(ring))))
    doubled = sum(cross for _, _, cross in _sides(ring))
    x0, y0 = ring[0][0], ring[0][1]
    if doubled == 0:
        return x0, y0
    x, y = (sum(side[axis] * side[2] for side in _sides(ring)) / (3 * doubled) for axis in (0, 1))
    return x0 + x, y0 + y


def _sides(ring: Sequence[Sequence[float]]) -> Iterator[tuple[float, float, float]]:
    """(sum of x, sum of y, cross product) of each side, from the first point: small numbers keep their digits."""
    x0, y0 = ring[0][0], ring[0][1]
    for a, b in itertools.pairwise([(p[0] - x0, p[1] - y0) for p in ring]):
        yield a[0] + b[0], a[1] + b[1], a[0] * b[1] - b[0] * a[1]
