"""Two scenes compared: the seam between a watch and the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from edge_rsvlm.alerts.tracks import Tracks
from edge_rsvlm.config.rules import Rules
from edge_rsvlm.pipeline.alerting import check_classes, compare
from edge_rsvlm.pipeline.outcome import Progress
from edge_rsvlm.pipeline.session import Session
from edge_rsvlm.raster.inputs import Source
from edge_rsvlm.types import Alert


@dataclass(frozen=True)
class Compared:
    """``record`` is what a result line says of the comparison; ``tracks`` are the place's rows from now on.

    ``pending``: what was seen has yet to persist, so that the next scene is to be compared with the same earlier one.
    """

    record: dict[str, Any]
    alerts: Sequence[Alert]
    tracks: Sequence[dict[str, Any]]
    complete: bool = True
    pending: bool = False


class Compare(Protocol):
    """Compares two scenes. ``tracks`` are the rows of the place, ``when`` is the time of the later scene.

    Evidence images go to the folder ``crops``. Raises InputError or BudgetError when that cannot be done, and lets
    through what ``progress`` raises.
    """

    def __call__(
        self, before: Source, after: Source, *, tracks: list[dict[str, Any]], when: str, crops: Path, progress: Progress
    ) -> Compared: ...


def by_model(session: Session, rules: Rules | None) -> Compare:
    """Comparisons by the model of a session, with alerts by ``rules``; UsageError where it can never meet them."""
    if rules is not None:
        check_classes(rules, session.bundle)

    def compared(
        before: Source, after: Source, *, tracks: list[dict[str, Any]], when: str, crops: Path, progress: Progress
    ) -> Compared:
        count = 0

        def emit(record: dict[str, Any], geometry: dict[str, Any] | None) -> None:
            nonlocal count
            count += 1

        found = compare(
            session,
            before,
            after,
            emit,
            rules=rules,
            tracks=Tracks.of(tracks),
            when=when,
            crops=crops if rules else None,
            progress=progress,
        )
        record = {"changed_fraction": round(found.outcome.changed_fraction, 6), "changes": count}
        for name in ("held_back", "pending", "silenced"):
            if getattr(found, name):
                record[name] = getattr(found, name)
        record |= found.outcome.record()
        return Compared(record, found.alerts, found.tracks.rows(), found.outcome.complete, bool(found.pending))

    return compared
