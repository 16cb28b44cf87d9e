"""Where the user's own things are kept: keys, trust and what was accepted (config), and what can be remade (cache).

``EDGE_RSVLM_HOME`` names one folder for both, as a device with a single writable partition wants it. Without it they
are ``edge-rsvlm`` below XDG_CONFIG_HOME and XDG_CACHE_HOME (XDG Base Directory Specification 0.8).
"""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from edge_rsvlm.errors import UsageError

PROGRAM = "edge-rsvlm"
HOME_VARIABLE = "EDGE_RSVLM_HOME"


def config_folder() -> Path:
    """It may not exist yet. UsageError where neither a home nor the variables say where."""
    return _folder("XDG_CONFIG_HOME", ".config", "")


def cache_folder() -> Path:
    """As ``config_folder``; what it holds is made again when it is lost."""
    return _folder("XDG_CACHE_HOME", ".cache", "cache")


def _folder(xdg: str, below_home: str, below_ours: str) -> Path:
    ours, base = os.environ.get(HOME_VARIABLE), os.environ.get(xdg, "")
    if ours:
        return Path(ours).absolute() / below_ours
    if Path(base).is_absolute():  # the specification says to ignore a relative one
        return Path(base) / PROGRAM
    try:
        return Path.home().absolute() / below_home / PROGRAM
    except RuntimeError as exc:
        raise UsageError(
            "this user has no home folder", fix=f"set {HOME_VARIABLE} to a folder for keys and state"
        ) from exc


def make_private(folder: Path) -> Path:
    """``folder`` made, for this user alone; UsageError where it cannot be."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return folder


@contextmanager
def replacing(path: Path, mode: int = 0o644) -> Iterator[BinaryIO]:
    """A file to write that takes the place of ``path`` once it is on the disk, and leaves nothing on an error."""
    with writing(path):
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name[:40]}-", dir=path.parent)
    temporary = Path(name)
    try:
        with writing(path), os.fdopen(descriptor, "w+b") as file:
            os.fchmod(descriptor, mode)
            yield file
            file.flush()
            os.fsync(descriptor)
        with writing(path):
            temporary.replace(path)
            sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process at a time is inside; ``path`` is an empty file that stays."""
    with writing(path):
        lock = path.open("w")
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def sync_folder(folder: Path) -> None:
    """Make a rename in ``folder`` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Failures to write as one UsageError that names the place."""
    try:
        yield
    except OSError as exc:
        raise UsageError(
            f"cannot write {path}: {exc.strerror or exc}",
            fix=f"make room, or set {HOME_VARIABLE} to a folder that may be written",
        ) from exc
