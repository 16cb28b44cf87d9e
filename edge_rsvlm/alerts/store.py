"""The SQLite file under the journal: opened, versioned, locked, and with one error type for whatever goes wrong.

Write-ahead logging (https://sqlite.org/wal.html) lets one writer and many readers work at a time, each thread with its
own connection. A connection that is ``durable`` syncs every commit to the disk (``synchronous=FULL``), so that what it
committed outlives a power cut; another one loses at most its last commits, never the file.
"""

from __future__ import annotations

import fcntl
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from edge_rsvlm.errors import EdgeRsvlmError, UsageError

SCHEMA_VERSION = 1
APPLICATION_ID = 0x45525356
"""``ERSV``: the file is a journal and no other database."""
BUSY_S = 30.0
WAL_BYTES = 4 << 20
SCHEMA = """
CREATE TABLE scenes (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,  -- order of arrival
    path TEXT NOT NULL, size INTEGER NOT NULL, mtime_ns INTEGER NOT NULL,
    identity TEXT NOT NULL,                 -- of the content, whatever its name
    state TEXT NOT NULL CHECK (state IN ('waiting', 'done', 'failed', 'dropped')),
    place INTEGER NOT NULL,
    taken TEXT NOT NULL,                    -- ISO 8601 UTC, microseconds: sorts as text
    footprint TEXT,                         -- JSON [[lon, lat] x 4]; NULL without a place on Earth
    south REAL, north REAL,
    alike TEXT,                             -- what scenes of one place share that have no footprint
    strikes INTEGER NOT NULL DEFAULT 0      -- comparisons in a row that failed with it as the earlier date
);
CREATE INDEX scenes_path ON scenes (path, seq);
CREATE INDEX scenes_identity ON scenes (identity);
CREATE INDEX scenes_place ON scenes (place, state, taken);
CREATE INDEX scenes_waiting ON scenes (seq) WHERE state = 'waiting';
CREATE INDEX scenes_latitude ON scenes (south, north);
CREATE TABLE lines (
    n INTEGER PRIMARY KEY AUTOINCREMENT, scene INTEGER NOT NULL, line TEXT NOT NULL, told INTEGER NOT NULL DEFAULT 0,
    value REAL NOT NULL DEFAULT 0,          -- the best score of the scene's alerts
    file_bytes INTEGER NOT NULL DEFAULT 0   -- of its thumbnail
);
CREATE INDEX lines_untold ON lines (n) WHERE told = 0;
CREATE INDEX lines_scene ON lines (scene);
CREATE TABLE outputs (path TEXT PRIMARY KEY, length INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE tracks (place INTEGER NOT NULL, n INTEGER NOT NULL, row TEXT NOT NULL, PRIMARY KEY (place, n))
    WITHOUT ROWID;
CREATE TABLE places (
    place INTEGER PRIMARY KEY, reference INTEGER  -- the earlier date that the next scene is to be compared with
);
CREATE TABLE alerts (
    arrival INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, scene INTEGER NOT NULL, score REAL NOT NULL,
    json TEXT NOT NULL,
    file_bytes INTEGER NOT NULL DEFAULT 0   -- of its crops
);
CREATE INDEX alerts_score ON alerts (score);
CREATE INDEX alerts_scene ON alerts (scene);
CREATE TABLE deliveries (
    alert TEXT NOT NULL, sink TEXT NOT NULL, arrival INTEGER NOT NULL, score REAL NOT NULL,
    state TEXT NOT NULL DEFAULT 'waiting' CHECK (state IN ('waiting', 'done', 'failed')),
    attempts INTEGER NOT NULL DEFAULT 0, next_attempt REAL NOT NULL DEFAULT 0, error TEXT,
    aside INTEGER NOT NULL DEFAULT 0,       -- others go first: it failed while the next one was taken
    PRIMARY KEY (alert, sink)
) WITHOUT ROWID;
CREATE INDEX deliveries_oldest ON deliveries (sink, arrival) WHERE state = 'waiting';
CREATE INDEX deliveries_score ON deliveries (sink, score DESC, arrival) WHERE state = 'waiting';
CREATE TABLE sent (kind TEXT NOT NULL, name TEXT NOT NULL, bytes INTEGER NOT NULL, pass INTEGER NOT NULL,
    PRIMARY KEY (kind, name)) WITHOUT ROWID;
CREATE TABLE counters (name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
"""


class JournalFullError(EdgeRsvlmError):
    """The disk has no room, or may not be written for now; what was being written is as if it had not begun."""

    exit_code = 3


class Database:
    """One connection to the file at ``path``, for one thread. UsageError when it is no journal of ours."""

    def __init__(self, path: Path, *, durable: bool) -> None:
        self.path = path
        with self.errors():
            self.connection = sqlite3.connect(path, timeout=BUSY_S, isolation_level=None)
        try:
            self._prepare(durable)
        except BaseException:
            self.connection.close()
            raise

    def _prepare(self, durable: bool) -> None:
        with self.errors():
            self._check_version()
            self.connection.execute("PRAGMA journal_mode = WAL")
            self.connection.execute(f"PRAGMA journal_size_limit = {WAL_BYTES}")
            self.connection.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
        with self.transaction():
            if self._pragma("user_version") == 0:  # another process may have made the tables meanwhile
                for statement in SCHEMA.split(";\n"):
                    self.connection.execute(statement)
                self.connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
                self.connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")

    def _check_version(self) -> None:
        version, tables = self._pragma("user_version"), self._pragma("schema_version")
        if (version or tables) and self._pragma("application_id") != APPLICATION_ID:
            raise UsageError(f"{self.path} is another database, not a journal", fix="give another --journal")
        if version > SCHEMA_VERSION:
            raise UsageError(
                f"{self.path} is a journal of version {version}, and this edge-rsvlm knows {SCHEMA_VERSION}",
                fix="install the newer edge-rsvlm that wrote it, or give another --journal",
            )

    def _pragma(self, name: str) -> int:
        return int(self.connection.execute(f"PRAGMA {name}").fetchone()[0])

    @property
    def used_bytes(self) -> int:
        """Bytes of pages in use; pages that were freed are used again."""
        return (self._pragma("page_count") - self._pragma("freelist_count")) * self._pragma("page_size")

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All of it or nothing."""
        with self.errors():
            self.connection.execute("BEGIN IMMEDIATE")
            try:
                yield
                self.connection.execute("COMMIT")
            except BaseException:
                if self.connection.in_transaction:  # a full disk has rolled back already
                    self.connection.execute("ROLLBACK")
                raise

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Failures of SQLite as JournalFullError, when they may pass, or as UsageError."""
        try:
            yield
        except sqlite3.DatabaseError as exc:
            reason = str(exc)
            if "disk is full" in reason or "disk I/O error" in reason:
                raise JournalFullError(
                    f"cannot write the journal {self.path}: {reason}", fix="make room on that disk; it is tried again"
                ) from exc
            if "unable to open" in reason or "readonly" in reason:
                raise UsageError(
                    f"cannot write the journal {self.path}: {reason}", fix="choose a folder that may be written"
                ) from exc
            if "locked" in reason:
                raise JournalFullError(
                    f"the journal {self.path} was busy for {BUSY_S:.0f} s", fix="end what holds it; it is tried again"
                ) from exc
            if not isinstance(exc, sqlite3.OperationalError) and "database" in reason:
                raise UsageError(
                    f"{self.path} is not a whole journal ({reason})", fix="move it away, or give another --journal"
                ) from exc
            raise

    def close(self) -> None:
        self.connection.close()


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Holds the journal at ``path`` for one watch; UsageError while another has it. A killed process lets go of it."""
    lock = path.with_name(f"{path.name}.lock")
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        stream = lock.open("a")
    except OSError as exc:
        raise UsageError(
            f"cannot write {lock}: {exc.strerror}", fix="give a --journal in a folder that may be written"
        ) from exc
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as exc:
            raise UsageError(
                f"another watch works with the journal {path}", fix="stop it, or give another --journal"
            ) from exc
        yield
