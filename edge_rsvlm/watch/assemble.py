"""The parts of a watch, put together."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TextIO

from edge_rsvlm.alerts.journal import Journal
from edge_rsvlm.watch.answer import Answerer
from edge_rsvlm.watch.comparing import Compare
from edge_rsvlm.watch.courier import Couriers, Route
from edge_rsvlm.watch.folder import QUIET_S, Folder
from edge_rsvlm.watch.intake import Intake
from edge_rsvlm.watch.lines import Teller
from edge_rsvlm.watch.loop import Watch


@dataclass(frozen=True)
class Settings:
    """``keep_all``: no scene is dropped from a full queue; more wait in the folder."""

    folder: Path
    output: Path | None = None
    queue: int = 64
    limit_bytes: int = 1 << 30
    marker: bool = False
    keep_all: bool = False
    quiet_s: float = QUIET_S


class Reports(Protocol):
    """Who is told what happened, beside the result lines. Called from several threads."""

    def say(self, text: str) -> None: ...

    def failed(self, name: str, exc: Exception) -> None:
        """A scene could not be compared."""
        ...

    def partial(self, name: str, coverage: float) -> None:
        """A scene's deadline came before its end."""
        ...

    def trouble(self, exc: Exception) -> None:
        """The watch cannot work for now."""
        ...


def make_watch(
    journal: Journal,
    settings: Settings,
    compare: Compare,
    routes: Mapping[str, Route],
    stop: threading.Event,
    stream: TextIO,
    reports: Reports,
) -> Watch:
    """A watch over ``settings.folder``; its couriers are not started yet."""
    there = settings.folder.resolve()

    def shown(path: str) -> str:
        """As the user named the folder; a scene that came from elsewhere by its whole path."""
        return str(settings.folder / Path(path).name) if Path(path).parent == there else path

    folder = Folder(
        there,
        settings.marker,
        settings.quiet_s,
        strange=lambda name: reports.say(f"the name {name} is not UTF-8: the file is not taken; rename it"),
    )
    intake = Intake(folder, journal, settings.queue, not settings.keep_all, shown, reports.failed)
    answerer = Answerer(journal, compare, stop, shown, reports.failed, reports.partial)
    teller = Teller(journal, stream, settings.output)
    couriers = Couriers(journal.path, routes, reports.say)
    return Watch(journal, intake, answerer, teller, couriers, settings.limit_bytes, stop, reports.say, reports.trouble)
