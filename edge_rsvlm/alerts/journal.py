"""What was seen, found and told, in one file: a scene's whole result is committed at once, or not at all.

So a process that is killed at any moment has either answered a scene, with its alerts queued for every sink, or will
answer it at its next start; nothing is answered twice. Beside the file lie folders of evidence: crops of alerts, and a
thumbnail of every scene.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from edge_rsvlm.alerts.entries import SCENE, Corner, Result, Scene, Seen, State, alert_of, dumps, scene_of
from edge_rsvlm.alerts.store import Database
from edge_rsvlm.errors import UsageError
from edge_rsvlm.types import Alert

_FIRST = "SELECT min(seq) FROM scenes WHERE identity = ? AND state IN ('waiting', 'done')"
MOST_EARLIER = 1000
"""Scenes of a place that are asked whether their file is still there."""
MOST_STRIKES = 2
"""A scene with which so many comparisons in a row failed is no longer taken for an earlier date."""


@dataclass
class Journal:
    """The journal at ``path``, made where there is none. One per thread; ``durable`` commits outlive a power cut.

    Raises JournalFullError when nothing can be written, UsageError when the file is no journal of this version.
    """

    path: Path
    durable: bool = True
    database: Database = field(init=False, repr=False)

    def __post_init__(self) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as exc:
            raise UsageError(f"cannot make {self.path.parent}: {exc.strerror}", fix="give another --journal") from exc
        self.database = Database(self.path, durable=self.durable)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.database.close()

    def rows(self, sql: str, *values: Any) -> Iterator[tuple[Any, ...]]:
        """Rows one by one."""
        with self.database.errors():
            yield from self.database.connection.execute(sql, values)

    def row(self, sql: str, *values: Any) -> tuple[Any, ...] | None:
        """The first row of a query, which ends here: an open one would hold back the log."""
        with self.database.errors():
            cursor = self.database.connection.execute(sql, values)
            found: tuple[Any, ...] | None = cursor.fetchone()
            cursor.close()
            return found

    def write(self, sql: str, *values: Any) -> int:
        """One statement; a transaction of its own outside of one. Returns the rows that it changed."""
        with self.database.errors():
            return self.database.connection.execute(sql, values).rowcount

    # --- scenes ---

    def knows(self, path: str, size: int, mtime_ns: int) -> bool:
        """Whether a file was taken in as it is."""
        sql = "SELECT 1 FROM scenes WHERE path = ? AND size = ? AND mtime_ns = ?"
        return self.row(sql, path, size, mtime_ns) is not None

    def same_content(self, identity: str) -> str | None:
        """The path under which this content was first taken in and not given up."""
        found = self.row(f"SELECT path FROM scenes WHERE seq = ({_FIRST})", identity)
        return str(found[0]) if found else None

    def rename(self, seen: Seen) -> None:
        """The first scene of this content has another path or time now."""
        sql = f"UPDATE scenes SET path = ?, mtime_ns = ? WHERE seq = ({_FIRST})"
        self.write(sql, seen.path, seen.mtime_ns, seen.identity)

    def admit(
        self,
        seen: Seen,
        *,
        taken: str,
        footprint: Sequence[Corner] | None = None,
        alike: str | None = None,
        place: int | None = None,
        drops: Sequence[tuple[Scene, dict[str, Any]]] = (),
    ) -> int:
        """Queue a scene, and drop others with the lines that say so. ``place`` None: it is the first of its place."""
        latitudes = [lat for _, lat in footprint or ()]
        south, north = min(latitudes, default=None), max(latitudes, default=None)
        corners = json.dumps(footprint) if footprint else None
        with self.database.transaction():
            for scene, line in drops:
                self._finish(scene.seq, "dropped", line)
            seq = self.database.connection.execute(
                "INSERT INTO scenes (path, size, mtime_ns, identity, state, place, taken, footprint, south, north,"
                " alike) VALUES (?, ?, ?, ?, 'waiting', ?, ?, ?, ?, ?, ?)",
                (*asdict(seen).values(), place or 0, taken, corners, south, north, alike),
            ).lastrowid
            assert seq is not None
            self.write("UPDATE scenes SET place = seq WHERE seq = ? AND place = 0", seq)
        return seq

    def answer_at_once(self, seen: Seen, state: State, line: dict[str, Any], taken: str) -> None:
        """Take in a file that needs no comparison: it cannot be read, or its content was answered before."""
        with self.database.transaction():
            sql = (
                "INSERT INTO scenes (path, size, mtime_ns, identity, state, place, taken)"
                " VALUES (?, ?, ?, ?, 'waiting', 0, ?)"
            )
            seq = self.database.connection.execute(sql, (*asdict(seen).values(), taken)).lastrowid
            assert seq is not None
            self._finish(seq, state, line)

    def waiting(self) -> Iterator[Scene]:
        """Scenes in the queue, by their order of arrival."""
        for row in self.rows(f"SELECT {SCENE} FROM scenes WHERE state = 'waiting' ORDER BY seq"):
            yield scene_of(row)

    def waiting_count(self) -> int:
        found = self.row("SELECT count(*) FROM scenes WHERE state = 'waiting'")
        assert found
        return int(found[0])

    def neighbours(self, latitudes: tuple[float, float] | None, alike: str | None) -> Iterator[Scene]:
        """Scenes that may be of the same place, the latest first: within the latitudes (south, north), or alike."""
        which: str = "alike = ?"
        values: list[Any] = [alike]
        if latitudes is not None:
            south, north = latitudes
            which, values = "south <= ? AND north >= ?", [north, south]
        sql = f"SELECT {SCENE} FROM scenes WHERE state IN ('waiting', 'done') AND {which} ORDER BY taken DESC, seq DESC"
        for row in self.rows(sql, *values):
            yield scene_of(row)

    def earlier(self, scene: Scene) -> Iterator[Scene]:
        """Scenes of the same place that were answered, taken no later: the one to be kept to, then the latest first."""
        rows = self.rows(
            f"SELECT {SCENE} FROM scenes WHERE place = ? AND state = 'done' AND strikes < ? AND (taken, seq) < (?, ?)"
            " ORDER BY seq IS (SELECT reference FROM places WHERE place = scenes.place) DESC, taken DESC, seq DESC"
            " LIMIT ?",
            scene.place,
            MOST_STRIKES,
            scene.taken,
            scene.seq,
            MOST_EARLIER,
        )
        for row in rows:
            yield scene_of(row)

    def tracks(self, place: int) -> list[dict[str, Any]]:
        """Rows of the rules engine for one place."""
        return [json.loads(row) for (row,) in self.rows("SELECT row FROM tracks WHERE place = ? ORDER BY n", place)]

    def commit(self, scene: Scene, result: Result, sinks: Sequence[str]) -> None:
        """The result of a scene, its alerts queued for every sink: all in one transaction."""
        with self.database.transaction():
            value = max((alert.score for alert in result.alerts), default=0.0)
            self._finish(scene.seq, result.state, result.line, value, len(result.thumbnail))
            for alert in result.alerts:
                self._queue(scene.seq, alert, sinks)
            if result.tracks is not None:
                self.write("DELETE FROM tracks WHERE place = ?", scene.place)
                for n, row in enumerate(result.tracks):
                    self.write("INSERT INTO tracks VALUES (?, ?, ?)", scene.place, n, dumps(row))
            if result.compared is not None:
                self.write("UPDATE scenes SET strikes = 0 WHERE seq = ?", result.compared)
                reference = result.compared if result.keeps else None
                self.write("INSERT OR REPLACE INTO places VALUES (?, ?)", scene.place, reference)
            self.write("UPDATE scenes SET strikes = strikes + 1 WHERE seq = ?", result.blames)

    def _finish(self, seq: int, state: State, line: dict[str, Any], value: float = 0.0, file_bytes: int = 0) -> None:
        self.write("UPDATE scenes SET state = ? WHERE seq = ?", state, seq)
        sql = "INSERT INTO lines (scene, line, value, file_bytes) VALUES (?, ?, ?, ?)"
        self.write(sql, seq, dumps(line), value, file_bytes)

    def _queue(self, seq: int, alert: Alert, sinks: Sequence[str]) -> None:
        """An alert that is known already is not queued again."""
        sql = "INSERT OR IGNORE INTO alerts (id, scene, score, json, file_bytes) VALUES (?, ?, ?, ?, ?)"
        file_bytes = sum(Path(crop).stat().st_size for crop in alert.crops if Path(crop).is_file())
        if not self.write(sql, alert.id, seq, alert.score, dumps(asdict(alert)), file_bytes):
            return
        for sink in sinks:
            self.write(
                "INSERT INTO deliveries (alert, sink, arrival, score)"
                " SELECT id, ?, arrival, score FROM alerts WHERE id = ?",
                sink,
                alert.id,
            )

    # --- lines ---

    def untold(self) -> Iterator[tuple[int, str]]:
        """Result lines that may not have been told yet, with their numbers, oldest first."""
        n = 0
        while found := self.row("SELECT n, line FROM lines WHERE told = 0 AND n > ? ORDER BY n LIMIT 1", n):
            n = found[0]
            yield n, found[1]

    def told(self, n: int, outputs: dict[str, int]) -> None:
        """Line ``n`` is out, and ``outputs`` have these lengths in bytes with it."""
        with self.database.transaction():
            self.write("UPDATE lines SET told = 1 WHERE n = ?", n)
            for path, length in outputs.items():
                self.write("INSERT OR REPLACE INTO outputs VALUES (?, ?)", path, length)

    def expect(self, path: str, length: int) -> None:
        """The length of a file to which no line was written yet."""
        self.write("INSERT OR IGNORE INTO outputs VALUES (?, ?)", path, length)

    def output_length(self, path: str) -> int | None:
        """Bytes of a file after the last line that is known to be in it."""
        found = self.row("SELECT length FROM outputs WHERE path = ?", path)
        return int(found[0]) if found else None

    # --- alerts ---

    def alerts(self) -> Iterator[Alert]:
        """Every alert that is kept, in the order in which they were found."""
        for (text,) in self.rows("SELECT json FROM alerts ORDER BY arrival"):
            yield alert_of(text)

    def counter(self, name: str) -> int:
        found = self.row("SELECT value FROM counters WHERE name = ?", name)
        return int(found[0]) if found else 0

    def count(self, name: str, more: int) -> None:
        """Add to a counter; inside a transaction."""
        self.write(
            "INSERT INTO counters VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET value = value + excluded.value",
            name,
            more,
        )
