"""Alerts on their way: one thread for each sink, so that none waits for another and no scene waits for any."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from edge_rsvlm.alerts.journal import Journal
from edge_rsvlm.alerts.outbox import Order, Outbox
from edge_rsvlm.alerts.store import JournalFullError
from edge_rsvlm.types import AlertSink

Say = Callable[[str], None]
AFTER_FULL_S = 30.0
LONGEST_SLEEP_S = 60.0


@dataclass(frozen=True)
class Route:
    """One sink and its order of sending."""

    sink: AlertSink
    order: Order = "oldest"


@dataclass
class Couriers:
    """Delivers what waits in the journal at ``path`` for each route, by name, from ``start`` to ``finish``."""

    path: Path
    routes: Mapping[str, Route]
    say: Say
    refused: int = 0
    _threads: list[threading.Thread] = field(default_factory=list)
    _wake: dict[str, threading.Event] = field(default_factory=dict)
    _last_round: threading.Event = field(default_factory=threading.Event)
    _stop: threading.Event = field(default_factory=threading.Event)
    _failure: BaseException | None = None

    @property
    def names(self) -> Sequence[str]:
        return tuple(self.routes)

    def start(self) -> None:
        for name in self.routes:
            self._wake[name] = threading.Event()
            thread = threading.Thread(target=self._run, args=(name,), name=f"sink {name}", daemon=True)
            self._threads.append(thread)
            thread.start()

    def wake(self) -> None:
        """There may be more to deliver. Raises what a sink failed with that is no DeliveryError."""
        for event in self._wake.values():
            event.set()
        if self._failure is not None:
            raise self._failure

    def finish(self, seconds: float, *, drain: bool) -> None:
        """End within ``seconds``; ``drain``: after what can be delivered now. What is not, waits in the journal."""
        (self._last_round if drain else self._stop).set()
        for event in self._wake.values():
            event.set()
        for thread in self._threads:
            thread.join(seconds / len(self._threads))
        self._stop.set()
        if self._failure is not None:
            raise self._failure

    def _run(self, name: str) -> None:
        try:
            with ExitStack() as stack:
                journal = stack.enter_context(Journal(self.path, durable=False))
                sink = self.routes[name].sink
                close = getattr(sink, "close", None)
                if close is not None:
                    stack.callback(close)
                self._serve(name, journal)
        except BaseException as exc:  # noqa: BLE001 - wake() raises it in the thread that can end the command
            self._failure = exc

    def _serve(self, name: str, journal: Journal) -> None:
        route, wake = self.routes[name], self._wake[name]
        outbox, troubled = None, False
        while not self._stop.is_set():
            last = self._last_round.is_set()
            wake.clear()
            try:
                outbox = outbox or Outbox(journal, name, route.sink, route.order, refused=partial(self._refused, name))
                wait_s = outbox.deliver(self._stop.is_set)
                if troubled != outbox.held and not self._stop.is_set():
                    troubled = outbox.held
                    self.say(f"sink {name}: {outbox.trouble()}" if troubled else f"sink {name}: delivers again")
            except JournalFullError as exc:
                self.say(f"sink {name}: {exc}")
                wait_s = AFTER_FULL_S
            if last:
                return
            wake.wait(LONGEST_SLEEP_S if wait_s is None else min(wait_s, LONGEST_SLEEP_S))

    def _refused(self, name: str, id: str, reason: str) -> None:
        self.refused += 1
        self.say(f"sink {name}: alert {id} was refused for good: {reason}")
