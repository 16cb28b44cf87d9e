"""What rules remember of places from date to date: when each was seen, and when it was last told.

A place is the same where its boxes on two dates overlap by SAME_PLACE (intersection over union). Places of scenes
without a place on Earth are known by their pixels, which holds for a camera that stays.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_rsvlm.alerts.places import Place, overlaps
from edge_rsvlm.alerts.times import instant
from edge_rsvlm.errors import UsageError

SAME_PLACE = 0.3
MOST_MISSES = 3
"""After so many passes in a row that looked there and saw nothing, persistence begins anew."""
MOST_TRACKS = 10_000
"""Beyond it the places that were seen longest ago are forgotten."""


@dataclass(frozen=True)
class Track:
    """A place as one rule knows it. ``place`` is in degrees, or in pixels where not ``located``.

    ``dates`` are the latest on which it was seen, as many as the rule asks for; ``misses`` are passes since.
    """

    rule: str
    place: Place
    located: bool
    first_seen: str
    last_seen: str
    dates: tuple[str, ...]
    last_alerted: str | None = None
    misses: int = 0


@dataclass(frozen=True)
class Tracks:
    """Everything that rules remember. Plain rows go out and in, for whoever stores them."""

    tracks: tuple[Track, ...] = ()

    def rows(self) -> list[dict[str, Any]]:
        """One JSON-able row per place."""
        return [{**asdict(track), "place": list(track.place), "dates": list(track.dates)} for track in self.tracks]

    @staticmethod
    def of(rows: Iterable[Mapping[str, Any]]) -> Tracks:
        """What ``rows`` gave; UsageError for rows of something else."""
        return Tracks(tuple(_track(row) for row in rows))

    def bounded(self) -> Tracks:
        """At most MOST_TRACKS, those that were seen last."""
        if len(self.tracks) <= MOST_TRACKS:
            return self
        newest = sorted(self.tracks, key=lambda track: instant(track.last_seen), reverse=True)[:MOST_TRACKS]
        kept = set(map(id, newest))
        return Tracks(tuple(track for track in self.tracks if id(track) in kept))


class Places:
    """The places of one rule, to be looked up by where they are."""

    def __init__(self, tracks: Iterable[Track]) -> None:
        self.tracks = tuple(tracks)
        self._places_N4: NDArray[np.float64] = np.array([t.place for t in self.tracks], np.float64).reshape(-1, 4)

    def find(self, place: Place) -> int | None:
        """The track of the same place that overlaps it most, the first of equals."""
        if not self.tracks:
            return None
        overlap_N = overlaps(self._places_N4, place)
        best = int(overlap_N.argmax())
        return best if overlap_N[best] >= SAME_PLACE else None


def missed(track: Track, when: str, cooldown_s: float) -> Track | None:
    """A place after a pass that looked there and saw nothing; None where nothing is left to remember."""
    if track.misses + 1 < MOST_MISSES:
        return replace(track, misses=track.misses + 1)
    if track.last_alerted is not None and within(track.last_alerted, when, cooldown_s):
        return replace(track, misses=MOST_MISSES, dates=())
    return None


def within(last_alerted: str, when: str, cooldown_s: float) -> bool:
    """Whether ``when`` is within the cool-down of an alert; scenes may come in any order."""
    return abs((instant(when) - instant(last_alerted)).total_seconds()) < cooldown_s


def _track(row: Mapping[str, Any]) -> Track:
    try:
        x0, y0, x1, y1 = (float(value) for value in row["place"])
        return Track(**{**row, "place": (x0, y0, x1, y1), "dates": tuple(row["dates"])})
    except (KeyError, TypeError, ValueError) as exc:
        raise UsageError(f"a row of tracks cannot be read ({exc})", fix="it was written by something else") from exc
