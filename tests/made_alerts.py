"""Alerts and scenes that are made up, for tests of what becomes of them."""

from __future__ import annotations

from edge_rsvlm.alerts.entries import Result, Seen
from edge_rsvlm.types import Alert

SQUARE = {
    "type": "Polygon",
    "coordinates": [[[15.0, 48.0], [15.002, 48.0], [15.002, 48.001], [15.0, 48.001], [15.0, 48.0]]],
}
WITH_HOLE = {
    "type": "Polygon",
    "coordinates": [
        [[0.0, 0.0], [4.0, 0.0], [4.0, 4.0], [0.0, 4.0], [0.0, 0.0]],
        [[1.0, 1.0], [1.0, 2.0], [2.0, 2.0], [2.0, 1.0], [1.0, 1.0]],
    ],
}
TWO = {"type": "MultiPolygon", "coordinates": [SQUARE["coordinates"], WITH_HOLE["coordinates"]]}
HOSTILE = "<b>Äcker & \"Wälder\"</b> ]]> \x00\x0b\ufffe 樹 'verloren'"


def alert(n=0, score=0.5, geometry=SQUARE, sentence="", crops=(), rule="forest loss", time="2024-05-01T10:00:00Z"):
    record = {
        "before": "a.tif",
        "after": "b.tif",
        "from": "trees",
        "to": "bare soil",
        "area_m2": 812.5,
        "polygon": SQUARE,
    }
    return Alert(f"{n:032x}", rule, time, score, sentence or f"change {n}", geometry, record, tuple(crops))


def seen(name, identity=None, size=10, mtime_ns=1):
    return Seen(str(name), size, mtime_ns, identity or f"content of {name}")


def put(journal, alerts, sinks=("s",), name="b.tif", tracks=None):
    """One scene whose result holds these alerts."""
    journal.admit(seen(name), taken="2024-05-01T10:00:00.000000Z", alike="x")
    scene = next(journal.waiting())
    line = {"image": str(name), "alerts": [each.id for each in alerts]}
    journal.commit(scene, Result("done", line, alerts, tracks), sinks)
    return scene
