"""Loading a bundle: the folder, or the one file, that carries a model from the ground to the device.

Trust: the packaged bundle is trusted because the package carries the hash of its manifest. Any other needs
``manifest.sig`` by a key that the user trusts, or an explicit ``allow_unsigned``. The manifest carries the hash of
every other file. No code from a bundle is ever executed.

``allow_unsigned`` stands in for a signature that is missing or by a stranger: the user vouches for what nobody they
know did. It never excuses a signature that does not belong to its manifest. That is not an unsigned bundle but one that
was altered, which is what signatures are there to show; whoever altered it on purpose removes ``manifest.sig``.

Rollback: see ``acceptance``. Files are checked each time, since folders are where disks and people change things.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from edge_rsvlm.bundle.acceptance import newest_accepted, remember
from edge_rsvlm.bundle.archive import Archive, open_archive, pack, publish, temporary_folder
from edge_rsvlm.bundle.contents import (
    MOST_MANIFEST_BYTES,
    MOST_SIGNATURE_BYTES,
    SIGNATURE_NAME,
    Problem,
    decode,
    folder_problems,
    listed_files,
    manifest_problems,
    read_own,
    reference_problems,
)
from edge_rsvlm.bundle.home import cache_folder, locked, make_private
from edge_rsvlm.config.manifest import MANIFEST_NAME, Manifest
from edge_rsvlm.config.model import printable
from edge_rsvlm.errors import BundleError

__all__ = ["Bundle", "Candidate", "Rules", "candidate", "load_bundle", "pack", "packaged_folder"]

PACKAGED = "default"
UNPACKING = ".unpacking-"
REINSTALL = "reinstall the package, or copy the bundle again from where it was made"


@dataclass(frozen=True)
class Bundle:
    """A bundle whose files were all checked against its manifest.

    ``trusted_by`` says who vouches for it: ``the package``, the name of a trusted key, or None where the user does.
    """

    folder: Path
    manifest: Manifest
    manifest_sha256: str
    trusted_by: str | None = None

    def path(self, name: str) -> Path:
        """Absolute path of a file that the manifest lists; BundleError for any other name."""
        if name not in self.manifest.files:
            raise BundleError(f"bundle '{self.manifest.name}' lists no file '{name}'", fix=REINSTALL)
        return self.folder / name


@dataclass(frozen=True)
class Rules:
    """What the user allows on purpose."""

    allow_unsigned: bool = False
    allow_older: bool = False


@dataclass
class Candidate:
    """What lies at a path and may become a bundle. ``folder`` is empty until an ``archive`` is unpacked into it."""

    folder: Path
    raw: bytes
    signature: bytes | None
    rules: Rules
    archive: Archive | None = None
    packaged: bool = False
    trusted_by: str | None = field(default=None, init=False)
    manifest: Manifest | None = field(default=None, init=False)

    def problems(self) -> Iterator[Problem]:
        """Every reason not to use it, in an order in which nothing is read that an earlier one speaks against.

        A caller that stops at the first therefore never unpacks, or even parses, what nobody it trusts has signed.
        """
        if self.archive:
            yield from self.archive.seal_problems()
        yield from self._trust()
        try:
            data = decode(self.raw)
        except BundleError as exc:
            yield Problem.of("manifest", exc)
            return
        yield from self._parsed(data)
        files = listed_files(data)
        if files is None:
            return
        if self.archive:
            wrong = list(self.archive.problems(files))
            yield from wrong
            if wrong:
                return
            self.archive.extract(files, self.folder)
        yield from folder_problems(self.folder, files)

    def bundle(self) -> Bundle:
        """To be called once ``problems`` has come to its end without one."""
        assert self.manifest is not None
        return Bundle(self.folder, self.manifest, hashlib.sha256(self.raw).hexdigest(), self.trusted_by)

    def _trust(self) -> Iterator[Problem]:
        if self.packaged:
            if hashlib.sha256(self.raw).hexdigest() != _packaged_hash():
                yield Problem("signature", "the packaged bundle's manifest was altered", REINSTALL)
            self.trusted_by = "the package"
            return
        signer = None
        if self.signature is not None:
            # Imported here: the packaged bundle starts without the cryptography library.
            from edge_rsvlm.bundle import signatures

            try:
                signer = signatures.signer(self.raw, self.signature)
            except BundleError as exc:
                yield Problem.of("signature", exc)
                return
            names = {key.id: key.name for key in signatures.trusted_keys()}
            self.trusted_by = names.get(signer)
        if self.trusted_by is None and not self.rules.allow_unsigned:
            what = f"it is signed by {signer[:16]}..., whom nobody here trusts" if signer else "it carries no signature"
            fix = "trust its key with `edge-rsvlm keys trust`" if signer else "sign it with `edge-rsvlm keys sign`"
            yield Problem("signature", what, f"{fix}, or pass --allow-unsigned")

    def _parsed(self, data: object) -> Iterator[Problem]:
        wrong = list(manifest_problems(data))
        yield from wrong
        if wrong:
            return
        self.manifest = Manifest.model_validate(data)
        yield from reference_problems(self.manifest)
        if not self.packaged and not self.rules.allow_older:
            yield from _rollback(self.manifest, signed=self.trusted_by is not None)


def packaged_folder() -> Path:
    return Path(__file__).parents[1] / "bundles" / PACKAGED


def load_bundle(path: Path | None = None, *, allow_unsigned: bool = False, allow_older: bool = False) -> Bundle:
    """The bundle in a folder or ``.ersvlm`` file, or the packaged one; every file is hashed before anything is used.

    Raises BundleError when it is missing, altered, untrusted, of another schema, older than what was accepted before,
    or holds what no bundle may. An accepted version is remembered, unless it is the packaged one.
    """
    rules = Rules(allow_unsigned, allow_older)
    if path is not None and path.is_file():
        bundle = _unpacked(path, rules)
    else:
        found = _in_folder(path, rules)
        bundle = _checked(found, found.folder)
        if found.packaged:
            return bundle
    manifest, signed = bundle.manifest, bundle.trusted_by is not None
    remember(manifest.name, manifest.version, signed=signed, allow_older=allow_older)
    return bundle


@contextmanager
def candidate(path: Path | None, rules: Rules) -> Iterator[Candidate]:
    """The candidate at a path; one that is a file is unpacked, if at all, into a folder that is gone afterwards."""
    if path is None or not path.is_file():
        yield _in_folder(path, rules)
        return
    with open_archive(path) as archive, temporary_folder(cache_folder(), ".verify-") as folder:
        yield _in_archive(path, archive, folder, rules)


def _in_folder(path: Path | None, rules: Rules) -> Candidate:
    packaged = path is None or path.resolve() == packaged_folder().resolve()
    folder = packaged_folder() if path is None else path
    raw = read_own(folder, MANIFEST_NAME, MOST_MANIFEST_BYTES)
    signature = None
    if (folder / SIGNATURE_NAME).exists():
        signature = read_own(folder, SIGNATURE_NAME, MOST_SIGNATURE_BYTES)
    return Candidate(folder, raw, signature, rules, packaged=packaged)


def _in_archive(path: Path, archive: Archive, folder: Path, rules: Rules) -> Candidate:
    raw = archive.read_own(MANIFEST_NAME)
    if raw is None:
        raise BundleError(f"{path} holds no {MANIFEST_NAME} at its top", fix="name a file that holds a bundle")
    return Candidate(folder, raw, archive.read_own(SIGNATURE_NAME), rules, archive)


def _unpacked(path: Path, rules: Rules) -> Bundle:
    """The bundle of a file, from the read-only folder that is named by the file's hash and made once."""
    with open_archive(path) as archive:
        target = cache_folder() / "bundles" / archive.sha256
        if not target.is_dir():
            with locked(make_private(target.parent) / ".lock"):
                for left_by_a_crash in target.parent.glob(f"{UNPACKING}*"):
                    shutil.rmtree(left_by_a_crash, ignore_errors=True)
                if not target.is_dir():
                    return _unpack(path, archive, target, rules)
    return _checked(_in_folder(target, rules), target, altered=f"remove {target}, and it is unpacked again")


def _unpack(path: Path, archive: Archive, target: Path, rules: Rules) -> Bundle:
    """The bundle in ``target``, which appears whole, and only where nothing is wrong with it."""
    with temporary_folder(target.parent, UNPACKING) as folder:
        bundle = _checked(_in_archive(path, archive, folder, rules), path)
        publish(folder, target)
    return replace(bundle, folder=target)


def _checked(found: Candidate, path: Path, altered: str = "") -> Bundle:
    """The candidate as a bundle; BundleError with its first problem. ``altered`` is the fix for changed files."""
    for problem in found.problems():
        raise problem.error(path, fix=altered if problem.file else "")
    return found.bundle()


def _rollback(manifest: Manifest, *, signed: bool) -> Iterator[Problem]:
    try:
        newest = max(newest_accepted(manifest.name, signed=signed), _packaged_version(manifest.name))
    except BundleError as exc:
        yield Problem.of("rollback", exc)
        return
    if manifest.version < newest:
        text = f"version {manifest.version} of '{printable(manifest.name)}' is older than {newest}, accepted before"
        yield Problem("rollback", text, "use the newer one, or pass --allow-older")


def _packaged_hash() -> str:
    path = packaged_folder().with_suffix(".sha256")
    try:
        return path.read_text().strip()
    except OSError as exc:
        raise BundleError(f"cannot read {path}: {exc.strerror}", fix=REINSTALL) from exc


def _packaged_version(name: str) -> int:
    """Version of the packaged bundle where it has this name, else 0; one that is damaged says nothing."""
    with suppress(BundleError):
        raw = read_own(packaged_folder(), MANIFEST_NAME, MOST_MANIFEST_BYTES)
        data = decode(raw)
        if hashlib.sha256(raw).hexdigest() == _packaged_hash() and data["name"] == name:
            return int(data["version"])
    return 0
