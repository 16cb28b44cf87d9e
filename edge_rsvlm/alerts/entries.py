"""What the journal holds, as values: a file that was seen, a scene that was taken in, all that it led to, an alert."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from edge_rsvlm.types import Alert

State = Literal["done", "failed", "dropped"]
Corner = tuple[float, float]
SCENE = "seq, path, size, mtime_ns, identity, place, taken, footprint, alike"


@dataclass(frozen=True)
class Seen:
    """A file as it is on the disk. ``identity`` is of its content."""

    path: str
    size: int
    mtime_ns: int
    identity: str


@dataclass(frozen=True)
class Scene:
    """A file that was taken in. ``seq`` is its order of arrival; ``taken`` is ISO 8601 UTC with microseconds.

    ``footprint`` is four corners (longitude, latitude), None where it has no place on Earth: then ``alike`` says what
    scenes of its place have in common.
    """

    seq: int
    seen: Seen
    place: int
    taken: str
    footprint: tuple[Corner, ...] | None
    alike: str | None

    @property
    def path(self) -> str:
        return self.seen.path


@dataclass(frozen=True)
class Result:
    """All that one scene leads to.

    ``tracks`` are the rows of its place, None: as they were. ``compared`` is the earlier date of a comparison,
    ``keeps`` that the next scene is to be compared with the same; ``blames`` is the earlier date of one that failed.
    """

    state: State
    line: dict[str, Any]
    alerts: Sequence[Alert] = ()
    tracks: Sequence[dict[str, Any]] | None = None
    compared: int | None = None
    keeps: bool = False
    blames: int | None = None
    thumbnail: bytes = b""


def alert_of(text: str) -> Alert:
    """An alert as the journal keeps it."""
    fields = json.loads(text)
    return Alert(**{**fields, "crops": tuple(fields["crops"])})


def dumps(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, default=_plain)


def _plain(value: Any) -> Any:
    """Scalars of NumPy are numbers to JSON."""
    item: Callable[[], Any] | None = getattr(value, "item", None)
    if item is None:
        raise TypeError(f"{type(value).__name__} is no JSON")
    return item()


def scene_of(row: tuple[Any, ...]) -> Scene:
    """From a row of the columns SCENE."""
    seq, path, size, mtime_ns, identity, place, taken, footprint, alike = row
    corners = tuple((lon, lat) for lon, lat in json.loads(footprint)) if footprint else None
    return Scene(seq, Seen(path, size, mtime_ns, identity), place, taken, corners, alike)
