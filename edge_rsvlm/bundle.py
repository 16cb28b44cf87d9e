"""Loading a bundle: the folder that carries a model from the ground to the device.

Trust: the packaged bundle is trusted because the package carries the hash of its manifest; any other folder only on an
explicit ``allow_unsigned``. The manifest carries the hash of every other file. No code from a bundle is ever executed.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from edge_rsvlm.config.manifest import MANIFEST_NAME, Manifest
from edge_rsvlm.config.model import parse
from edge_rsvlm.errors import BundleError

PACKAGED = "default"
REINSTALL = "reinstall the package, or copy the bundle again from where it was made"


@dataclass(frozen=True)
class Bundle:
    """A bundle whose files were all checked against its manifest."""

    folder: Path
    manifest: Manifest
    manifest_sha256: str

    def path(self, name: str) -> Path:
        """Absolute path of a file that the manifest lists; BundleError for any other name."""
        if name not in self.manifest.files:
            raise BundleError(f"bundle '{self.manifest.name}' lists no file '{name}'", fix=REINSTALL)
        return self.folder / name


def packaged_folder() -> Path:
    return Path(__file__).parent / "bundles" / PACKAGED


def load_bundle(folder: Path | None = None, *, allow_unsigned: bool = False) -> Bundle:
    """The bundle in ``folder``, or the packaged one; every file is hashed before anything is used.

    Raises BundleError when it is missing, altered, of another schema, or neither packaged nor explicitly allowed.
    """
    packaged = folder is None or folder.resolve() == packaged_folder().resolve()
    folder = packaged_folder() if folder is None else folder
    raw = _read(folder / MANIFEST_NAME)
    digest = hashlib.sha256(raw).hexdigest()
    if packaged and digest != (folder.parent / f"{PACKAGED}.sha256").read_text().strip():
        raise BundleError("the packaged bundle's manifest was altered", fix=REINSTALL)
    if not packaged and not allow_unsigned:
        raise BundleError(f"bundle {folder} carries no trusted signature", fix="pass --allow-unsigned if you trust it")
    manifest = parse(Manifest, _json(raw, folder), f"manifest of bundle {folder}", BundleError)
    for name, entry in manifest.files.items():
        _check_file(folder, name, entry.sha256)
    return Bundle(folder, manifest, digest)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as exc:
        raise BundleError(f"cannot read {path}: {exc.strerror}", fix="name a folder that holds a bundle") from exc


def _json(raw: bytes, folder: Path) -> object:
    try:
        return json.loads(raw)
    except ValueError as exc:
        raise BundleError(f"manifest of bundle {folder} is not JSON: {exc}", fix=REINSTALL) from exc


def _check_file(folder: Path, name: str, expected_sha256: str) -> None:
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise BundleError(f"bundle {folder} names '{name}', outside itself", fix="do not use this bundle")
    if hashlib.sha256(_read(path)).hexdigest() != expected_sha256:
        raise BundleError(f"'{name}' of bundle {folder} does not match its hash", fix=REINSTALL)
