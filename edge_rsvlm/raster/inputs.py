"""What the user named, as a list of images: files, folders, globs and .tar archives."""

from __future__ import annotations

import glob
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from edge_rsvlm.errors import InputError

SUFFIXES = frozenset({".tif", ".tiff", ".jp2", ".j2k", ".png", ".jpg", ".jpeg", ".webp", ".vrt"})


@dataclass(frozen=True)
class Source:
    """``name`` as the user knows it (the member's name inside a tar), ``path`` as GDAL opens it."""

    name: str
    path: str


def list_inputs(arguments: Sequence[str]) -> list[Source]:
    """Images in the order given; folders and globs sorted by name, archives in their own order.

    A file named outright is listed even when it does not exist: opening it will say so, and the others go on. Raises
    InputError for a folder, glob or archive that yields no image.
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
    if not images:
        raise InputError(f"{argument}: no image in it", fix=f"supported are {', '.join(sorted(SUFFIXES))}")
    for path in images:
        yield Source(str(path), str(path))


def _members(path: Path) -> Iterator[Source]:
    try:
        with tarfile.open(path) as tar:
            names = [m.name for m in tar if m.isfile() and Path(m.name).suffix.lower() in SUFFIXES]
    except (OSError, tarfile.TarError) as exc:
        raise InputError(
            f"{path}: cannot read the archive ({exc})", fix="make it again, or unpack what is left"
        ) from exc
    if not names:
        raise InputError(f"{path}: no image in the archive", fix=f"supported are {', '.join(sorted(SUFFIXES))}")
    for name in names:
        yield Source(name, f"/vsitar/{path.resolve()}/{name}")
