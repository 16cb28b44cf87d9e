"""A file that appears whole or not at all: it is written beside its place and renamed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from edge_rsvlm.errors import UsageError


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Yields a temporary path in the folder of ``path``; renamed to it on success, removed on any error."""
    partial = path.with_name(f"{path.name}.part")
    try:
        with writing(path):
            partial.touch()
        yield partial
        with writing(path):
            partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Failures to write as one UsageError that names the file."""
    try:
        yield
    except OSError as exc:
        raise UsageError(
            f"cannot write {path}: {exc.strerror or exc}", fix="choose a folder with room that may be written"
        ) from exc
