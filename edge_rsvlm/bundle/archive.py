"""A bundle as one file, ``NAME.ersvlm``: a zip archive of its folder.

``pack`` stores the files as they are (weights hardly shrink, and zip libraries compress differently), in fixed order
with fixed metadata, so that the same bundle gives the same bytes everywhere. The archive's comment is the SHA-256 of
all that precedes it: the manifest's hashes cover what is inside, and this covers the rest. Archives that other tools
made, stored or deflated and without a comment, are read too.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import stat
import tempfile
import zipfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from edge_rsvlm.bundle.contents import (
    BLOCK_BYTES,
    COPY_AGAIN,
    DO_NOT_USE,
    MOST_MANIFEST_BYTES,
    MOST_SIGNATURE_BYTES,
    OWN_NAMES,
    SIGNATURE_NAME,
    Files,
    Problem,
    folder_problems,
    is_plain,
    name_problems,
    parse_manifest,
    read_own,
)
from edge_rsvlm.bundle.home import make_private, replacing, sync_folder, writing
from edge_rsvlm.bundle.zips import ZIP_ERRORS, open_zip
from edge_rsvlm.config.manifest import MANIFEST_NAME
from edge_rsvlm.config.model import printable
from edge_rsvlm.errors import BundleError

SUFFIX = ".ersvlm"
_SEAL = b"sha256:"
_DIGEST_CHARS = 64
_EPOCH = (1980, 1, 1, 0, 0, 0)
_MODE = 0o100444 << 16
_ENCRYPTED = 1
MOST_GROWTH, SMALL_BYTES = 100, 64 << 20
"""Weights never shrink a hundredfold; below the second number nobody is hurt."""
_OWN_LIMITS = {MANIFEST_NAME: MOST_MANIFEST_BYTES, SIGNATURE_NAME: MOST_SIGNATURE_BYTES}


def pack(folder: Path, file: Path, signature: bytes | None = None) -> None:
    """Write the bundle in ``folder`` to ``file``, whole or not at all; ``signature`` takes the place of the folder's.

    BundleError where the folder is not what its manifest says.
    """
    raw = read_own(folder, MANIFEST_NAME, MOST_MANIFEST_BYTES)
    files = parse_manifest(raw).files
    for problem in folder_problems(folder, files):
        raise problem.error(folder)
    if signature is None and (folder / SIGNATURE_NAME).exists():
        signature = read_own(folder, SIGNATURE_NAME, MOST_SIGNATURE_BYTES)
    with replacing(file) as out:
        with zipfile.ZipFile(out, "w") as archive:
            archive.comment = _SEAL + b"0" * _DIGEST_CHARS
            archive.writestr(_member(MANIFEST_NAME, len(raw)), raw)
            if signature is not None:
                archive.writestr(_member(SIGNATURE_NAME, len(signature)), signature)
            for name in sorted(files):
                with (
                    (folder / name).open("rb") as source,
                    archive.open(_member(name, files[name].bytes), "w") as target,
                ):
                    shutil.copyfileobj(source, target, BLOCK_BYTES)
        seal, _ = _digests(out)
        out.seek(-_DIGEST_CHARS, os.SEEK_END)
        out.write(seal.encode())


def _member(name: str, size_bytes: int) -> zipfile.ZipInfo:
    member = zipfile.ZipInfo(name, date_time=_EPOCH)
    member.create_system, member.external_attr, member.file_size = 3, _MODE, size_bytes
    return member


def _digests(file: BinaryIO) -> tuple[str, str]:
    """SHA-256 of all but the seal's digits at the end, and of the whole file."""
    left = max(file.seek(0, os.SEEK_END) - _DIGEST_CHARS, 0)
    file.seek(0)
    digest = hashlib.sha256()
    while left and (block := file.read(min(left, BLOCK_BYTES))):
        digest.update(block)
        left -= len(block)
    seal = digest.hexdigest()
    digest.update(file.read(_DIGEST_CHARS))
    return seal, digest.hexdigest()


class Archive:
    """An open bundle file. ``sha256`` is that of the whole file."""

    def __init__(self, file: BinaryIO) -> None:
        self._seal, self.sha256 = _digests(file)
        self._zip = open_zip(file)
        self._bytes = file.seek(0, os.SEEK_END)
        self._members = {member.filename: member for member in self._zip.infolist()}

    def read_own(self, name: str) -> bytes | None:
        """The manifest or its signature, None where it is not there; BundleError where it cannot be read."""
        member, most = self._members.get(name), _OWN_LIMITS[name]
        if member is None:
            return None
        if member.file_size > most:
            raise BundleError(f"its {name} is larger than {most} bytes", fix=DO_NOT_USE)
        return b"".join(self._blocks(member, most))

    def seal_problems(self) -> Iterator[Problem]:
        """Whether a byte of the file changed since ``pack`` wrote it; what other tools wrote has no seal."""
        if self._zip.comment not in (b"", _SEAL + self._seal.encode()):
            yield Problem("seal", "the file was altered after it was packed", COPY_AGAIN)

    def problems(self, files: Files) -> Iterator[Problem]:
        """What is wrong with the members; they may be extracted only where nothing is."""
        # Other tools write an entry for each folder too.
        parents = {f"{parent}/" for name in files for parent in PurePosixPath(name).parents}
        members = [m for m in self._zip.infolist() if m.filename not in parents or m.file_size]
        counts = Counter(member.orig_filename for member in members)  # zipfile cuts other names at their first NUL
        yield from name_problems(list((counts - Counter(OWN_NAMES)).elements()))
        for member in members:
            yield from self._member_problems(member, files)
        for name in files.keys() - counts.keys():
            yield Problem("missing", f"'{printable(name)}' is missing", COPY_AGAIN, printable(name))
        total_bytes = sum(entry.bytes for entry in files.values())
        if total_bytes > max(SMALL_BYTES, MOST_GROWTH * self._bytes):
            yield Problem("bomb", f"{self._bytes} bytes would become {total_bytes}", DO_NOT_USE)

    def _member_problems(self, member: zipfile.ZipInfo, files: Files) -> Iterator[Problem]:
        name, shown = member.filename, printable(member.orig_filename)
        file_type = stat.S_IFMT(member.external_attr >> 16)
        if file_type not in (0, stat.S_IFREG):
            kind, what = ("symlink", "symbolic link") if file_type == stat.S_IFLNK else ("special", "special file")
            yield Problem(kind, f"'{shown}' is a {what}", DO_NOT_USE, shown)
        if member.flag_bits & _ENCRYPTED or member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            yield Problem("archive", f"'{shown}' is neither stored nor deflated", "pack the bundle again", shown)
        if name in files and member.file_size != files[name].bytes:
            yield Problem("size", f"'{shown}' has {member.file_size} bytes, not {files[name].bytes}", COPY_AGAIN, shown)
        if name not in files and name not in OWN_NAMES and is_plain(member.orig_filename):
            yield Problem("unlisted", f"the manifest does not list '{shown}'", f"{COPY_AGAIN}", shown)

    def extract(self, files: Files, folder: Path) -> None:
        """Write the listed files into the empty ``folder``; UsageError where there is no room.

        A member that breaks off is left short: the checks of the folder's content, which follow, name it.
        """
        total_bytes = sum(entry.bytes for entry in files.values())
        with writing(folder):
            if total_bytes > shutil.disk_usage(folder).free:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            for name in (*OWN_NAMES, *files):
                if name not in self._members:
                    continue
                target = folder / name
                target.parent.mkdir(parents=True, exist_ok=True)
                most = files[name].bytes if name in files else _OWN_LIMITS[name]
                with target.open("xb") as out:
                    for block in self._blocks(self._members[name], most):
                        out.write(block)
                    out.flush()
                    os.fsync(out.fileno())

    def _blocks(self, member: zipfile.ZipInfo, most: int) -> Iterator[bytes]:
        """The member's bytes, at most ``most``, up to where they cannot be read."""
        left = most
        try:
            with self._zip.open(member) as source:
                while left > 0 and (block := source.read(min(left, BLOCK_BYTES))):
                    left -= len(block)
                    yield block
        except ZIP_ERRORS:
            return


@contextmanager
def open_archive(path: Path) -> Iterator[Archive]:
    """BundleError where the file is no archive."""
    try:
        file = path.open("rb")
    except OSError as exc:
        raise BundleError(
            f"cannot read {path}: {exc.strerror}", fix="name a folder or a file that holds a bundle"
        ) from exc
    with file:
        try:
            archive = Archive(file)
        except ZIP_ERRORS as exc:
            raise BundleError(f"{path} is not a bundle file: {printable(exc)}", fix=COPY_AGAIN) from exc
        yield archive


@contextmanager
def temporary_folder(parent: Path, prefix: str) -> Iterator[Path]:
    """A folder that is gone afterwards, unless it was moved."""
    with writing(make_private(parent)):
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def publish(folder: Path, target: Path) -> None:
    """Make ``folder`` read-only and give it its name, beside it."""
    with writing(target):
        for place, _, names in os.walk(folder, topdown=False):
            for name in names:
                (Path(place) / name).chmod(0o444)
            sync_folder(Path(place))
            Path(place).chmod(0o555)
        folder.rename(target)
        sync_folder(target.parent)
