"""Images of a training set: files of a folder, or members of a ``.tar``, whose paths then go through the archive."""

from __future__ import annotations

import io
import tarfile
from functools import cache
from pathlib import Path
from typing import BinaryIO

from edge_rsvlm.errors import InputError


def is_image(path: Path) -> bool:
    """Whether there is such a file or member; InputError for an archive that cannot be read."""
    tar = _archive(path)
    return path.is_file() if tar is None else path.relative_to(tar).as_posix() in _members(tar)


def open_file(path: Path) -> BinaryIO:
    """The file or member, to be closed by the caller; OSError where it is not there."""
    tar = _archive(path)
    if tar is None:
        return path.open("rb")
    start, size = _members(tar)[path.relative_to(tar).as_posix()]
    with tar.open("rb") as file:
        file.seek(start)
        return io.BytesIO(file.read(size))


def _archive(path: Path) -> Path | None:
    return next((parent for parent in path.parents if parent.is_file()), None)


@cache
def _members(tar: Path) -> dict[str, tuple[int, int]]:
    """Where each member lies, and its size."""
    try:
        with tarfile.open(tar, "r:") as file:
            return {member.name: (member.offset_data, member.size) for member in file if member.isfile()}
    except (OSError, tarfile.TarError) as exc:
        raise InputError(f"cannot read {tar}: {exc}", fix="name a .tar that is not compressed, or a folder") from exc
