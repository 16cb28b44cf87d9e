"""What the user named, as a list of images: files, folders, globs and .tar archives."""

from __future__ import annotations

import glob
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

SUFFIXES = frozenset({".tif", ".tiff", ".jp2", ".j2k", ".png", ".jpg", ".jpeg", ".webp", ".vrt"})


@dataclass(frozen=True)
class Source:
    """``name`` as the user knows it (the member's name inside a tar), ``path`` as GDAL opens it."""

    name: str
    path: str


def list_inputs(arguments: Sequence[str]) -> list[Source]:
    """Images in the order given; folders and globs sorted by name, archives in their own order.

    What yields no image (a missing file, an empty folder or glob, a broken archive) is listed as it is: opening it will
    say so, and the others go on.
    """
    return [source for argument in arguments for source in _expand(argument)]


def _expand(argument: str) -> Iterator[Source]:
    path = Path(argument)
    if path.is_dir():
        yield from _images(sorted(path.iterdir()), argument)
    elif path.suffix.lower() == ".tar" and path.is_file():
        yield from _members(path)
    elif glob.has_magic(argument) and not path.exists():
        yield from _images([Path(p) for p in sorted(glob.glob(argument, recursive=True))], argument)  # noqa: PTH207
    else:
        yield Source(argument, argument)


def _images(paths: Sequence[Path], argument: str) -> Iterator[Source]:
    images = [p for p in paths if p.suffix.lower() in SUFFIXES and p.is_file()]
    for path in images:
        yield Source(str(path), str(path))
    if not images:
        yield Source(argument, argument)


def _members(path: Path) -> Iterator[Source]:
    """Members by their place in the archive: GDAL's own tar reader does not know names beyond ASCII."""
    try:
        with tarfile.open(path, "r:") as tar:
            members = [m for m in tar if m.isfile() and Path(m.name).suffix.lower() in SUFFIXES]
    except (OSError, tarfile.TarError):
        members = []
    for member in members:
        yield Source(member.name, f"/vsisubfile/{member.offset_data}_{member.size},{path.resolve()}")
    if not members:
        yield Source(str(path), str(path))
