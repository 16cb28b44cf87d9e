"""Zip archives from strangers: opened with the standard library once their directory is known to be small enough."""

from __future__ import annotations

import struct
import zipfile
import zlib
from typing import BinaryIO

MOST_DIRECTORY_BYTES = 4 << 20
ZIP_ERRORS = (
    zipfile.BadZipFile, zlib.error, struct.error, ValueError, IndexError, OverflowError, EOFError, NotImplementedError,
    RuntimeError, OSError,
)  # fmt: skip
"""What ``zipfile`` raises at damaged archives."""
_END, _END64, _LOCATOR64 = struct.Struct("<4s4H2LH"), struct.Struct("<4sQ2H2L4Q"), struct.Struct("<4sLQL")
_MOST_COMMENT = (1 << 16) - 1


def is_zip(file: BinaryIO) -> bool:
    """Whether it begins or ends as a zip archive does."""
    file.seek(0)
    return file.read(4) in (b"PK\x03\x04", b"PK\x05\x06") or _end(file) is not None


def open_zip(file: BinaryIO) -> zipfile.ZipFile:
    """ValueError, or another of ZIP_ERRORS, for what is no whole archive, up to the last byte of the file."""
    end = _end(file)
    if end is None:
        raise ValueError("it does not end as a zip archive does")
    position, directory_bytes = end
    if max(directory_bytes, _directory_bytes_64(file, position)) > MOST_DIRECTORY_BYTES:
        raise ValueError("its directory is too large")
    return zipfile.ZipFile(file)


def _end(file: BinaryIO) -> tuple[int, int] | None:
    """Where the end record is, and how large it says the directory is."""
    size = file.seek(0, 2)
    start = max(size - _END.size - _MOST_COMMENT, 0)
    file.seek(start)
    tail = file.read(size - start)
    at = tail.rfind(b"PK\x05\x06")
    if at < 0 or len(tail) - at < _END.size:
        return None
    fields = _END.unpack_from(tail, at)
    if at + _END.size + fields[7] != len(tail):
        return None
    # This value says that the true size is in the 64-bit record.
    return start + at, 0 if fields[5] == 0xFFFFFFFF else fields[5]


def _directory_bytes_64(file: BinaryIO, end: int) -> int:
    """Size of the directory by the 64-bit end record that may lie before ``end``; 0 where there is none."""
    at = end - _LOCATOR64.size - _END64.size
    if at < 0:
        return 0
    file.seek(at)
    record, locator = file.read(_END64.size), file.read(4)
    if locator != b"PK\x06\x07":
        return 0
    fields = _END64.unpack(record)
    if fields[0] != b"PK\x06\x06":
        raise ValueError("its directory is not where it should be")
    size: int = fields[8]
    return size
