"""Rules applied to the changes of one pass: two dates compared once.

Changes come one by one. What is kept of a pass is bounded: the best alerts within the budget, and the places.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from edge_rsvlm.alerts.ids import alert_id
from edge_rsvlm.alerts.places import Place, overlaps_at_all, place_of, touches, union
from edge_rsvlm.alerts.times import instant, written
from edge_rsvlm.alerts.tracks import MOST_TRACKS, Places, Track, Tracks, missed, within
from edge_rsvlm.config.rules import Rule, Rules, query_words
from edge_rsvlm.types import Alert

Record = Mapping[str, Any]
Geometry = Mapping[str, Any]


@dataclass(frozen=True)
class Scene:
    """Where and when a pass looks. ``extent`` is in degrees, or in pixels where not ``located``.

    ``names`` go into the records of alerts: ``before`` and ``after``.
    """

    when: str
    located: bool
    extent: Place
    names: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Verdict:
    """What rules make of a pass. ``held_back`` were beyond the budget, ``pending`` have yet to persist, by rule;
    ``silenced`` are within a cool-down."""

    alerts: list[Alert]
    tracks: Tracks
    held_back: int
    pending: Mapping[str, int]
    silenced: int
    warnings: list[str]


@dataclass
class _Seen:
    """A place that this pass saw, by one rule."""

    track: Track
    place: Place
    alerted: bool = False


@dataclass(order=True)
class _Candidate:
    """An alert that may be told. Ordered by how much it matters, ties by id so that a pass always ends the same."""

    score: float
    id: str
    alert: Alert = field(compare=False)
    seen: _Seen | None = field(compare=False)


class RulePass:
    """Feed it every change, then ask for the verdict."""

    def __init__(self, rules: Rules, tracks: Tracks, scene: Scene) -> None:
        self._rules, self._scene, self._before = rules, scene, tracks
        self._time = written(instant(scene.when))
        self._places = {rule.name: self._known(rule) for rule in rules.rules}
        self._seen: dict[str, dict[int, _Seen]] = {rule.name: {} for rule in rules.rules}
        self._best: list[_Candidate] = []
        self._held_back = self._silenced = self._untracked = 0
        self._pending = dict.fromkeys(self._places, 0)

    def feed(self, record: Record, geometry: Geometry | None) -> None:
        """A change as in ``--json``, and its geometry: in WGS 84, in pixels where the scene has no place, or None."""
        for rule in self._rules.rules:
            if meets(rule, self._rules, record, geometry, self._scene.located):
                self._met(rule, record, geometry)

    def finish(self, *, complete: bool) -> Verdict:
        """The verdict. Where not ``complete`` a place that was not seen may only not have been looked at."""
        alerts = sorted(self._best, reverse=True)
        for candidate in alerts:
            if candidate.seen is not None:
                candidate.seen.alerted = True
        tracks = [track for rule in self._rules.rules for track in self._after(rule, complete)]
        return Verdict(
            [candidate.alert for candidate in alerts],
            Tracks(tuple(tracks)).bounded(),
            self._held_back,
            {name: count for name, count in self._pending.items() if count},
            self._silenced,
            self._warnings(),
        )

    def _known(self, rule: Rule) -> Places:
        located = self._scene.located
        return Places(t for t in self._before.tracks if t.rule == rule.name and t.located == located)

    def _met(self, rule: Rule, record: Record, geometry: Geometry | None) -> None:
        seen = self._remember(rule, geometry) if rule.remembers and geometry is not None else None
        track = None if seen is None else seen.track
        if rule.persistence > 1 and (track is None or len(track.dates) < rule.persistence):
            self._pending[rule.name] += 1
        elif track is not None and track.last_alerted and within(track.last_alerted, self._time, rule.cooldown):
            self._silenced += 1
        else:
            self._offer(_Candidate(record["score"], alert_id(rule.name, record["id"]),
                                   self._alert(rule, record, geometry), seen))  # fmt: skip

    def _remember(self, rule: Rule, geometry: Geometry) -> _Seen | None:
        """The place of a change, known from before or new; None where no more new ones are kept."""
        place, seen, places = place_of(geometry), self._seen[rule.name], self._places[rule.name]
        number = places.find(place)
        if number is None:
            if len(seen) >= MOST_TRACKS:
                self._untracked += 1
                return None
            track = Track(rule.name, place, self._scene.located, self._time, self._time, (self._time,))
            found = seen[-1 - len(seen)] = _Seen(track, place)
            return found
        if number not in seen:
            seen[number] = _Seen(_seen_again(places.tracks[number], self._time, rule.persistence), place)
        found = seen[number]
        found.place = union(found.place, place)
        return found

    def _offer(self, candidate: _Candidate) -> None:
        if len(self._best) < self._rules.budget:
            heapq.heappush(self._best, candidate)
        else:
            heapq.heappushpop(self._best, candidate)
            self._held_back += 1

    def _alert(self, rule: Rule, record: Record, geometry: Geometry | None) -> Alert:
        return Alert(
            id=alert_id(rule.name, record["id"]),
            rule=rule.name,
            time=self._time,
            score=record["score"],
            sentence=record["sentence"],
            geometry=geometry if self._scene.located else None,
            record={**self._scene.names, **record},
            crops=tuple(record.get("crops", ())),
        )

    def _after(self, rule: Rule, complete: bool) -> list[Track]:
        """The places of a rule after this pass; those of scenes of the other kind stay as they are."""
        if not rule.remembers:
            return []
        seen, places = self._seen[rule.name], self._places[rule.name]
        others = [t for t in self._before.tracks if t.rule == rule.name and t.located != self._scene.located]
        unseen = [track for number, track in enumerate(places.tracks) if number not in seen]
        if complete:
            left = (self._unseen(track, rule) for track in unseen)
            unseen = [track for track in left if track is not None]
        return [*others, *unseen, *(self._kept(each) for each in seen.values())]

    def _unseen(self, track: Track, rule: Rule) -> Track | None:
        looked = overlaps_at_all(self._scene.extent, track.place)
        return missed(track, self._time, rule.cooldown) if looked else track

    def _kept(self, seen: _Seen) -> Track:
        last_alerted = self._time if seen.alerted else seen.track.last_alerted
        return replace(seen.track, place=seen.place, last_alerted=last_alerted)

    def _warnings(self) -> list[str]:
        if not self._untracked:
            return []
        return [f"{self._untracked} places beyond {MOST_TRACKS} are not remembered: make the rules narrower"]


def _seen_again(track: Track, when: str, persistence: int) -> Track:
    """A known place on one more date, or on a date that was counted already."""
    dates = tuple(sorted({*track.dates, when}))[-persistence:]
    first, *_, last = sorted((track.first_seen, track.last_seen, when))
    return replace(track, first_seen=first, last_seen=last, dates=dates, misses=0)


def meets(rule: Rule, rules: Rules, record: Record, geometry: Geometry | None, located: bool) -> bool:
    """Whether a change is what a rule asks for, whatever was seen before."""
    if record["score"] < rule.min_score or not _large(rule, record):
        return False
    if (rule.from_ and record["from"] not in rule.from_) or (rule.to and record["to"] not in rule.to):
        return False
    if rule.query is not None and not set(query_words(rule.query)) <= _words(record):
        return False
    area = rules.area(rule)
    return area is None or (located and geometry is not None and touches(geometry, area))


def _large(rule: Rule, record: Record) -> bool:
    """By ``min_area`` where the area is known in square metres, else by ``min_area_px``."""
    if record["area_m2"] is not None:
        return rule.min_area is None or record["area_m2"] >= rule.min_area
    if rule.min_area_px is not None:
        return bool(record["area_px"] >= rule.min_area_px)
    return rule.min_area is None


def _words(record: Record) -> set[str]:
    """What a change is told with."""
    meaning = record.get("spectral", {}).get("meaning") or ""
    return {word for text in (record["from"], record["to"], meaning) for word in query_words(text)}
