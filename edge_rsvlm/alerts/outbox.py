"""The alerts that wait for one sink, sent in order, at least once, for as long as a link is cut.

A failure that may pass holds the sink back: the same alert is tried again after 1 s, 2 s, 4 s ... and at most 5
minutes, each time shortened at random by up to a half, so that many devices do not come back at once (exponential
backoff with jitter). An alert that failed five times in a row while the next one is taken stands aside, and is tried
beside the others by the same rule. What a sink refuses for good is marked with its reason. One alert is in memory at a
time.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from edge_rsvlm.alerts.entries import alert_of
from edge_rsvlm.alerts.journal import Journal
from edge_rsvlm.errors import DeliveryError
from edge_rsvlm.types import AlertSink

FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 300.0
PATIENCE = 5
Order = Literal["oldest", "score"]
_ORDER = {"oldest": "arrival", "score": "score DESC, arrival"}


class SteadyClock:
    """Seconds since 1970 as they were when the process began, and from then on by the monotonic clock.

    A wall clock that is set while the process runs moves nothing.
    """

    def __init__(self) -> None:
        self._start = time.time() - time.monotonic()

    def now(self) -> float:
        return self._start + time.monotonic()


def retry_refused(journal: Journal) -> int:
    """What was refused for good waits once more, as if it were new; returns how many deliveries that are."""
    return journal.write(
        "UPDATE deliveries SET state = 'waiting', attempts = 0, next_attempt = 0, aside = 0, error = NULL"
        " WHERE state = 'failed'"
    )


def backoff_s(failures: int, draw: Callable[[], float]) -> float:
    """How long to wait after so many failures in a row; ``draw`` gives a number in [0, 1)."""
    full = min(FIRST_WAIT_S * 2.0 ** min(failures - 1, 30), LONGEST_WAIT_S)
    return full * (1 - draw() / 2)


@dataclass(frozen=True)
class Waiting:
    """One alert that waits for one sink."""

    id: str
    attempts: int
    aside: bool


@dataclass
class Outbox:
    """What waits for the sink ``name``. For one thread, which owns the journal's connection."""

    journal: Journal
    name: str
    sink: AlertSink
    order: Order = "oldest"
    clock: Callable[[], float] = field(default_factory=lambda: SteadyClock().now)
    draw: Callable[[], float] = random.random
    refused: Callable[[str, str], None] = lambda alert, reason: None
    """Told of each alert that was refused for good."""
    _failures: int = 0
    _held_until: float = 0.0

    def __post_init__(self) -> None:
        """Times of an earlier process are kept, but never wait longer than a backoff: its clock may have been wrong."""
        now = self.clock()
        latest = now + LONGEST_WAIT_S
        sql = "UPDATE deliveries SET next_attempt = ? WHERE sink = ? AND state = 'waiting' AND next_attempt > ?"
        self.journal.write(sql, latest, self.name, latest)
        found = self.journal.row(
            "SELECT attempts, next_attempt FROM deliveries WHERE sink = ? AND state = 'waiting' AND aside = 0"
            f" ORDER BY {_ORDER[self.order]} LIMIT 1",
            self.name,
        )
        if found and found[0]:
            self._held_until = min(float(found[1]), now + backoff_s(found[0], lambda: 0.0))

    def deliver(self, stop: Callable[[], bool] = lambda: False) -> float | None:
        """Send until nothing is due, the link fails, or ``stop``. Seconds to the next try; None: none waits."""
        while not stop():
            held_s = self._held_until - self.clock()
            if held_s > 0:
                return held_s
            first = self._due()
            if first is None:
                return self._until_due()
            if self._try(first):
                self._failures = 0
            elif first.aside:
                self._postpone(first, aside=True)
            else:
                self._failed(first)
        return 0.0

    def _failed(self, first: Waiting) -> None:
        """Hold the sink back, unless it takes another alert: then the trouble is with this one."""
        self._failures += 1
        if self._failures >= PATIENCE and (second := self._due(beside=first.id)) and self._try(second):
            self._failures = 0
            self._postpone(first, aside=True)
        else:
            self._held_until = self._postpone(first, aside=False)

    @property
    def held(self) -> bool:
        """Whether the last try failed, so that the sink is given time."""
        return self._failures > 0

    def trouble(self) -> str:
        """How many alerts wait, and the last reason."""
        sql = "SELECT count(*), max(error) FROM deliveries WHERE sink = ? AND state = 'waiting'"
        count, error = self.journal.row(sql, self.name) or (0, None)
        return f"{count} alert{'' if count == 1 else 's'} wait{'s' if count == 1 else ''}: {error}"

    def _due(self, beside: str = "") -> Waiting | None:
        found = self.journal.row(
            "SELECT alert, attempts, aside FROM deliveries WHERE sink = ? AND state = 'waiting' AND alert != ?"
            f" AND (aside = 0 OR next_attempt <= ?) ORDER BY {_ORDER[self.order]} LIMIT 1",
            self.name,
            beside,
            self.clock(),
        )
        return Waiting(found[0], found[1], bool(found[2])) if found else None

    def _until_due(self) -> float | None:
        sql = "SELECT min(next_attempt) FROM deliveries WHERE sink = ? AND state = 'waiting'"
        found = self.journal.row(sql, self.name)
        return None if found is None or found[0] is None else max(float(found[0]) - self.clock(), 0.0)

    def _try(self, waiting: Waiting) -> bool:
        """Whether the sink took the alert, or refused it for good: both are the end of it."""
        found = self.journal.row("SELECT json FROM alerts WHERE id = ?", waiting.id)
        if found is None:
            return True  # dropped meanwhile, to make room
        try:
            self.sink.send(alert_of(found[0]))
        except DeliveryError as exc:
            attempts = (
                "UPDATE deliveries SET attempts = attempts + 1, error = ?, state = ? WHERE alert = ? AND sink = ?"
            )
            self.journal.write(attempts, str(exc), "waiting" if exc.retry else "failed", waiting.id, self.name)
            if not exc.retry:
                self.refused(waiting.id, str(exc))
            return not exc.retry
        sql = "UPDATE deliveries SET attempts = attempts + 1, error = NULL, state = 'done' WHERE alert = ? AND sink = ?"
        self.journal.write(sql, waiting.id, self.name)
        return True

    def _postpone(self, waiting: Waiting, *, aside: bool) -> float:
        """When it is tried again: alone, or, if it stands aside, beside others."""
        failures = waiting.attempts + 1 if aside else self._failures
        at = self.clock() + backoff_s(failures, self.draw)
        sql = "UPDATE deliveries SET next_attempt = ?, aside = ? WHERE alert = ? AND sink = ?"
        self.journal.write(sql, at, aside, waiting.id, self.name)
        return at
