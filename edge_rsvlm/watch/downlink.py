"""What to send down first over a thin link: the most value in the bytes of one pass.

Classes come in a strict order: alerts, crops (evidence of alerts that are down or in this pass), captions (the result
line of each scene), thumbnails. Within a class, the next is what has the most value per byte that still fits; value is
the score of the alert, or the best score of the scene's alerts. What is sent is journalled, and the next pass goes on.
"""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edge_rsvlm.alerts.entries import alert_of
from edge_rsvlm.alerts.journal import Journal
from edge_rsvlm.alerts.retention import evidence_name, thumbnail_path
from edge_rsvlm.errors import UsageError
from edge_rsvlm.sinks.features import alert_feature
from edge_rsvlm.sinks.files import writing, written_whole
from edge_rsvlm.sinks.records import dumps

CLASSES = ("alert", "crop", "caption", "thumbnail")
MANIFEST, WAITING = "manifest.json", "waiting.jsonl"
HEAD_BYTES = 1024
"""Kept of the budget for the manifest without its list of what was sent."""


@dataclass(frozen=True)
class Item:
    """``name`` is its key in the journal, ``source`` the file that it is, empty for a line of text."""

    kind: str
    name: str
    value: float
    size: int
    source: str

    @property
    def entry(self) -> dict[str, Any]:
        return {"kind": self.kind, "name": self.name, "bytes": self.size}

    @property
    def cost(self) -> int:
        """Bytes with its entry in the manifest."""
        return self.size + len(dumps(self.entry).encode()) + 2


@dataclass
class Pass:
    """What one pass sends, and how much of each class waits after it."""

    number: int
    budget_bytes: int
    sent: list[dict[str, Any]] = field(default_factory=list)
    sent_bytes: int = 0
    waiting: dict[str, dict[str, int]] = field(
        default_factory=lambda: {kind: {"count": 0, "bytes": 0} for kind in CLASSES}
    )

    @property
    def manifest(self) -> dict[str, Any]:
        return {
            "version": 1, "pass": self.number, "budget_bytes": self.budget_bytes, "sent_bytes": self.sent_bytes,
            "waiting": self.waiting, "sent": self.sent,
        }  # fmt: skip


def downlink(journal: Journal, to: Path, budget_bytes: int) -> tuple[Path, Pass]:
    """Write the next pass to a folder of its own in ``to``, all of its bytes within the budget, and ``waiting.jsonl``.

    A pass that was killed before it was journalled is made again, in the same folder. UsageError for a budget that
    holds no manifest, or a folder that cannot be written.
    """
    if budget_bytes < HEAD_BYTES:
        raise UsageError(f"{budget_bytes} bytes do not hold a manifest", fix=f"give at least {HEAD_BYTES} bytes")
    found = journal.row("SELECT coalesce(max(pass), 0) + 1 FROM sent")
    assert found
    this = Pass(int(found[0]), budget_bytes)
    folder = to / f"pass-{this.number:04d}"
    partial = to / f".{folder.name}.part"
    with writing(folder):
        for old in (partial, folder):
            if old.exists():
                shutil.rmtree(old)
        partial.mkdir(parents=True)
    with written_whole(to / WAITING) as waiting:
        with _snapshot(journal):
            _fill(journal, this, partial, waiting)
        (partial / MANIFEST).write_text(dumps(this.manifest) + "\n", encoding="utf-8")
        _sync(partial)
        partial.replace(folder)
    with journal.database.transaction():
        for entry in this.sent:
            sql = "INSERT OR REPLACE INTO sent (kind, name, bytes, pass) VALUES (?, ?, ?, ?)"
            journal.write(sql, entry["kind"], entry["name"], entry["bytes"], this.number)
    return folder, this


@contextmanager
def _snapshot(journal: Journal) -> Iterator[None]:
    """The journal as it is now, whatever a watch writes meanwhile; nothing is written to it."""
    journal.write("BEGIN")
    try:
        yield
    finally:
        journal.write("ROLLBACK")


def _fill(journal: Journal, this: Pass, folder: Path, waiting: Path) -> None:
    """Take what fits into the folder; list what does not."""
    left = this.budget_bytes - HEAD_BYTES
    picked: set[str] = set()
    with writing(folder), waiting.open("w", encoding="utf-8") as rest:
        for item, owner in _items(journal):
            allowed = item.kind != "crop" or owner in picked or _is_down(journal, owner)
            if allowed and item.cost <= left:
                _write(journal, item, folder)
                left -= item.cost
                this.sent.append(item.entry)
                this.sent_bytes += item.size
                if item.kind == "alert":
                    picked.add(item.name)
            else:
                rest.write(dumps(item.entry) + "\n")
                this.waiting[item.kind]["count"] += 1
                this.waiting[item.kind]["bytes"] += item.size


def _is_down(journal: Journal, alert: str) -> bool:
    return journal.row("SELECT 1 FROM sent WHERE kind = 'alert' AND name = ?", alert) is not None


def _items(journal: Journal) -> Iterator[tuple[Item, str]]:
    """Everything that waits, in the order of sending, with the alert that a crop belongs to.

    They are sorted in a temporary table, so that any number may wait.
    """
    journal.write(
        "CREATE TEMP TABLE items (rank INTEGER, kind TEXT, name TEXT, value REAL, size INTEGER, source TEXT,"
        " owner TEXT, UNIQUE (kind, name))"
    )
    for item, owner in itertools.chain(_alerts_and_crops(journal), _scenes(journal)):
        row = (CLASSES.index(item.kind), item.kind, item.name, item.value, item.size, item.source, owner)
        journal.write("INSERT OR IGNORE INTO temp.items VALUES (?, ?, ?, ?, ?, ?, ?)", *row)
    journal.write(
        "DELETE FROM temp.items WHERE EXISTS (SELECT 1 FROM sent s WHERE s.kind = items.kind AND s.name = items.name)"
    )
    sql = "SELECT kind, name, value, size, source, owner FROM temp.items ORDER BY rank, value / size DESC, name"
    for *fields, owner in journal.rows(sql):
        yield Item(*fields), owner


def _alerts_and_crops(journal: Journal) -> Iterator[tuple[Item, str]]:
    for alert in journal.alerts():
        line = dumps(alert_feature(alert))
        yield Item("alert", alert.id, alert.score, len(line.encode()) + 1, ""), ""
        for crop in alert.crops:
            if Path(crop).is_file():
                name = evidence_name(journal.path, Path(crop))
                yield Item("crop", name, alert.score, Path(crop).stat().st_size, crop), alert.id


def _scenes(journal: Journal) -> Iterator[tuple[Item, str]]:
    for n, scene, line, value in journal.rows("SELECT n, scene, line, value FROM lines ORDER BY n"):
        yield Item("caption", str(n), value, len(line.encode()) + 1, ""), ""
        picture = thumbnail_path(journal.path, scene)
        if picture.is_file():
            name = evidence_name(journal.path, picture)
            yield Item("thumbnail", name, value, picture.stat().st_size, str(picture)), ""


def _write(journal: Journal, item: Item, folder: Path) -> None:
    """A line of a file of lines, or a file of its own."""
    if item.kind in ("alert", "caption"):
        name = "alerts.geojsonl" if item.kind == "alert" else "captions.jsonl"
        with (folder / name).open("a", encoding="utf-8") as stream:
            stream.write(_line(journal, item) + "\n")
        return
    place = folder / (item.name if not Path(item.name).is_absolute() else f"crops/{Path(item.name).name}")
    place.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(item.source, place)


def _line(journal: Journal, item: Item) -> str:
    """Not kept in the table of items, which would hold every alert twice."""
    table, key, column = ("alerts", "id", "json") if item.kind == "alert" else ("lines", "n", "line")
    found = journal.row(f"SELECT {column} FROM {table} WHERE {key} = ?", item.name)
    assert found, f"{item.kind} {item.name} was forgotten during the pass"
    return dumps(alert_feature(alert_of(found[0]))) if item.kind == "alert" else str(found[0])


def _sync(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as stream:
                os.fsync(stream.fileno())
