"""GeoJSON as RFC 7946 has it, one feature at a time: longitude and latitude in WGS 84, no "crs" member."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from edge_rsvlm.sinks.files import writing, written_whole
from edge_rsvlm.sinks.records import dumps


class GeoJsonWriter:
    """A FeatureCollection at ``path``, whole or not at all.

    Every feature carries ``properties`` beside its own; where not ``located`` its coordinates are raster pixels, which
    ``"crs": null`` among its properties says. Raises UsageError when the file cannot be written.
    """

    def __init__(self, path: Path, *, properties: Mapping[str, Any], located: bool) -> None:
        self._path = path
        self._properties = {**properties, **({} if located else {"crs": None})}
        self._stack = ExitStack()
        self._file: TextIO
        self._separator = "\n"

    def __enter__(self) -> GeoJsonWriter:
        with ExitStack() as stack:
            partial = stack.enter_context(written_whole(self._path))
            with writing(self._path):
                self._file = stack.enter_context(partial.open("w", encoding="utf-8"))
                self._file.write('{"type": "FeatureCollection", "features": [')
            self._stack = stack.pop_all()
        return self

    def write(self, geometry: Mapping[str, Any] | None, properties: Mapping[str, Any]) -> None:
        feature = {"type": "Feature", "geometry": geometry, "properties": {**self._properties, **properties}}
        with writing(self._path):
            self._file.write(self._separator + dumps(feature))
        self._separator = ",\n"

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        if exc is not None:
            self._stack.__exit__(kind, exc, tb)  # as an error, which removes the file
            return
        with self._stack, writing(self._path):
            self._file.write("\n]}\n")
            self._file.close()
