"""The watch itself: look, take in, answer, commit, tell, deliver; until it is told to end."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from dataclasses import dataclass

from edge_rsvlm.alerts.entries import Result, Scene
from edge_rsvlm.alerts.journal import Journal
from edge_rsvlm.alerts.retention import DROPPED, keep_within, thumbnail_path
from edge_rsvlm.alerts.store import JournalFullError
from edge_rsvlm.errors import EdgeRsvlmError, InputError, UsageError
from edge_rsvlm.sinks.files import writing
from edge_rsvlm.watch.answer import Answerer, Stopped
from edge_rsvlm.watch.courier import Couriers
from edge_rsvlm.watch.intake import Intake
from edge_rsvlm.watch.lines import Teller

AFTER_FULL_S = 10.0
"""Until a scene is tried again whose result the disk had no room for."""


@dataclass
class Watch:
    """``say`` is told what people should know; ``trouble`` of what keeps the watch from its work for now."""

    journal: Journal
    intake: Intake
    answerer: Answerer
    teller: Teller
    couriers: Couriers
    limit_bytes: int
    stop: threading.Event
    say: Callable[[str], None]
    trouble: Callable[[EdgeRsvlmError], None]
    _troubled: str = ""

    def run(self, every_s: float) -> None:
        """Until ``stop`` is set. A scene that it is at is given up, and is done at the next start."""
        self._say_forgotten()
        self.teller.tell()
        while not self.stop.is_set():
            wait_s = every_s
            try:
                self._look_and_answer()
                self._troubled = ""
            except (InputError, JournalFullError) as exc:
                if str(exc) != self._troubled:  # said once, until it has passed
                    self.trouble(exc)
                self._troubled = str(exc)
                wait_s = max(every_s, AFTER_FULL_S) if isinstance(exc, JournalFullError) else every_s
            self.couriers.wake()
            self.stop.wait(wait_s)

    def once(self) -> None:
        """Everything that is in the folder now. InputError when the folder or the journal fails."""
        self._say_forgotten()
        self.teller.tell()
        folder, waited = self.intake.folder, False
        while not self.stop.is_set():
            if self._look_and_answer():
                waited = False
            elif waited or not folder.unsettled:  # who is still writing is taken next time
                return
            else:
                waited = True
                self.stop.wait(folder.quiet_s)

    def undelivered(self) -> int:
        """Deliveries that wait, to sinks of now and of earlier."""
        found = self.journal.row("SELECT count(*) FROM deliveries WHERE state = 'waiting'")
        assert found
        return int(found[0])

    def _say_forgotten(self) -> None:
        """Alerts that wait for sinks that are no longer named."""
        known = self.couriers.names
        for sink, count in self.journal.rows(
            "SELECT sink, count(*) FROM deliveries WHERE state = 'waiting' GROUP BY sink ORDER BY sink"
        ):
            if sink not in known:
                self.say(
                    f"{count} alerts wait for '{sink}', which --sinks does not name; name it again to deliver them"
                )

    def _look_and_answer(self) -> bool:
        """Whether there was anything to do."""
        busy = False
        while not self.stop.is_set():
            taken = self.intake.take()
            scene = next(self.journal.waiting(), None)
            if taken:
                self.teller.tell()
            if scene is None:
                return busy or taken
            busy = True
            try:
                self._answer(scene)
            except Stopped:
                return True
        return busy

    def _answer(self, scene: Scene) -> None:
        try:
            result = self.answerer.answer(scene)
            self._keep_thumbnail(scene, result)
        except UsageError as exc:
            if not _disk_is_full(exc):
                raise
            raise JournalFullError(
                f"cannot keep evidence beside the journal: {exc.__cause__}",
                fix="make room on that disk; it is tried again",
            ) from exc
        self.journal.commit(scene, result, self.couriers.names)
        self.teller.tell()
        self.couriers.wake()
        if dropped := keep_within(self.journal, self.limit_bytes):
            total = self.journal.counter(DROPPED)
            self.say(
                f"the journal is full: {dropped} alerts that no sink took were dropped, the lowest scores first"
                f" ({total} so far); mend the link, or give more room with --journal-size"
            )

    def _keep_thumbnail(self, scene: Scene, result: Result) -> None:
        if result.thumbnail:
            path = thumbnail_path(self.journal.path, scene.seq)
            with writing(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(result.thumbnail)


def _disk_is_full(failure: UsageError) -> bool:
    cause = failure.__cause__
    return isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT)
