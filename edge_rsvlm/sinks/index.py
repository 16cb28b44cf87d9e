"""An index for retrieval: unit vectors of images and tiles in 8 bits, as usearch keeps them, and a line of JSON each.

Vectors are appended to a journal, and the usearch file absorbs them many at a time: it is replaced whole. So is
``index.json``, which says how many vectors count: what a crash left behind it is cut off by the next writer and never
seen by a reader. The key of a vector is the number of its line. Letters: R rows, D dimensions.
"""

from __future__ import annotations

import json
import os
from collections.abc import Container, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from edge_rsvlm.config.model import Model, parse
from edge_rsvlm.errors import UsageError
from edge_rsvlm.sinks.files import writing, written_whole
from edge_rsvlm.sinks.records import dumps

VECTORS, JOURNAL, RECORDS, FACTS = "vectors.usearch", "journal.f16", "records.jsonl", "index.json"
SCHEMA_VERSION = 2
DTYPE, ITEM_BYTES = "<f2", 2
ABSORBED_AT_ONCE = 4096
"""Vectors in the journal from which on a writer does not wait for its end."""
MOST_EXACT = 1 << 20
"""Vectors up to which a search compares all: 10 ms for 100,000 of 128 on one core. Beyond it follows the graph of
Malkov & Yashunin 2016, "Efficient and robust approximate nearest neighbor search" (HNSW), as usearch builds it."""


class IndexFacts(Model):
    """``index.json``: which model made the vectors, how many are whole, and how many of those left the journal."""

    schema_version: int = SCHEMA_VERSION
    bundle: str
    version: int
    manifest_sha256: str
    dim: int
    count: int
    absorbed: int
    records_bytes: int


@dataclass(frozen=True)
class Maker:
    """The bundle that makes vectors."""

    bundle: str
    version: int
    manifest_sha256: str


@dataclass(frozen=True)
class Hit:
    """A record of the index and its cosine to the query."""

    score: float
    record: dict[str, Any]


def require_usearch() -> Any:
    """The module ``usearch.index``; UsageError with the install command where it is missing."""
    try:
        import usearch.index
    except ImportError as exc:
        raise UsageError("an index needs usearch", fix="pip install 'edge-rsvlm[search]'") from exc
    return usearch.index


def read_facts(folder: Path, maker: Maker) -> IndexFacts:
    """What an index holds; UsageError where there is none, or another bundle made it."""
    path = folder / FACTS
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise UsageError(f"{folder} holds no index ({exc})", fix="make it: edge-rsvlm index IMAGES --to DIR") from exc
    if isinstance(data, dict) and data.get("schema_version") != SCHEMA_VERSION:
        raise UsageError(f"{folder} was made by another edge-rsvlm", fix="index the images again into a new folder")
    facts = parse(IndexFacts, data, str(path), UsageError)
    if facts.manifest_sha256 != maker.manifest_sha256:
        raise UsageError(
            f"{folder} was made by bundle '{facts.bundle}' version {facts.version}, whose vectors mean nothing to "
            f"'{maker.bundle}' version {maker.version}",
            fix="name that bundle with --bundle, or index the images again into a new folder",
        )
    records = folder / RECORDS
    if not records.is_file() or records.stat().st_size < facts.records_bytes:
        raise _cut_off(records)
    return facts


def _cut_off(path: Path) -> UsageError:
    return UsageError(f"{path} is cut off", fix="index the images again into a new folder")


class IndexWriter:
    """Adds to the index in ``folder``, which is made where there is none.

    What was added since the last ``commit`` is dropped when the block is left. While it absorbs, the usearch file is in
    memory: D + 150 bytes per vector. Raises UsageError when the folder cannot be written, or holds an index of another
    bundle.
    """

    def __init__(self, folder: Path, maker: Maker) -> None:
        self._folder, self._maker = folder, maker
        self._dim = self._count = self._absorbed = self._records_bytes = self._added = 0
        self._stack = ExitStack()
        self._journal: BinaryIO
        self._records: BinaryIO
        self._index: Any = None
        self.images: set[str] = set()
        """Names of the images that the index holds."""

    def __enter__(self) -> IndexWriter:
        require_usearch()
        with writing(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
        if (self._folder / FACTS).exists():
            facts = read_facts(self._folder, self._maker)
            self._dim, self._count, self._absorbed = facts.dim, facts.count, facts.absorbed
            self._records_bytes = facts.records_bytes
            self.images = {record["image"] for record in _records(self._folder, facts)}
            _journaled(self._folder, facts, facts.absorbed)
        else:
            _check_free(self._folder)
            self._write_facts()
        with ExitStack() as stack:
            self._journal = stack.enter_context(self._opened(JOURNAL))
            self._records = stack.enter_context(self._opened(RECORDS))
            self._stack = stack.pop_all()
        self.rollback()
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        with self._stack:
            self.rollback()
            if exc is None:
                self._absorb()

    def _opened(self, name: str) -> BinaryIO:
        path = self._folder / name
        with writing(path):
            path.touch()
            return path.open("r+b")

    def rollback(self) -> None:
        """Forget what was added since the last ``commit``."""
        self._added = 0
        sizes = (ITEM_BYTES * self._dim * (self._count - self._absorbed), self._records_bytes)
        with writing(self._folder):
            for stream, size in zip((self._journal, self._records), sizes, strict=True):
                stream.truncate(size)
                stream.seek(size)

    def add(self, image: str, vector_D: NDArray[np.floating], record: Mapping[str, Any]) -> None:
        """Add the unit vector of an image or of a tile, with what is to be known of it."""
        if not self._count + self._added:
            self._dim = len(vector_D)
        if len(vector_D) != self._dim:
            problem = f"{self._folder} holds vectors of {self._dim} and got {len(vector_D)}"
            raise UsageError(problem, fix="index into a new folder")
        with writing(self._folder):
            self._journal.write(vector_D.astype(DTYPE).tobytes())
            self._records.write((dumps({"image": image, **record}) + "\n").encode())
        self._added += 1

    def commit(self, image: str) -> None:
        """Make what was added last, of ``image``, part of the index."""
        if not self._added:
            return
        with writing(self._folder):
            for stream in (self._journal, self._records):
                stream.flush()
                os.fsync(stream.fileno())
        self._count, self._records_bytes = self._count + self._added, self._records.tell()
        self._write_facts()
        self.images.add(image)
        self.rollback()
        if self._count - self._absorbed >= ABSORBED_AT_ONCE:
            self._absorb()

    def _write_facts(self) -> None:
        with written_whole(self._folder / FACTS) as partial, writing(self._folder / FACTS):
            partial.write_text(dumps(self._facts().model_dump()) + "\n", encoding="utf-8")
            _synced(partial)

    def _absorb(self) -> None:
        """Move the journal into the usearch file, which is on the disk before the journal is emptied."""
        if self._count == self._absorbed:
            return
        path = self._folder / VECTORS
        if self._index is None:
            self._index = _empty(self._dim)
            if path.exists():
                with _usearch_errors(path):
                    self._index.load(str(path))
        # A crash may have come between the file and the facts: then it has more vectors than these say.
        start = len(self._index)
        keys_R = np.arange(start, self._count, dtype=np.uint64)
        rows_RD = _journaled(self._folder, self._facts(), start)
        self._index.add(keys_R, rows_RD.astype(np.float32), threads=1)
        with written_whole(path) as partial, _usearch_errors(path):
            self._index.save(str(partial))
            _synced(partial)
        self._absorbed = self._count
        self._write_facts()
        _synced(self._folder)
        self.rollback()

    def _facts(self) -> IndexFacts:
        return IndexFacts(
            **asdict(self._maker), dim=self._dim, count=self._count, absorbed=self._absorbed,
            records_bytes=self._records_bytes,
        )  # fmt: skip


def _check_free(folder: Path) -> None:
    """UsageError rather than to overwrite what is not ours."""
    for name in (VECTORS, JOURNAL, RECORDS):
        if (folder / name).exists():
            raise UsageError(f"{folder / name} exists and belongs to no index", fix="index into another folder")


def _synced(path: Path) -> None:
    """On the disk, and not only in memory: a file, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _empty(dim: int) -> Any:
    # Keys are never looked up, which saves the memory of a table of them.
    return require_usearch().Index(ndim=dim, metric="cos", dtype="i8", enable_key_lookups=False)


@contextmanager
def _usearch_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, OSError) as exc:
        raise UsageError(f"{path}: {exc}", fix="index the images again into a new folder") from exc


def _journaled(folder: Path, facts: IndexFacts, start: int) -> NDArray[np.float16]:
    """Vectors [R, D] of the journal from number ``start`` on; UsageError where it is too short."""
    path, count = folder / JOURNAL, facts.count - start
    if count <= 0:
        return np.zeros((0, facts.dim), np.float16)
    offset = ITEM_BYTES * facts.dim * (start - facts.absorbed)
    if not path.is_file() or path.stat().st_size < offset + ITEM_BYTES * facts.dim * count:
        raise _cut_off(path)
    return np.asarray(np.memmap(path, DTYPE, "r", offset, (count, facts.dim)))


def _records(folder: Path, facts: IndexFacts, chosen: Container[int] | None = None) -> Iterator[dict[str, Any]]:
    """Records in order, of the ``chosen`` rows or of all."""
    with (folder / RECORDS).open("rb") as lines:
        for row, line in zip(range(facts.count), lines, strict=False):
            if chosen is not None and row not in chosen:
                continue
            try:
                record: dict[str, Any] = json.loads(line)
            except ValueError as exc:
                raise UsageError(
                    f"{folder / RECORDS}, line {row + 1}, is broken ({exc})", fix="index the images again"
                ) from exc
            yield record


def search_index(folder: Path, facts: IndexFacts, query_D: NDArray[np.floating], top: int) -> list[Hit]:
    """The ``top`` records nearest to a unit vector by cosine, best first; of equals the earlier.

    Vectors are 8 bits, so that a cosine is off by some thousandths. All are compared, up to MOST_EXACT of them.
    """
    if not facts.count:
        return []
    query_D = query_D.astype(np.float32)
    if len(query_D) != facts.dim:
        raise UsageError(f"{folder} holds vectors of {facts.dim}, not {len(query_D)}", fix="index the images again")
    absorbed, rows_R, scores_R = _absorbed_hits(folder, facts, query_D, top)
    late_RD = _journaled(folder, facts, absorbed).astype(np.float32)
    rows_R = np.concatenate([rows_R, absorbed + np.arange(len(late_RD))])
    scores_R = np.concatenate([scores_R, late_RD @ query_D])
    best = np.lexsort((rows_R, -scores_R))[:top]
    rows = sorted(int(row) for row in rows_R[best])
    records = list(_records(folder, facts, set(rows)))
    if len(records) < len(rows):
        raise _cut_off(folder / RECORDS)
    found = dict(zip(rows, records, strict=True))
    return [Hit(float(scores_R[i]), found[int(rows_R[i])]) for i in best]


def _absorbed_hits(
    folder: Path, facts: IndexFacts, query_D: NDArray[np.float32], top: int
) -> tuple[int, NDArray[np.int64], NDArray[np.float32]]:
    """How many vectors the usearch file has, and the rows and cosines of the nearest of those that count."""
    path, index = folder / VECTORS, _empty(facts.dim)
    if path.exists():
        with _usearch_errors(path):
            index.view(str(path))
    if len(index) < facts.absorbed or (len(index) and index.ndim != facts.dim):
        raise _cut_off(path)
    if not len(index):
        return 0, np.zeros(0, np.int64), np.zeros(0, np.float32)
    matches = index.search(query_D, top, threads=1, exact=len(index) <= MOST_EXACT)
    rows_R, scores_R = matches.keys.astype(np.int64), (1 - matches.distances).astype(np.float32)
    known = rows_R < facts.count
    return len(index), rows_R[known], scores_R[known]
