"""Tensors that an ONNX file keeps in other files, read from its protobuf bytes without the onnx package.

Only the fields on the way to a tensor are followed (onnx/onnx.proto3; wire format: protobuf.dev, "Encoding"), through
subgraphs, functions and sparse tensors, over a memory map: the weights inside are skipped, not read.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_BELOW = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
}
"""Message -> field number -> message."""
_EXTERNAL_DATA, _DATA_LOCATION, _EXTERNAL = 13, 14, 1
MOST_FIELDS = 10_000_000
"""Far above any real graph; a hostile one would keep us reading for hours."""
MOST_TEXT_BYTES = 4096

Span = tuple[int, int]


class NotOnnx(ValueError):
    """The bytes are not a protobuf message, or tensors are described in a way that is none."""


@dataclass(frozen=True)
class ExternalData:
    """Where a tensor's bytes are; ``length`` is None for up to the end of the file."""

    location: str
    offset: int
    length: int | None


def external_data(path: Path) -> Iterator[ExternalData]:
    """Every external tensor of the ONNX file, in no particular order; NotOnnx, or OSError as of reading."""
    with path.open("rb") as file:
        if path.stat().st_size == 0:
            raise NotOnnx("it is empty")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            yield from _Reader(data).tensors()


class _Reader:
    """One pass over a serialized ModelProto. A stack, not recursion: subgraphs nest as deep as the file likes."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data, self._left = data, MOST_FIELDS

    def tensors(self) -> Iterator[ExternalData]:
        todo: list[tuple[str, Span]] = [("model", (0, len(self._data)))]
        while todo:
            message, span = todo.pop()
            if message == "tensor":
                found = self._tensor(span)
                if found:
                    yield found
                continue
            below = _BELOW[message]
            for number, wire, value in self._fields(span):
                if wire == _BYTES and number in below:
                    todo.append((below[number], value))

    def _tensor(self, span: Span) -> ExternalData | None:
        entries: dict[str, str] = {}
        is_external = False
        for number, wire, value in self._fields(span):
            if number == _DATA_LOCATION and wire == _VARINT:
                is_external = value[0] & 0xFFFFFFFF == _EXTERNAL
            elif number == _EXTERNAL_DATA and wire == _BYTES:
                key, text = self._entry(value)
                if key in entries:
                    raise NotOnnx(f"a tensor has two of '{key}' for its external data")
                entries[key] = text
        if not entries and not is_external:
            return None
        if not entries.get("location"):
            raise NotOnnx("a tensor is external but does not say where")
        return ExternalData(entries["location"], _count(entries.get("offset", "0")), _length(entries))

    def _entry(self, span: Span) -> tuple[str, str]:
        parts = {1: "", 2: ""}
        for number, wire, (start, end) in self._fields(span):
            if wire == _BYTES and number in parts:
                if end - start > MOST_TEXT_BYTES:
                    raise NotOnnx("a tensor's external data is described at absurd length")
                try:
                    parts[number] = self._data[start:end].decode("utf-8")
                except UnicodeDecodeError as exc:
                    raise NotOnnx("a tensor's external data is not described in UTF-8") from exc
        return parts[1], parts[2]

    def _fields(self, span: Span) -> Iterator[tuple[int, int, Span]]:
        """(number, wire type, value): the span of bytes of a length-delimited field, (value, 0) of a varint."""
        at, end = span
        while at < end:
            self._left -= 1
            if self._left < 0:
                raise NotOnnx(f"it has more than {MOST_FIELDS} fields")
            tag, at = self._varint(at, end)
            number, wire = tag >> 3, tag & 7
            if wire == _BYTES:
                length, at = self._varint(at, end)
                value = (at, at + length)
                at += length
            elif wire == _VARINT:
                found, at = self._varint(at, end)
                value = (found, 0)
            elif wire in (_FIXED64, _FIXED32):
                value = (at, at + (8 if wire == _FIXED64 else 4))
                at = value[1]
            else:
                raise NotOnnx("it is not a protobuf message")
            if at > end or number == 0 or tag >> 32:  # protobuf's own parser would cut a longer tag, and read another
                raise NotOnnx("it is not a protobuf message")
            yield number, wire, value

    def _varint(self, at: int, end: int) -> tuple[int, int]:
        value = 0
        for shift in range(0, 70, 7):
            if at >= end:
                raise NotOnnx("it breaks off inside a field")
            byte = self._data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value & 0xFFFFFFFFFFFFFFFF, at
        raise NotOnnx("it is not a protobuf message")


def _length(entries: dict[str, str]) -> int | None:
    return _count(entries["length"]) if "length" in entries else None


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise NotOnnx(f"a tensor's external data has offset or length {text!r:.40}")
    return int(text)
