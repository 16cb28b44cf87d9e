"""Who made a bundle: Ed25519 signatures (RFC 8032) over the exact bytes of its manifest, and the keys this user trusts.

Below the config folder, private keys are ``keys/NAME.pem`` (PKCS 8, readable by their owner alone), their public halves
``keys/NAME.pub.pem``, and trusted public keys ``trusted/NAME.pub.pem`` (SubjectPublicKeyInfo): plain PEM, which openssl
reads too. A key's id is its 32 public bytes in hexadecimal.

``manifest.sig`` names the key by that id, so that a signature which does not belong to its manifest is told from one
by a stranger, even on a machine that trusts nobody.
"""

from __future__ import annotations

import json
import re
import stat
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)

from edge_rsvlm.bundle.home import config_folder, make_private, replacing
from edge_rsvlm.errors import BundleError, UsageError

ALGORITHM = "ed25519"
PRIVATE_SUFFIX, PUBLIC_SUFFIX = ".pem", ".pub.pem"
MOST_PEM_BYTES = 1 << 16
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_SIGNATURE = re.compile(
    rb'\{"algorithm": "ed25519", "key_id": "([0-9a-f]{64})", "signature": "([0-9a-f]{128})"\}\n', re.ASCII
)


@dataclass(frozen=True)
class Key:
    """A public key as a file holds it; ``name`` is the file's."""

    name: str
    id: str
    path: Path


def new_key(name: str) -> Key:
    """A new pair of keys; returns the public one. UsageError for a name that is taken or none."""
    private_path = _own_folder() / f"{_checked_name(name)}{PRIVATE_SUFFIX}"
    if private_path.exists():
        raise UsageError(f"there is a key '{name}' already: {private_path}", fix="choose another name")
    make_private(private_path.parent)
    private = Ed25519PrivateKey.generate()
    with replacing(private_path, mode=0o600) as file:
        file.write(private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return _write_public(private.public_key(), private_path.with_name(f"{name}{PUBLIC_SUFFIX}"))


def sign(manifest: bytes, key: str) -> bytes:
    """What ``manifest.sig`` holds for these bytes. ``key`` is the name of one of our private keys, or a PEM file."""
    private = _read_private(_own_or_file(key, PRIVATE_SUFFIX))
    signed = {"algorithm": ALGORITHM, "key_id": _id(private.public_key()), "signature": private.sign(manifest).hex()}
    return f"{json.dumps(signed)}\n".encode()


def signer(manifest: bytes, signature: bytes) -> str:
    """Id of the key that made ``signature`` over these bytes; BundleError where none did.

    Only the exact bytes that ``sign`` writes are read, so that no byte of the file can change unnoticed.
    """
    match = _SIGNATURE.fullmatch(signature)
    if match is None:
        raise BundleError("manifest.sig is not a signature", fix="get the bundle again from who signed it")
    key_id = match[1].decode()
    try:
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(key_id)).verify(bytes.fromhex(match[2].decode()), manifest)
    except (InvalidSignature, ValueError) as exc:
        raise BundleError(
            "the signature does not belong to this manifest: one of them was altered",
            fix="get the bundle again from who signed it",
        ) from exc
    return key_id


def trust(public: str) -> Key:
    """Trust the key in this PEM file, or one of ours by name, from now on.

    UsageError where the file holds none, or where its name is that of another trusted key.
    """
    path = _own_or_file(public, PUBLIC_SUFFIX)
    key = _read_public(path)
    name = _checked_name(path.name.removesuffix(PRIVATE_SUFFIX).removesuffix(".pub"))
    for known in trusted_keys():
        if known.id == key.id:
            return known
        if known.name == name:
            raise UsageError(f"another trusted key is called '{name}'", fix="rename the file, or untrust that one")
    folder = make_private(_trusted_folder())
    return _write_public(Ed25519PublicKey.from_public_bytes(bytes.fromhex(key.id)), folder / f"{name}{PUBLIC_SUFFIX}")


def untrust(name_or_id: str) -> Key:
    """Stop trusting a key; UsageError where none of this name or id is trusted."""
    for key in trusted_keys():
        if name_or_id in (key.name, key.id):
            key.path.unlink()
            return key
    known = ", ".join(key.name for key in trusted_keys()) or "none"
    raise UsageError(f"no trusted key is '{name_or_id}'", fix=f"trusted are: {known}")


def trusted_keys() -> list[Key]:
    """By name. UsageError where a file among them is damaged, rather than trusting fewer than the user thinks."""
    return [_read_public(path) for path in sorted(_trusted_folder().glob(f"*{PUBLIC_SUFFIX}"))]


def own_keys() -> list[Key]:
    """Public halves of the keys made here."""
    return [_read_public(path) for path in sorted(_own_folder().glob(f"*{PUBLIC_SUFFIX}"))]


def _own_folder() -> Path:
    return config_folder() / "keys"


def _own_or_file(name_or_path: str, suffix: str) -> Path:
    """The file itself where there is one, else that of our key of this name."""
    named = _own_folder() / f"{name_or_path}{suffix}"
    path = Path(name_or_path)
    return named if _NAME.fullmatch(name_or_path) and not path.is_file() else path


def _trusted_folder() -> Path:
    return config_folder() / "trusted"


def _checked_name(name: str) -> str:
    if not _NAME.fullmatch(name) or name.endswith((".pem", ".pub")):
        raise UsageError(f"'{name}' cannot name a key", fix="use up to 64 letters, digits, '.', '_' or '-'")
    return name


def _id(public: Ed25519PublicKey) -> str:
    return public.public_bytes(Encoding.Raw, PublicFormat.Raw).hex()


def _write_public(public: Ed25519PublicKey, path: Path) -> Key:
    with replacing(path) as file:
        file.write(public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return Key(path.name.removesuffix(PUBLIC_SUFFIX), _id(public), path)


def _read_private(path: Path) -> Ed25519PrivateKey:
    pem = _read_pem(path, "list yours with `edge-rsvlm keys list`, or make one with `edge-rsvlm keys new NAME`")
    if stat.S_IMODE(path.stat().st_mode) & 0o077:
        raise UsageError(f"others can read the private key {path}", fix=f"chmod 600 {path}")
    try:
        private = load_pem_private_key(pem, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as exc:
        raise UsageError(f"{path} holds no private key that can be read", fix="name an unencrypted PEM file") from exc
    if not isinstance(private, Ed25519PrivateKey):
        raise UsageError(f"{path} is a key of another algorithm", fix=f"use one of {ALGORITHM}")
    return private


def _read_public(path: Path) -> Key:
    pem = _read_pem(path, "name the .pub.pem file of a key")
    if b"PRIVATE KEY" in pem:
        raise UsageError(f"{path} is a private key", fix="name its public half; a private key stays where it was made")
    try:
        public = load_pem_public_key(pem)
    except (ValueError, UnsupportedAlgorithm) as exc:
        raise UsageError(f"{path} holds no public key", fix="name a PEM file, or remove this one") from exc
    if not isinstance(public, Ed25519PublicKey):
        raise UsageError(f"{path} is a key of another algorithm", fix=f"use one of {ALGORITHM}")
    return Key(path.name.removesuffix(PUBLIC_SUFFIX), _id(public), path)


def _read_pem(path: Path, fix: str) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(MOST_PEM_BYTES)
    except OSError as exc:
        raise UsageError(f"cannot read the key {path}: {exc.strerror}", fix=fix) from exc
