"""Alerts as newline-delimited GeoJSON: one feature a line (as RFC 8142 sequences, without its record separators)."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import BinaryIO

from edge_rsvlm.errors import DeliveryError
from edge_rsvlm.sinks.features import alert_feature
from edge_rsvlm.sinks.records import dumps
from edge_rsvlm.types import Alert

TAIL_BYTES = 1 << 16


class GeoJsonLines:
    """Appends to the file at ``path`` and syncs it.

    A line that a power cut left torn is cut off; a repeat of the last line is not written again. Other repeats have the
    same ``id``.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def send(self, alert: Alert) -> None:
        line = dumps(alert_feature(alert)).encode() + b"\n"
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a+b") as stream:
                last = _mend(stream)
                if last is not None and _id(last) == alert.id:
                    return
                stream.write(line)
                stream.flush()
                os.fsync(stream.fileno())
        except OSError as exc:
            full = exc.errno in (errno.ENOSPC, errno.EDQUOT)
            raise DeliveryError(
                f"cannot write {self._path}: {exc.strerror or exc}",
                fix="make room on that disk" if full else "make it a file that may be written",
                retry=True,
            ) from exc


def _mend(stream: BinaryIO) -> bytes | None:
    """Cut off what follows the last end of a line; the last line, if it is in the file's last 64 KiB whole."""
    size = stream.seek(0, os.SEEK_END)
    at = size
    tail = b""
    while at > 0 and b"\n" not in tail:  # a torn line may be longer than one look
        at = max(at - TAIL_BYTES, 0)
        stream.seek(at)
        tail = stream.read(size - at)
    end = tail.rfind(b"\n") + 1
    if at + end < size:
        stream.truncate(at + end)
    stream.seek(0, os.SEEK_END)
    lines = tail[:end].splitlines()
    return lines[-1] if len(lines) > 1 or (lines and at == 0) else None


def _id(line: bytes) -> str | None:
    try:
        feature = json.loads(line)
    except ValueError:
        return None
    return feature.get("id") if isinstance(feature, dict) else None
