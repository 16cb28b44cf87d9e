"""Pickles, found without ever loading one: to unpickle is to run code that the file brings along.

The runtime reads no pickle. They are refused all the same, since a bundle is opened by other tools too.
"""

from __future__ import annotations

import ast
import io
import pickletools
import zipfile
from pathlib import Path, PurePosixPath
from typing import IO, BinaryIO

from numpy.lib.format import descr_to_dtype

from edge_rsvlm.bundle.zips import ZIP_ERRORS, is_zip, open_zip

SUFFIXES = {".pkl", ".pickle", ".pt", ".pth", ".ckpt", ".joblib", ".dill", ".pkl2"}
HEAD_BYTES = 1 << 16
_OPCODES = {op.code.encode("latin-1") for op in pickletools.opcodes}
_GLOBALS = {"GLOBAL", "INST", "STACK_GLOBAL"}
_NPY = b"\x93NUMPY"


def find_pickle(path: Path, name: str) -> str | None:
    """Why the file (``name`` in its bundle) is or holds a pickle; None where it does not. OSError as of reading."""
    if _named(name):
        return "its name is that of a pickle"
    with path.open("rb") as file:
        if is_zip(file):
            return _in_zip(file)
        file.seek(0)
        return _in_head(file.read(HEAD_BYTES), ended=file.read(1) == b"")


def _named(name: str) -> bool:
    return bool(SUFFIXES & {suffix.lower() for suffix in PurePosixPath(name).suffixes})


def _in_zip(file: BinaryIO) -> str | None:
    try:
        with open_zip(file) as archive:
            for member in archive.infolist():
                found = "its name is that of a pickle" if _named(member.filename) else _in_member(archive, member)
                if found:
                    return f"in its member {member.filename!r:.80}: {found}"
    except ZIP_ERRORS as exc:
        return f"it is a zip archive that cannot be searched: {exc!s:.80}"
    return None


def _in_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> str | None:
    with archive.open(member) as stream:
        head = _read_up_to(stream, HEAD_BYTES)
        return _in_head(head, ended=stream.read(1) == b"")


def _read_up_to(stream: IO[bytes], count: int) -> bytes:
    parts = bytearray()
    while len(parts) < count and (part := stream.read(count - len(parts))):
        parts += part
    return bytes(parts)


def _in_head(head: bytes, *, ended: bool) -> str | None:
    """``ended``: the head is the whole content."""
    if head.startswith(_NPY):
        return _in_npy(head)
    if head[:1] == b"\x80" and head[1:2] in (b"\2", b"\3", b"\4", b"\5") and head[2:3] in _OPCODES:
        return "it is a pickle"
    return "it is a pickle of an old protocol" if _is_old_pickle(head, ended=ended) else None


def _in_npy(head: bytes) -> str | None:
    """Arrays of Python objects are stored as pickles (NumPy's NPY format, versions 1 to 3)."""
    length_bytes = 2 if head[6:7] == b"\1" else 4
    start = 8 + length_bytes
    text = head[start : start + int.from_bytes(head[8:start], "little")]
    try:
        if descr_to_dtype(ast.literal_eval(text.decode("utf-8"))["descr"]).hasobject:
            return "it is an array of Python objects, which are pickled"
    except (ValueError, SyntaxError, TypeError, KeyError, IndexError, MemoryError, RecursionError) as exc:
        return f"it is an array whose header cannot be read: {exc!s:.80}"
    return None


def _is_old_pickle(head: bytes, *, ended: bool) -> bool:
    """Protocols 0 and 1 have no magic number: what counts is that the bytes decode as operations up to a STOP.

    One that ends there is a pickle; before more bytes, only one that names something to call is told from chance.
    """
    stream, names = io.BytesIO(head), False
    try:
        for operation, _, position in pickletools.genops(stream):
            names = names or operation.name in _GLOBALS
            if operation.name == "STOP":
                return position is not None and position > 0 and (names or (ended and stream.tell() == len(head)))
    except (ValueError, UnicodeDecodeError, OverflowError, AttributeError, IndexError):
        return False  # not an operation: data
    return False
