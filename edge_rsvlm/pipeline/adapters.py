"""Adapters that stay apart in a bundle: read when asked for, and fed to graphs that have inputs for them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from edge_rsvlm.bundle import Bundle
from edge_rsvlm.bundle.zips import ZIP_ERRORS, open_zip
from edge_rsvlm.config.manifest import Adapter, Manifest
from edge_rsvlm.errors import BundleError, UsageError

Factors = dict[str, NDArray[np.float32]]
F32_BYTES = 4
HEADER_BYTES = 4096
"""Of an array in an ``.npz``, at most."""


def adapter_of(manifest: Manifest, name: str) -> Adapter:
    """UsageError, with the names that there are, for one that the bundle does not have."""
    if name not in manifest.adapters:
        names = ", ".join(sorted(manifest.adapters))
        raise UsageError(
            f"bundle '{manifest.name}' has no adapter '{name}', it has: {names or 'none'}",
            fix="name one of those, or leave --adapter out" if names else "leave --adapter out",
        )
    return manifest.adapters[name]


def adapter_bytes(manifest: Manifest, name: str | None) -> int:
    """Anonymous memory that an adapter takes once it is read; 0 for None."""
    return 0 if name is None else adapter_of(manifest, name).parameters * F32_BYTES


def read_adapter(bundle: Bundle, name: str) -> Mapping[str, Factors]:
    """Graph inputs by graph; BundleError where the file does not hold what the manifest says."""
    adapter = adapter_of(bundle.manifest, name)
    path = bundle.path(adapter.file)
    found: dict[str, Factors] = {}
    try:
        with path.open("rb") as file, open_zip(file) as archive:
            unpacked_bytes = sum(max(member.file_size - HEADER_BYTES, 0) for member in archive.infolist())
            if unpacked_bytes > adapter.parameters * F32_BYTES:
                raise ValueError("it is larger than the manifest says")
        with np.load(path, allow_pickle=False) as stored:
            for key in stored.files:
                graph, _, tensor = key.partition("/")
                found.setdefault(graph, {})[tensor] = np.asarray(stored[key], np.float32)
    except (*ZIP_ERRORS, TypeError, KeyError, SyntaxError, MemoryError) as exc:
        raise _wrong(adapter, str(exc)) from exc
    if unknown := found.keys() - bundle.manifest.graphs.keys():
        raise _wrong(adapter, f"it is for graphs that are not here: {', '.join(sorted(unknown))}")
    if sum(values.size for factors in found.values() for values in factors.values()) != adapter.parameters:
        raise _wrong(adapter, "it has not as many numbers as the manifest says")
    return found


def _wrong(adapter: Adapter, reason: str) -> BundleError:
    return BundleError(f"'{adapter.file}' is no adapter of this bundle: {reason}", fix="export the bundle again")
