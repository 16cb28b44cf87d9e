"""What a bundle's folder holds against what its manifest says: every file, no other, and nothing that could do harm."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import unicodedata
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import BaseModel, TypeAdapter, ValidationError

from edge_rsvlm.bundle.external_data import NotOnnx, external_data
from edge_rsvlm.bundle.pickles import find_pickle
from edge_rsvlm.config.inputs import Tokenizer
from edge_rsvlm.config.manifest import (
    MANIFEST_NAME,
    SCHEMA_VERSION,
    Adapter,
    FileEntry,
    Graph,
    Manifest,
    ProbeCase,
    TensorRtGraph,
)
from edge_rsvlm.config.model import mistakes, printable
from edge_rsvlm.config.task_specs import GgufFile
from edge_rsvlm.errors import BundleError, EdgeRsvlmError

SIGNATURE_NAME = "manifest.sig"
OWN_NAMES = (MANIFEST_NAME, SIGNATURE_NAME)
"""Files of every bundle that its manifest does not list."""
MOST_MANIFEST_BYTES, MOST_SIGNATURE_BYTES = 16 << 20, 4096
MOST_MISTAKES = 20
GRAPH_SUFFIX = ".onnx"
BLOCK_BYTES = 1 << 20
COPY_AGAIN = "copy the bundle again from where it was made"
DO_NOT_USE = "do not use this bundle"
_GRAPH_FIELDS = ("graph", "encoder", "head", "project", "embed")
_FILE_FIELDS = ("answers", "vocabulary")
_WITH_FILE = (Adapter, Graph, GgufFile, TensorRtGraph, Tokenizer, ProbeCase)

Files = Mapping[str, FileEntry]


@dataclass(frozen=True)
class Problem:
    """One reason not to use a bundle. ``kind`` is a word for programs, ``file`` the file concerned."""

    kind: str
    message: str
    fix: str
    file: str = ""

    def __str__(self) -> str:
        return f"{self.message}; {self.fix}"

    @classmethod
    def of(cls, kind: str, error: EdgeRsvlmError) -> Problem:
        return cls(kind, str(error).removesuffix(f"; {error.fix}"), error.fix)

    def error(self, bundle: Path, fix: str = "") -> BundleError:
        return BundleError(f"bundle {bundle}: {self.message}", fix=fix or self.fix)


def read_own(folder: Path, name: str, most: int) -> bytes:
    """The manifest or its signature; BundleError where it is no readable regular file of bearable size."""
    path = folder / name
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            raise BundleError(f"{path} is not a regular file", fix=DO_NOT_USE)
        with path.open("rb") as file:
            raw = file.read(most + 1)
    except OSError as exc:
        raise BundleError(
            f"cannot read {path}: {exc.strerror}", fix="name a folder or a file that holds a bundle"
        ) from exc
    if len(raw) > most:
        raise BundleError(f"{path} is larger than {most} bytes", fix=DO_NOT_USE)
    return raw


def decode(raw: bytes) -> Any:
    """JSON as everyone reads it: whole UTF-8, no key twice, no NaN or infinity; BundleError for anything else."""
    try:
        data = json.loads(
            raw.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_number, parse_float=_finite
        )
        if b"\\u" in raw:
            json.dumps(data, ensure_ascii=False).encode("utf-8")  # escapes can write characters that are none
        return data
    except (ValueError, RecursionError) as exc:
        reason = "it is nested too deep" if isinstance(exc, RecursionError) else printable(exc)
        raise BundleError(f"the manifest is not JSON: {reason}", fix=COPY_AGAIN) from exc


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"it has the key '{printable(key)}' twice")
        found[key] = value
    return found


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is not a number")


def _finite(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"{printable(text)} is too large a number")
    return value


def manifest_problems(data: Any) -> Iterator[Problem]:
    """Why decoded JSON is no manifest of this schema."""
    schema = data.get("schema_version") if isinstance(data, dict) else None
    if isinstance(schema, int) and schema != SCHEMA_VERSION:
        older = schema < SCHEMA_VERSION
        fix = "export the bundle again" if older else "update edge-rsvlm"
        yield Problem("schema", f"its schema is {printable(schema)}, and this version reads {SCHEMA_VERSION}", fix)
        return
    for message, fix in mistakes(Manifest, data, MOST_MISTAKES):
        yield Problem("schema", f"the manifest is wrong: {message}", fix, MANIFEST_NAME)


def parse_manifest(raw: bytes) -> Manifest:
    """BundleError names the first thing that is wrong."""
    data = decode(raw)
    for problem in manifest_problems(data):
        raise BundleError(problem.message, fix=problem.fix)
    return Manifest.model_validate(data)


def listed_files(data: Any) -> Files | None:
    """The list of files of a manifest that may be wrong elsewhere; None where it has none that can be used."""
    try:
        return TypeAdapter(dict[str, FileEntry]).validate_python(data["files"] if isinstance(data, dict) else None)
    except (ValidationError, KeyError):
        return None


def reference_problems(manifest: Manifest) -> Iterator[Problem]:
    """Graphs, adapters and files that the manifest speaks of but does not list."""
    for graph in manifest.graphs.values():
        if not graph.file.endswith(GRAPH_SUFFIX):
            yield Problem("manifest", f"a graph is in '{printable(graph.file)}'", f"name it *{GRAPH_SUFFIX}")
    listed: dict[str, Collection[str]] = {
        "graph": manifest.graphs,
        "adapter": manifest.adapters,
        "file": manifest.files,
    }
    for kind, name in _references(manifest):
        if name not in listed[kind]:
            what = f"{'an' if kind == 'adapter' else 'a'} {kind} '{printable(name)}'"
            yield Problem("manifest", f"the manifest refers to {what} that it does not list", COPY_AGAIN)


def _references(value: Any) -> Iterator[tuple[str, str]]:
    """("graph", "adapter" or "file", name) of every reference below ``value``."""
    if isinstance(value, BaseModel):
        for field, below in value:
            is_file = (field == "file" and isinstance(value, _WITH_FILE)) or field in _FILE_FIELDS
            kind = "file" if is_file else "adapter" if field == "adapter" else "graph"
            if isinstance(below, str) and (kind != "graph" or field in _GRAPH_FIELDS):
                yield kind, below
            yield from _references(below)
    elif isinstance(value, Mapping):
        for below in value.values():
            yield from _references(below)
    elif isinstance(value, tuple):
        for below in value:
            yield from _references(below)


def name_problems(names: Collection[str]) -> Iterator[Problem]:
    """Names that would lead out of the folder, or that two systems would read differently."""
    seen: dict[str, str] = {folded(name): name for name in OWN_NAMES}
    folders = {folded(str(parent)) for name in names for parent in PurePosixPath(name).parents}
    for name in names:
        shown = printable(name)
        if not is_plain(name):
            yield Problem("name", f"it names '{shown}', which is no plain path inside it", DO_NOT_USE, shown)
        elif folded(name) in seen:
            other = printable(seen[folded(name)])
            yield Problem(
                "name", f"'{shown}' and '{other}' are one file where case does not count", "rename one", shown
            )
        elif folded(name) in folders:
            yield Problem("name", f"'{shown}' is both a file and a folder", DO_NOT_USE, shown)
        seen.setdefault(folded(name), name)


def is_plain(name: str) -> bool:
    """A relative path of printable characters: no ``..``, drive, backslash, NUL or broken character in it."""
    parts = name.split("/")
    return (
        name.isprintable()
        and not {"\\", ":"} & set(name)
        and all(part not in ("", ".", "..") and len(part.encode()) <= 255 for part in parts)
        and len(name.encode()) <= 1024
    )


def folded(name: str) -> str:
    """Equal for names that some file system takes for one."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def folder_problems(folder: Path, files: Files) -> Iterator[Problem]:
    """Everything wrong with the files, cheap checks first. Files are read in blocks: a bundle can exceed memory."""
    bad_names = list(name_problems(files))
    yield from bad_names
    if bad_names:
        return
    regular_bytes: dict[str, int] = {}
    irregular = set()
    for name, status in _entries(folder):
        shown = printable(name)
        if not stat.S_ISREG(status.st_mode):
            irregular.add(name)
            kind, what = ("symlink", "symbolic link") if stat.S_ISLNK(status.st_mode) else ("special", "special file")
            yield Problem(kind, f"'{shown}' is a {what}", DO_NOT_USE, shown)
            continue
        regular_bytes[name] = status.st_size
        if name not in files and name not in OWN_NAMES:
            yield Problem("unlisted", f"the manifest does not list '{shown}'", f"remove it, or {COPY_AGAIN}", shown)
    for name, entry in files.items():
        if name not in regular_bytes and name not in irregular:
            yield Problem("missing", f"'{name}' is missing", COPY_AGAIN, name)
        elif regular_bytes.get(name, entry.bytes) != entry.bytes:
            yield Problem("size", f"'{name}' has {regular_bytes[name]} bytes, not {entry.bytes}", COPY_AGAIN, name)
    for name in sorted(regular_bytes.keys() - set(OWN_NAMES)):
        yield from _file_problems(folder, name, files)


def _entries(folder: Path) -> Iterator[tuple[str, os.stat_result]]:
    """Everything below ``folder`` that is no folder, links not followed, by relative path in sorted order."""
    todo = [""]
    while todo:
        below = todo.pop()
        try:
            with os.scandir(folder / below) as listing:
                entries = sorted(listing, key=lambda entry: entry.name)
                for entry in entries:
                    name = f"{below}/{entry.name}".lstrip("/")
                    status = entry.stat(follow_symlinks=False)
                    if stat.S_ISDIR(status.st_mode):
                        todo.append(name)
                    else:
                        yield name, status
        except OSError as exc:
            raise BundleError(f"cannot read {folder / below}: {exc.strerror}", fix=COPY_AGAIN) from exc


def _file_problems(folder: Path, name: str, files: Files) -> Iterator[Problem]:
    path, shown = folder / name, printable(name)
    try:
        entry = files.get(name)
        if entry and path.stat().st_size == entry.bytes and sha256(path) != entry.sha256:
            yield Problem("hash", f"'{name}' does not match its hash", COPY_AGAIN, name)
        pickle = find_pickle(path, name)
        if pickle:
            yield Problem("pickle", f"'{shown}' must not be here: {pickle}", DO_NOT_USE, shown)
        if name.endswith(GRAPH_SUFFIX):
            yield from _graph_problems(path, name, files)
    except OSError as exc:
        yield Problem("unreadable", f"cannot read '{shown}': {exc.strerror}", COPY_AGAIN, shown)


def _graph_problems(path: Path, name: str, files: Files) -> Iterator[Problem]:
    """External data must be in listed files, within their ends; each wrong location is named once."""
    seen = set()
    try:
        for tensor in external_data(path):
            location = tensor.location.removeprefix("./")
            target = str(PurePosixPath(name).parent / location)
            if not is_plain(location) or target not in files:
                wrong = f"outside the files of the bundle: '{printable(location)}'"
            elif tensor.offset + (tensor.length or 0) > files[target].bytes:
                wrong = f"beyond the end of '{target}'"
            else:
                continue
            if wrong not in seen:
                seen.add(wrong)
                yield Problem("external_data", f"'{name}' keeps tensors {wrong}", DO_NOT_USE, name)
    except NotOnnx as exc:
        yield Problem("graph", f"'{printable(name)}' is not an ONNX file: {exc}", COPY_AGAIN, printable(name))


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()
