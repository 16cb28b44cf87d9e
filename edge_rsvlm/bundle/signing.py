"""Signing a bundle that is whole: in place, or packed into one file for the way to the device."""

from __future__ import annotations

from pathlib import Path

from edge_rsvlm.bundle import Candidate, Rules, candidate, pack, signatures
from edge_rsvlm.bundle.archive import SUFFIX
from edge_rsvlm.bundle.contents import SIGNATURE_NAME
from edge_rsvlm.bundle.home import replacing
from edge_rsvlm.errors import UsageError


def sign_bundle(path: Path, key: str, output: Path | None = None) -> Path:
    """Sign the bundle at ``path`` with a private key (see ``signatures.sign``); returns what now carries the signature.

    BundleError, with the first problem, where the bundle is not what its manifest says: a signature vouches for it.
    """
    if output is not None and output.suffix != SUFFIX:
        raise UsageError(f"--output {output} is no bundle file", fix=f"name it *{SUFFIX}")
    # Whoever signs may sign for the first time, again, or for an older version.
    with candidate(path, Rules(allow_unsigned=True, allow_older=True)) as found:
        signature = signatures.sign(found.raw, key)
        found.signature = None  # the new one takes its place, right or wrong
        _check(found, path)
        if output is None and found.archive is None:
            with replacing(path / SIGNATURE_NAME) as file:
                file.write(signature)
            return path
        pack(found.folder, output or path, signature)
        return output or path


def _check(found: Candidate, path: Path) -> None:
    for problem in found.problems():
        raise problem.error(path)
