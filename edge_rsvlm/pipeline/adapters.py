"""Adapters that stay apart in a bundle: read when asked for, and fed to graphs that have inputs for them."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from edge_rsvlm.bundle import Bundle
from edge_rsvlm.config.manifest import Adapter, Manifest
from edge_rsvlm.errors import BundleError, UsageError

Tensors = dict[str, NDArray[np.float32]]
HEADER_BYTES = 4096
"""Of an array in an ``.npz``, at most."""


def adapter_of(manifest: Manifest, name: str) -> Adapter:
    """UsageError, with the names that there are, for one that the bundle does not have."""
    if name not in manifest.adapters:
        has = ", ".join(sorted(manifest.adapters)) or "none"
        raise UsageError(
            f"bundle '{manifest.name}' has no adapter '{name}', it has: {has}",
            fix="name one of those, or leave --adapter out" if manifest.adapters else "leave --adapter out",
        )
    return manifest.adapters[name]


def adapter_bytes(manifest: Manifest, name: str | None) -> int:
    """Anonymous memory that an adapter takes once it is read; 0 for None."""
    return 0 if name is None else adapter_of(manifest, name).parameters * np.dtype(np.float32).itemsize


def read_adapter(bundle: Bundle, name: str) -> Mapping[str, Tensors]:
    """Graph inputs by graph; BundleError where the file does not hold what the manifest says."""
    adapter = adapter_of(bundle.manifest, name)
    found: dict[str, Tensors] = {graph: {} for graph in adapter.graphs}
    limit = adapter.parameters * np.dtype(np.float32).itemsize
    try:
        with zipfile.ZipFile(bundle.path(adapter.file)) as archive:
            if sum(member.file_size - HEADER_BYTES for member in archive.infolist()) > limit:
                raise _wrong(adapter, "more than the manifest says")
        with np.load(bundle.path(adapter.file), allow_pickle=False) as stored:
            for member in stored.files:
                graph, _, tensor = member.partition("/")
                found[graph][tensor] = stored[member].astype(np.float32)
    except (OSError, ValueError, zipfile.BadZipFile, KeyError, EOFError) as exc:
        raise _wrong(adapter, str(exc)) from exc
    if sum(values.size for tensors in found.values() for values in tensors.values()) != adapter.parameters:
        raise _wrong(adapter, "not as many numbers as the manifest says")
    return found


def _wrong(adapter: Adapter, reason: str) -> BundleError:
    return BundleError(f"'{adapter.file}' is no adapter of this bundle: {reason}", fix="export the bundle again")
