"""Files of a folder that are whole: nobody writes to them any more."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from edge_rsvlm.errors import InputError
from edge_rsvlm.raster.inputs import SUFFIXES

MARKER = ".done"
UNFINISHED = frozenset({".part", ".tmp"})
QUIET_S = 2.0


@dataclass(frozen=True)
class File:
    path: Path
    size: int
    mtime_ns: int


@dataclass
class Folder:
    """Looks at the images in ``path``, not in folders below it.

    With ``marker`` a file is whole when one of its name and ``.done`` lies beside it. Without, when its size and time
    are the same in two looks that are at least ``quiet_s`` apart by the monotonic clock. Names that begin with a dot,
    or have ``.part`` or ``.tmp`` in them, and empty files are never whole.
    """

    path: Path
    marker: bool = False
    quiet_s: float = QUIET_S
    clock: Callable[[], float] = time.monotonic
    strange: Callable[[str], None] = lambda name: None
    """Told once of each name that is not text."""
    unsettled: bool = False
    """Whether the last look saw files that another one may find whole."""
    _since: dict[File, float] = field(default_factory=dict)
    """When each file that is not known yet was first seen as it is."""
    _strange: set[str] = field(default_factory=set)

    def look(self, known: Callable[[File], bool]) -> list[File]:
        """Whole files that are not ``known``, the oldest first. InputError when the folder cannot be read."""
        now, since = self.clock(), dict[File, float]()
        whole, self.unsettled = [], False
        for file in self._files():
            if known(file):
                continue
            since[file] = self._since.get(file, now)
            quiet = file in self._since and now - since[file] >= self.quiet_s
            if self._marked(file) if self.marker else quiet:
                whole.append(file)
            elif not self.marker:
                self.unsettled = True
        self._since = since
        return sorted(whole, key=lambda file: (file.mtime_ns, file.path.name))

    def _files(self) -> Iterator[File]:
        try:
            with os.scandir(self.path) as entries:
                for entry in entries:
                    path = Path(entry.path)
                    if _finished(path.name) and self._is_text(path.name) and (file := stat(path)) and file.size:
                        yield file
        except OSError as exc:
            raise InputError(
                f"{self.path}: cannot be read ({exc.strerror})", fix="check that its disk is mounted; it is tried again"
            ) from exc

    def _marked(self, file: File) -> bool:
        return file.path.with_name(file.path.name + MARKER).exists()

    def _is_text(self, name: str) -> bool:
        """JSON and SQLite hold no other names."""
        try:
            name.encode()
        except UnicodeEncodeError:
            if name not in self._strange:
                self._strange.add(name)
                self.strange(ascii(name))
            return False
        return True


def _finished(name: str) -> bool:
    suffixes = [suffix.lower() for suffix in Path(name).suffixes]
    return (
        not name.startswith(".") and suffixes[-1:] != [] and suffixes[-1] in SUFFIXES and not UNFINISHED & set(suffixes)
    )


def stat(path: Path) -> File | None:
    """A file as it is now; None where there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return File(path, found.st_size, found.st_mtime_ns) if path.is_file() else None
