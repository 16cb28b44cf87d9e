"""One ``--json`` result per input, written as it grows: only its current part is in memory."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from types import TracebackType
from typing import Any, TextIO

IN_MEMORY_BYTES = 1 << 20


class RecordSpool:
    """A JSON object with one long list, on a single line. Nothing reaches the stream unless ``finish`` is called."""

    def __init__(self, head: Mapping[str, Any], list_key: str) -> None:
        self._file = tempfile.SpooledTemporaryFile(IN_MEMORY_BYTES, mode="w+", encoding="utf-8")  # noqa: SIM115
        self._file.write(dumps(head)[:-1] + f", {json.dumps(list_key)}: [")
        self._separator = ""

    def __enter__(self) -> RecordSpool:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self._file.close()

    def add(self, record: Mapping[str, Any]) -> None:
        self._file.write(self._separator + dumps(record))
        self._separator = ", "

    def finish(self, tail: Mapping[str, Any], stream: TextIO) -> None:
        """Close the list, add ``tail`` and copy the whole line to ``stream``."""
        rest = dumps(tail)[1:]
        self._file.write("]" + (", " + rest if tail else rest) + "\n")
        self._file.seek(0)
        shutil.copyfileobj(self._file, stream)
        stream.flush()


def dumps(value: Mapping[str, Any]) -> str:
    """Strict JSON: NaN and infinity are refused, since no reader agrees on them."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False)
