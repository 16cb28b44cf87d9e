"""Which versions of bundles this machine accepted, so that an old one with a known fault cannot be slipped back.

``accepted.json`` in the config folder keeps the newest version per name, in two records: what trusted keys signed, and
what the user allowed unsigned. An unsigned bundle can claim any version; its record never holds back a signed one.
Keys share a record: who could sign with one of several trusted keys must not undo what another one replaced.
The packaged bundle is not recorded, as it comes and goes with the package; its version is a floor for its name.
"""

from __future__ import annotations

import json
from typing import Literal

from pydantic import Field

from edge_rsvlm.bundle.home import config_folder, locked, make_private, replacing
from edge_rsvlm.config.model import Model, parse, printable
from edge_rsvlm.errors import BundleError

RECORD_NAME = "accepted.json"


class Record(Model):
    """Newest accepted version by bundle name."""

    format: Literal[1] = 1
    signed: dict[str, int] = Field(default_factory=dict)
    unsigned: dict[str, int] = Field(default_factory=dict)

    def newest(self, name: str, *, signed: bool) -> int:
        """0 where none was accepted."""
        versions = [self.signed.get(name, 0)]
        if not signed:
            versions.append(self.unsigned.get(name, 0))
        return max(versions)


def newest_accepted(name: str, *, signed: bool) -> int:
    """The version below which a bundle of this name is a step back; 0 where none was accepted.

    BundleError where the record is damaged: without it a step back cannot be told.
    """
    return _read().newest(name, signed=signed)


def remember(name: str, version: int, *, signed: bool, allow_older: bool) -> None:
    """Record an accepted version. With ``allow_older`` a damaged record gives way to a new one."""
    kind = "signed" if signed else "unsigned"
    if _updated(kind, name, version, start_again=allow_older) is None:
        return  # nothing to write, so that a device with a read-only config folder goes on
    with locked(make_private(config_folder()) / f".{RECORD_NAME}.lock"):
        record = _updated(kind, name, version, start_again=allow_older)
        if record:
            with replacing(config_folder() / RECORD_NAME) as file:
                file.write(record.model_dump_json(indent=1).encode() + b"\n")


def _updated(kind: str, name: str, version: int, *, start_again: bool) -> Record | None:
    """The record with this version in it; None where it changes nothing."""
    try:
        record = _read()
    except BundleError:
        if not start_again:
            raise
        record = Record()
    versions: dict[str, int] = getattr(record, kind)
    if version <= versions.get(name, 0):
        return None
    return record.model_copy(update={kind: {**versions, name: version}})


def _read() -> Record:
    path = config_folder() / RECORD_NAME
    fix = "pass --allow-older once to start a new record"
    try:
        data = json.loads(path.read_bytes())
    except FileNotFoundError:
        return Record()
    except (OSError, ValueError, RecursionError) as exc:
        raise BundleError(f"the record of accepted bundles {path} cannot be read: {printable(exc)}", fix=fix) from exc
    try:
        return parse(Record, data, f"record of accepted bundles {path}", BundleError)
    except BundleError as exc:
        raise BundleError(f"the record of accepted bundles {path} is damaged", fix=fix) from exc
