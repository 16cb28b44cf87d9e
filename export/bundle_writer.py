"""Writing a bundle's folder: golden probe, hashes and manifest, and swapping it into place."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_rsvlm.config.manifest import MANIFEST_NAME, SCHEMA_VERSION, Manifest
from edge_rsvlm.config.model import parse
from edge_rsvlm.errors import BundleError
from edge_rsvlm.export.artifact import Artifact, file_hash

PROBE_FOLDER = "probe"
Arrays = Mapping[str, NDArray[Any]]


@contextmanager
def bundle_folder(out: Path) -> Iterator[Path]:
    """A temporary folder beside ``out`` that replaces it when the block ends well."""
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    folder.chmod(0o755)
    try:
        yield folder
        if out.exists():
            shutil.rmtree(out)
        folder.rename(out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def place(source: Path, target: Path) -> None:
    """``source`` as ``target`` without a second copy of its bytes where the file system can."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def probe_case(folder: Path, graph: str, inputs: Arrays, outputs: Arrays, tolerance: float) -> dict[str, Any]:
    """Golden inputs and outputs of one graph, by its own names, as an entry of the manifest's ``probe``."""
    name = f"{PROBE_FOLDER}/{graph}.npz"
    (folder / PROBE_FOLDER).mkdir(exist_ok=True)
    arrays = {f"in.{key}": value for key, value in inputs.items()}
    arrays |= {f"out.{key}": value for key, value in outputs.items()}
    # savez stores names as members of a zip; mypy takes them for its own keywords.
    np.savez_compressed(folder / name, **arrays)  # type: ignore[arg-type]
    return {"graph": graph, "file": name, "tolerance": tolerance}


def step_record(done: Artifact, allowed: tuple[str, ...] = ()) -> dict[str, Any]:
    """An artifact as the manifest remembers it."""
    scalars = {k: v for k, v in done.metrics.items() if isinstance(v, (int, float, str))}
    return {
        "step": done.manifest["stage"], "hash": done.hash, "tools": done.manifest.get("tools", {}),
        "metrics": scalars, "allowed": allowed,
    }  # fmt: skip


def write_manifest(folder: Path, fields: Mapping[str, Any]) -> Manifest:
    """Hash every file of ``folder`` into its manifest; BundleError names what the fields got wrong."""
    files = {
        path.relative_to(folder).as_posix(): {"sha256": file_hash(path), "bytes": path.stat().st_size}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST_NAME
    }
    manifest = parse(Manifest, {"schema_version": SCHEMA_VERSION, **fields, "files": files}, "new bundle", BundleError)
    (folder / MANIFEST_NAME).write_text(manifest.model_dump_json(indent=1) + "\n")
    return manifest


def measured_memory(folder: Path, task: str) -> dict[str, Any]:
    """``memory`` of a task of the bundle in ``folder``, measured in a process of its own."""
    command = [sys.executable, "-m", "edge_rsvlm.export.proof.measure_memory", str(folder), task]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BundleError(f"measuring '{task}' failed: {done.stderr.strip()[-400:]}", fix="see the message above")
    found: dict[str, Any] = json.loads(done.stdout)
    return found
