"""One waiting scene answered: compared with the one before it, and its whole result as one value."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edge_rsvlm.alerts.entries import Result, Scene
from edge_rsvlm.alerts.journal import Journal
from edge_rsvlm.alerts.retention import crop_folder
from edge_rsvlm.errors import BudgetError, InputError
from edge_rsvlm.raster.inputs import Source
from edge_rsvlm.watch.comparing import Compare, Compared
from edge_rsvlm.watch.folder import stat
from edge_rsvlm.watch.intake import covers
from edge_rsvlm.watch.thumbnails import thumbnail


class Stopped(Exception):
    """The watch was told to end; the scene it was at stays as it was."""


@dataclass
class Answerer:
    """``failed`` is told of scenes that could not be compared, ``partial`` of those whose deadline came first."""

    journal: Journal
    compare: Compare
    stop: threading.Event
    shown: Callable[[str], str]
    failed: Callable[[str, InputError | BudgetError], None]
    partial: Callable[[str, float], None]

    def answer(self, scene: Scene) -> Result:
        """What to commit for a scene. Stopped when the watch shall end meanwhile."""
        head = {"image": self.shown(scene.path)}
        if not self._as_it_was(scene):
            return Result("dropped", {**head, "dropped": "the file was removed or replaced while it waited"})
        before = self._before(scene)
        line: dict[str, Any] = {**head, "before": before and self.shown(before.path), "taken": scene.taken}
        try:
            picture = thumbnail(scene.path)
            if before is None:
                return Result("done", {**line, "alerts": []}, thumbnail=picture)
            found = self._compared(before, scene)
        except (InputError, BudgetError) as exc:
            self.failed(head["image"], exc)
            blames = before.seq if before and isinstance(exc, InputError) else None
            return Result("failed", {**line, "error": str(exc)}, blames=blames)
        if not found.complete:
            self.partial(head["image"], found.record.get("coverage", 0.0))
        line |= {**found.record, "alerts": [alert.id for alert in found.alerts]}
        return Result("done", line, found.alerts, found.tracks, before.seq, found.pending, thumbnail=picture)

    def _before(self, scene: Scene) -> Scene | None:
        """The earlier scene to compare with, which is still what it was and covers enough of this one.

        The latest, but the one before again while what was seen against it has yet to persist: against the scene in
        which a change came it is no change any more.
        """
        found = (earlier for earlier in self.journal.earlier(scene) if covers(earlier, scene))
        return next((earlier for earlier in found if self._as_it_was(earlier)), None)

    @staticmethod
    def _as_it_was(scene: Scene) -> bool:
        file = stat(Path(scene.path))
        return file is not None and (file.size, file.mtime_ns) == (scene.seen.size, scene.seen.mtime_ns)

    def _compared(self, before: Scene, scene: Scene) -> Compared:
        crops = crop_folder(self.journal.path, scene.seq)
        shutil.rmtree(crops, ignore_errors=True)  # of a try that was killed
        began = time.monotonic()
        found = self.compare(
            Source(self.shown(before.path), before.path),
            Source(self.shown(scene.path), scene.path),
            tracks=self.journal.tracks(scene.place),
            when=scene.taken,
            crops=crops,
            progress=self._progress,
        )
        _keep_evidence(crops, found)
        timing = {**found.record.get("timing_ms", {}), "total": round((time.monotonic() - began) * 1e3, 1)}
        return replace(found, record={**found.record, "timing_ms": timing})

    def _progress(self, done: int, total: int) -> None:
        if self.stop.is_set():
            raise Stopped


def _keep_evidence(crops: Path, found: Compared) -> None:
    """Only crops that an alert names stay."""
    if not crops.is_dir():
        return
    named = {Path(crop).resolve() for alert in found.alerts for crop in alert.crops}
    for path in crops.iterdir():
        if path.resolve() not in named:
            path.unlink()
    if not any(crops.iterdir()):
        crops.rmdir()
