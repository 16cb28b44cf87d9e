"""What is known of a scene before any model looks at it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from datetime import datetime, timezone

from edge_rsvlm.alerts.entries import Corner, Seen
from edge_rsvlm.alerts.times import instant
from edge_rsvlm.errors import InputError
from edge_rsvlm.raster.acquired import acquired
from edge_rsvlm.raster.reader import open_raster
from edge_rsvlm.watch.folder import File
from edge_rsvlm.watch.places import alike, footprint

BLOCK_BYTES, BLOCKS = 1 << 20, 32


@dataclass(frozen=True)
class Facts:
    """``taken`` is ISO 8601 in UTC with microseconds. Either ``footprint`` or ``alike`` says where the scene lies."""

    taken: str
    footprint: tuple[Corner, ...] | None
    alike: str | None


def seen(file: File) -> Seen:
    """The file with the identity of its content; InputError when it cannot be read."""
    return Seen(str(file.path), file.size, file.mtime_ns, identity(file))


def identity(file: File) -> str:
    """SHA-256 of the size and the content: of all up to 32 MiB, of 32 blocks of 1 MiB at even distances beyond."""
    digest = hashlib.sha256(str(file.size).encode())
    try:
        with file.path.open("rb") as stream:
            for block in range(BLOCKS):
                if file.size > BLOCKS * BLOCK_BYTES:
                    stream.seek((file.size - BLOCK_BYTES) * block // (BLOCKS - 1))
                digest.update(stream.read(BLOCK_BYTES))
    except OSError as exc:
        raise InputError(f"{file.path}: cannot be read ({exc.strerror})", fix="check its rights and its disk") from exc
    return digest.hexdigest()


def facts(file: File) -> Facts:
    """When and where, from the raster; the file's own time where nothing says when. InputError: it is no raster."""
    path = str(file.path)
    with open_raster(path) as raster:
        corners = footprint(raster.georeference)
        when = acquired(raster)
        group = None if corners else alike(path, raster.georeference)
    return Facts(iso(instant(when)) if when else file_time(file.mtime_ns), corners, group)


def file_time(mtime_ns: int) -> str:
    return iso(datetime.fromtimestamp(mtime_ns / 1e9, timezone.utc))


def iso(moment: datetime) -> str:
    """Of one length, so that times sort as text."""
    return moment.astimezone(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
