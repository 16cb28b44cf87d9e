"""What every task reports beside its results: coverage, what was skipped and why, and where the time went."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

Emit = Callable[[dict[str, Any], dict[str, Any] | None], None]
"""Called with the record of one result (as in ``--json``) and its GeoJSON geometry, as soon as it is final.

The geometry is None where the result has no place on Earth though its raster has.
"""

Progress = Callable[[int, int], None]
"""Called with tiles done and tiles in all."""


class Deadline:
    """A point in time after which no new batch is begun. ``seconds`` None: never."""

    WRITE_SHARE, WRITE_MOST_S = 0.1, 1.0  # kept back to merge and write what was found

    def __init__(self, seconds: float | None, *, started: float | None = None) -> None:
        started = time.monotonic() if started is None else started
        self._end = None
        if seconds is not None:
            self._end = started + seconds - min(self.WRITE_SHARE * seconds, self.WRITE_MOST_S)

    def allows(self, expected_s: float = 0.0) -> bool:
        """Whether a step of ``expected_s`` begun now ends in time."""
        return self._end is None or time.monotonic() + expected_s < self._end


@dataclass
class Outcome:
    """Tally of one task over one input. Areas in raster pixels.

    Unread ground counts as valid, so ``coverage`` never promises more than was processed.
    """

    processed_px: float = 0.0
    unread_px: float = 0.0
    skipped_tiles: Counter[str] = field(default_factory=Counter)
    timing_s: Counter[str] = field(default_factory=Counter)
    warnings: list[str] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        return self.unread_px == 0

    @property
    def coverage(self) -> float:
        """Valid area processed / valid area; 1 for an input without a valid pixel."""
        valid = self.processed_px + self.unread_px
        return self.processed_px / valid if valid else 1.0

    def take_account(self, seen: Outcome) -> None:
        """Add what was seen of the input, in a pass that may have served other tasks too."""
        self.processed_px, self.unread_px = seen.processed_px, seen.unread_px
        self.skipped_tiles = Counter(seen.skipped_tiles)
        timing_s = Counter(seen.timing_s)
        timing_s.update(self.timing_s)
        self.timing_s = timing_s
        self.warnings += [warning for warning in seen.warnings if warning not in self.warnings]

    @contextmanager
    def clock(self, stage: str) -> Iterator[None]:
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.timing_s[stage] += time.perf_counter() - begun  # type: ignore[assignment]

    def record(self) -> dict[str, Any]:
        """The part of a ``--json`` result that is the same for all tasks."""
        timing = {stage: round(seconds * 1e3, 1) for stage, seconds in self.timing_s.items()}
        found: dict[str, Any] = {"coverage": round(self.coverage, 4), "timing_ms": timing}
        if self.skipped_tiles:
            found["skipped_tiles"] = dict(self.skipped_tiles)
        if self.warnings:
            found["warnings"] = list(self.warnings)
        return found
