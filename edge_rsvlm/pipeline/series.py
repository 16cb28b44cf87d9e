"""Change over three or more dates: pair by pair, then linked into stories. One pair is in memory at a time.

Each date is compared with the next one, and the first with the last; what the pairs find is laid onto the cells of the
last date's grid (see ``merge.stories``). With rules the dates are compared for alerts as well: what a rule wants to
see on more dates is looked for from the same earlier date, until nothing is pending.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from affine import Affine

from edge_rsvlm.alerts.times import instant
from edge_rsvlm.alerts.tracks import Tracks
from edge_rsvlm.config.rules import Rules
from edge_rsvlm.errors import InputError, UsageError
from edge_rsvlm.geo import PixelMapper, between
from edge_rsvlm.merge.stories import GRADUAL, MOST_PAIRS, Ledger
from edge_rsvlm.pipeline.alerting import Comparison, compare, scene_time
from edge_rsvlm.pipeline.looks import bounds_px, filled
from edge_rsvlm.pipeline.outcome import Emit, Progress
from edge_rsvlm.pipeline.session import Session, georeference
from edge_rsvlm.pipeline.stories import Change, Dates, StoryRecord, tell
from edge_rsvlm.raster.acquired import acquired
from edge_rsvlm.raster.inputs import Source
from edge_rsvlm.types import Alert, Georeference

LEAST_DATES = 3
MOST_CELLS = 1 << 20
"""Larger rasters are told by cells of several pixels."""
YEAR_S = 365.25 * 24 * 3600


@dataclass(frozen=True)
class Ordered:
    """Dates in the order in which they are compared; ``known``: by when they were taken, else as given."""

    sources: tuple[Source, ...]
    taken: tuple[str | None, ...]
    known: bool

    @property
    def dates(self) -> Dates:
        if not self.known:
            return Dates(tuple(Path(source.name).name for source in self.sources), None)
        moments = [instant(text) for text in self.taken if text is not None]
        years = tuple((moment - moments[0]).total_seconds() / YEAR_S for moment in moments)
        return Dates(tuple(text or "" for text in self.taken), years)


@dataclass
class SeriesOutcome:
    """``stories`` by area, the largest first. ``pairs`` are as in ``--json``; ``failed`` says which could not be
    compared, and why."""

    order: Ordered
    where: Georeference
    cell_px: int
    stories: list[StoryRecord] = field(default_factory=list)
    pairs: list[dict[str, Any]] = field(default_factory=list)
    alerts: list[Alert] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    coverage: float = 1.0


def ordered(sources: Sequence[Source]) -> Ordered:
    """By when they were taken, where that is known of all; dates of one time stay as given.

    UsageError for fewer than three dates or more than a series may have, InputError for one that cannot be read.
    """
    if not LEAST_DATES <= len(sources) <= MOST_PAIRS + 1:
        problem = f"a series has {LEAST_DATES} to {MOST_PAIRS + 1} dates, and these are {len(sources)}"
        raise UsageError(problem, fix="give two images for a pair, or fewer dates")
    taken = [acquired(source.path, source.name) for source in sources]
    if None in taken:
        return Ordered(tuple(sources), tuple(taken), known=False)
    order = sorted(range(len(sources)), key=lambda i: instant(taken[i] or ""))
    return Ordered(tuple(sources[i] for i in order), tuple(taken[i] for i in order), known=True)


def change_series(
    session: Session,
    order: Ordered,
    *,
    rules: Rules | None = None,
    crops: Path | None = None,
    progress: Progress | None = None,
) -> SeriesOutcome:
    """Compare the dates of ``order`` and tell their stories, on the grid of the last one.

    ``progress`` counts pairs. A pair that cannot be compared is named in ``failed`` and the others go on; InputError
    where none can be.
    """
    where = georeference(order.sources[-1].path)
    cell_px = math.ceil(math.sqrt(where.width * where.height / MOST_CELLS))
    outcome = SeriesOutcome(order, where, cell_px)
    with _room(session, cell_px, where):
        teller = _Teller(session, outcome, crops, progress)
        teller.compare_all(rules)
        outcome.stories = teller.stories()
    outcome.warnings = _shared_warnings(outcome.pairs)
    if cell_px > 1:
        outcome.warnings.append(f"stories are told by cells of {cell_px} x {cell_px} pixels")
    return outcome


@contextmanager
def _room(session: Session, cell_px: int, where: Georeference) -> Iterator[None]:
    """The memory of the cells is not the pairs' to use."""
    limits = session.limits
    cells = math.ceil(where.width / cell_px) * math.ceil(where.height / cell_px)
    session.limits = replace(limits, memory_bytes=limits.memory_bytes - cells * Ledger.BYTES_PER_CELL)
    try:
        yield
    finally:
        session.limits = limits


class _Teller:
    """Compares pairs and lays what they find onto the cells of the last date."""

    def __init__(self, session: Session, outcome: SeriesOutcome, crops: Path | None, progress: Progress | None) -> None:
        self._session, self._outcome, self._crops, self._progress = session, outcome, crops, progress
        self._sources, where = outcome.order.sources, outcome.where
        self._size = math.ceil(where.width / outcome.cell_px), math.ceil(where.height / outcome.cell_px)
        self._ledger = Ledger(self._size[1], self._size[0], len(self._sources) - 1)
        self._changes: dict[int, Change] = {}

    def compare_all(self, rules: Rules | None) -> None:
        last = len(self._sources) - 1
        tracks, anchor = Tracks(), 0
        for k in range(last):
            if rules is None or anchor != k:
                self._compare(k, k + 1, self._layer(k, k + 1))
            if rules is not None:
                emit = self._layer(k, k + 1) if anchor == k else _nothing
                found = self._compare(anchor, k + 1, emit, rules, tracks)
                if found is not None:
                    self._outcome.alerts += found.alerts
                    tracks, anchor = found.tracks, anchor if found.pending else k + 1
            if self._progress:
                self._progress(k + 1, last + 1)
        if self._compare(0, last, self._layer(GRADUAL, last)) is not None:
            self._ledger.compared_ends()
        if not self._outcome.pairs:
            raise InputError(f"no two dates could be compared: {self._outcome.failed[0]}", fix="give one place")

    def stories(self) -> list[StoryRecord]:
        """The largest first."""
        mapper, dates = PixelMapper(self._outcome.where), self._outcome.order.dates
        told = [
            tell(story, [self._changes[n] for n in story.patches], dates, self._outcome.cell_px, mapper)
            for story in self._ledger.stories()
        ]
        return sorted(told, key=lambda each: -each.story.cells)

    def _compare(
        self, first: int, second: int, emit: Emit, rules: Rules | None = None, tracks: Tracks | None = None
    ) -> Comparison | None:
        """None where the two cannot be compared, which is noted."""
        before, after = self._sources[first], self._sources[second]
        try:
            when = scene_time(after) if rules else ""
            found = compare(
                self._session, before, after, emit, rules=rules, tracks=tracks, when=when, crops=self._crops
            )
        except InputError as exc:
            self._outcome.failed.append(f"{before.name} -> {after.name}: {exc}")
            return None
        self._account(before, after, found)
        return found

    def _account(self, before: Source, after: Source, found: Comparison) -> None:
        outcome, tally = self._outcome, found.outcome
        head = {"before": before.name, "after": after.name, "changed_fraction": round(tally.changed_fraction, 6)}
        outcome.pairs.append({**head, **tally.record()})
        outcome.coverage = min(outcome.coverage, tally.coverage)

    def _layer(self, pair: int, second: int) -> Emit:
        """What lays the changes of a pair, in pixels of its second date, onto the cells."""
        move = between(georeference(self._sources[second].path), self._outcome.where)
        width, height = self._size
        to_raster = Affine.scale(self._outcome.cell_px)

        def lay(record: dict[str, Any], geometry: dict[str, Any] | None) -> None:
            polygon = _moved(record["polygon"], move)
            x0, y0, x1, y1 = (v / self._outcome.cell_px for v in bounds_px(polygon))
            left, top = max(math.floor(x0), 0), max(math.floor(y0), 0)
            right, bottom = min(math.ceil(x1), width), min(math.ceil(y1), height)
            if right <= left or bottom <= top:
                return
            window = to_raster @ Affine.translation(left, top)
            touched = self._outcome.cell_px > 1
            mask_HW = filled(polygon, (right - left, bottom - top), window, touched=touched) > 0
            add = self._ledger.add_overall if pair == GRADUAL else lambda *at: self._ledger.add(pair, *at)
            number = add(top, left, mask_HW)
            if number is not None:
                self._changes[number] = Change(pair, {k: v for k, v in record.items() if k != "polygon"})

        return lay


def _shared_warnings(pairs: Sequence[dict[str, Any]]) -> list[str]:
    """What was said of several pairs once, and what was said of one with its dates."""
    said: dict[str, list[dict[str, Any]]] = {}
    for pair in pairs:
        for text in pair.get("warnings", ()):
            said.setdefault(text, []).append(pair)

    def where(pair: dict[str, Any]) -> str:
        return f"{Path(pair['before']).name} -> {Path(pair['after']).name}"

    return [text if len(of) > 1 else f"{where(of[0])}: {text}" for text, of in said.items()]


def _nothing(record: dict[str, Any], geometry: dict[str, Any] | None) -> None:
    """Takes changes that the cells have already."""


def _moved(polygon: dict[str, Any], move: Callable[[Any], Any]) -> dict[str, Any]:
    many = polygon["type"] == "MultiPolygon"
    parts = polygon["coordinates"] if many else [polygon["coordinates"]]
    moved = [[move(np.array(ring, np.float64)).tolist() for ring in rings] for rings in parts]
    return {"type": polygon["type"], "coordinates": moved if many else moved[0]}
