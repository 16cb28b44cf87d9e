"""An index for retrieval: unit vectors of images and tiles in ``.npy``, and a line of JSON for each.

Both files only grow, and ``index.json``, which is replaced whole, says how much of them counts: what a crash left
behind it is cut off by the next writer and never seen by a reader.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
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

VECTORS, RECORDS, FACTS = "embeddings.npy", "records.jsonl", "index.json"
HEADER_BYTES, DTYPE, ITEM_BYTES = 128, "<f2", 2
CHUNK_BYTES = 8 << 20
"""Of float32, for what is compared at once."""


class IndexFacts(Model):
    """``index.json``: which model made the vectors, and how many of them are whole."""

    schema_version: int = 1
    bundle: str
    version: int
    manifest_sha256: str
    dim: int
    count: int
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


def read_facts(folder: Path, maker: Maker) -> IndexFacts:
    """What an index holds; UsageError where there is none, or another bundle made it."""
    path = folder / FACTS
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise UsageError(f"{folder} holds no index ({exc})", fix="make it: edge-rsvlm index IMAGES --to DIR") from exc
    facts = parse(IndexFacts, data, str(path), UsageError)
    if facts.manifest_sha256 != maker.manifest_sha256:
        raise UsageError(
            f"{folder} was made by bundle '{facts.bundle}' version {facts.version}, whose vectors mean nothing to "
            f"'{maker.bundle}' version {maker.version}",
            fix="name that bundle with --bundle, or index the images again into a new folder",
        )
    _check_sizes(folder, facts)
    return facts


def _check_sizes(folder: Path, facts: IndexFacts) -> None:
    needed = {VECTORS: HEADER_BYTES + ITEM_BYTES * facts.dim * facts.count, RECORDS: facts.records_bytes}
    for name, size in needed.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size < size:
            raise UsageError(f"{path} is cut off", fix="index the images again into a new folder")


class IndexWriter:
    """Adds to the index in ``folder``, which is made where there is none.

    What was added since the last ``commit`` is dropped when the block is left. Raises UsageError when the folder cannot
    be written, or holds an index of another bundle.
    """

    def __init__(self, folder: Path, maker: Maker) -> None:
        self._folder, self._maker = folder, maker
        self._dim = self._count = self._records_bytes = self._added = 0
        self._stack = ExitStack()
        self._vectors: BinaryIO
        self._records: BinaryIO
        self.images: set[str] = set()
        """Names of the images that the index holds."""

    def __enter__(self) -> IndexWriter:
        with writing(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
        if (self._folder / FACTS).exists():
            facts = read_facts(self._folder, self._maker)
            self._dim, self._count, self._records_bytes = facts.dim, facts.count, facts.records_bytes
            self.images = {record["image"] for record in _records(self._folder, facts)}
        else:
            _check_free(self._folder)
        with ExitStack() as stack:
            self._vectors = stack.enter_context(self._opened(VECTORS))
            self._records = stack.enter_context(self._opened(RECORDS))
            self._stack = stack.pop_all()
        self.rollback()
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        with self._stack:
            self.rollback()

    def _opened(self, name: str) -> BinaryIO:
        path = self._folder / name
        with writing(path):
            path.touch()
            return path.open("r+b")

    def rollback(self) -> None:
        """Forget what was added since the last ``commit``."""
        self._added = 0
        sizes = (HEADER_BYTES + ITEM_BYTES * self._dim * self._count, self._records_bytes)
        with writing(self._folder):
            for stream, size in zip((self._vectors, self._records), sizes, strict=True):
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
            self._vectors.write(vector_D.astype(DTYPE).tobytes())
            self._records.write((dumps({"image": image, **record}) + "\n").encode())
        self._added += 1

    def commit(self, image: str) -> None:
        """Make what was added last, of ``image``, part of the index."""
        if not self._added:
            return
        count = self._count + self._added
        with writing(self._folder):
            records_bytes = self._records.tell()
            self._vectors.seek(0)
            self._vectors.write(_header(count, self._dim))
            for stream in (self._vectors, self._records):
                stream.flush()
                os.fsync(stream.fileno())
        facts = IndexFacts(**asdict(self._maker), dim=self._dim, count=count, records_bytes=records_bytes)
        with written_whole(self._folder / FACTS) as partial, writing(self._folder / FACTS):
            partial.write_text(dumps(facts.model_dump()) + "\n", encoding="utf-8")
        self._count, self._records_bytes = count, records_bytes
        self.images.add(image)
        self.rollback()


def _check_free(folder: Path) -> None:
    """UsageError rather than to overwrite what is not ours; an index that never was committed begins with zeros."""
    for name in (VECTORS, RECORDS):
        path = folder / name
        if path.is_file() and path.stat().st_size and not _uncommitted(folder):
            raise UsageError(f"{path} exists and belongs to no index", fix="index into another folder")


def _uncommitted(folder: Path) -> bool:
    path = folder / VECTORS
    if not path.is_file():
        return False
    with path.open("rb") as stream:
        return stream.read(HEADER_BYTES) == bytes(HEADER_BYTES)


def _header(count: int, dim: int) -> bytes:
    """A ``.npy`` header of HEADER_BYTES, whatever the count."""
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": DTYPE, "fortran_order": False, "shape": (count, dim)})
    text = stream.getvalue()
    assert len(text) == HEADER_BYTES
    return text


def _records(folder: Path, facts: IndexFacts) -> Iterator[dict[str, Any]]:
    with (folder / RECORDS).open("rb") as lines:
        for number, line in zip(range(1, facts.count + 1), lines, strict=False):
            try:
                record: dict[str, Any] = json.loads(line)
            except ValueError as exc:
                raise UsageError(
                    f"{folder / RECORDS}, line {number}, is broken ({exc})", fix="index the images again"
                ) from exc
            yield record


def search_index(folder: Path, facts: IndexFacts, query_D: NDArray[np.floating], top: int) -> list[Hit]:
    """The ``top`` records nearest to a unit vector by cosine, exactly, best first; of equals the earlier."""
    query_D = query_D.astype(np.float32)
    if len(query_D) != facts.dim:
        raise UsageError(f"{folder} holds vectors of {facts.dim}, not {len(query_D)}", fix="index the images again")
    scores, rows = np.zeros(0, np.float32), np.zeros(0, np.int64)
    if facts.count:
        vectors = np.memmap(folder / VECTORS, DTYPE, "r", HEADER_BYTES, (facts.count, facts.dim))
        step = max(CHUNK_BYTES // (4 * facts.dim), 1)
        for start in range(0, facts.count, step):
            part = vectors[start : start + step].astype(np.float32) @ query_D
            scores = np.concatenate([scores, part])
            rows = np.concatenate([rows, np.arange(start, start + len(part))])
            best = np.lexsort((rows, -scores))[:top]
            scores, rows = scores[best], rows[best]
    found = _chosen(folder, facts, rows)
    return [Hit(float(score), found[int(row)]) for score, row in zip(scores, rows, strict=True)]


def _chosen(folder: Path, facts: IndexFacts, rows: Sequence[int] | NDArray[np.int64]) -> dict[int, dict[str, Any]]:
    wanted = {int(row) for row in rows}
    return {i: record for i, record in enumerate(_records(folder, facts)) if i in wanted}
