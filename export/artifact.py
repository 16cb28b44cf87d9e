"""Artifacts: what one step of an export leaves behind, a folder with `artifact.json`, written whole or not at all.

A step is described by its name, its config and the hashes of the artifacts it read. A folder that already holds an
artifact of the same description is reused, so an export resumes where it stopped. Stages of training are steps too;
theirs hold `weights.safetensors` (f16).
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from edge_rsvlm.errors import InputError
from edge_rsvlm.export.graphs.tensor_files import altered_tensors, tensor_digests

WEIGHTS_NAME = "weights.safetensors"
MANIFEST_NAME = "artifact.json"
MAX_WEIGHTS_BYTES = 10_000_000
TOOLS = ("torch", "transformers", "peft", "onnx", "onnxscript", "onnxruntime")
CHUNK_BYTES = 1 << 20
NAMES_SHOWN = 8

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Artifact:
    """A finished step on disk."""

    folder: Path
    manifest: dict[str, Any]

    @property
    def hash(self) -> str:
        return str(self.manifest["hash"])

    @property
    def metrics(self) -> dict[str, Any]:
        return dict(self.manifest["metrics"])

    def tensors(self) -> Tensors:
        """Weights of a training stage, as float32."""
        stored = load_file(str(self.folder / WEIGHTS_NAME))
        return {name: t.float() if t.is_floating_point() else t for name, t in stored.items()}


def stage_hash(stage: str, config: dict[str, Any], parents: list[Artifact]) -> str:
    """SHA-256 over what determines a step's result: name, config and parent hashes."""
    text = json.dumps([stage, config, [p.hash for p in parents]], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def file_hash(path: Path) -> str:
    """SHA-256 of a file of any size, in constant memory."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def load(folder: Path) -> Artifact:
    """Read the artifact in `folder`; FileNotFoundError names the stage to run first."""
    path = folder / MANIFEST_NAME
    if not path.is_file():
        raise FileNotFoundError(
            f"no artifact in {folder}: run the stage '{folder.name}' of edge_rsvlm.export.default.train first"
        )
    return Artifact(folder, json.loads(path.read_text()))


def find(folder: Path, wanted_hash: str) -> Artifact | None:
    """The finished artifact in `folder` if it has this hash, else None.

    Raises InputError when one of its files is not what the step wrote.
    """
    if not (folder / MANIFEST_NAME).is_file():
        return None
    found = load(folder)
    if found.hash != wanted_hash:
        return None
    altered = [
        name
        for name, entry in found.manifest.get("files", {}).items()
        if not (folder / name).is_file() or file_hash(folder / name) != entry["sha256"]
    ]
    if altered:
        tensors = altered_tensors(folder, altered, found.manifest.get("tensors", {}))
        named = (
            f" ({', '.join(tensors[:NAMES_SHOWN])}{', ...' if len(tensors) > NAMES_SHOWN else ''})" if tensors else ""
        )
        raise InputError(
            f"{folder} was altered after the step '{found.manifest['stage']}' wrote it: {', '.join(altered)}{named}",
            fix="remove that folder and run the export again",
        )
    return found


def build(
    folder: Path,
    step: str,
    config: dict[str, Any],
    parents: list[Artifact],
    make: Callable[[Path], Mapping[str, Any]],
) -> Artifact:
    """The artifact of this step in ``folder``, reused or made: ``make`` fills a new folder and returns metrics."""
    digest = stage_hash(step, config, parents)
    return find(folder, digest) or _publish(folder, step, digest, config, make)


def _publish(
    folder: Path, step: str, digest: str, config: dict[str, Any], make: Callable[[Path], Mapping[str, Any]]
) -> Artifact:
    """Fill a temporary folder beside ``folder``, then rename it into place."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    _sweep(folder)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    temporary.chmod(0o755)
    try:
        manifest = _fill(temporary, step, digest, config, make)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if folder.exists():
        shutil.rmtree(folder)
    temporary.replace(folder)
    return Artifact(folder, manifest)


def _fill(
    folder: Path, step: str, digest: str, config: dict[str, Any], make: Callable[[Path], Mapping[str, Any]]
) -> dict[str, Any]:
    """The step's files and then its manifest, which is returned."""
    metrics = dict(make(folder))
    files = {
        str(path.relative_to(folder)): {"sha256": file_hash(path), "bytes": path.stat().st_size}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    manifest = {
        "stage": step, "hash": digest, "config": config, "metrics": metrics, "files": files, "tools": tools(),
        "tensors": tensor_digests(folder),
    }  # fmt: skip
    (folder / MANIFEST_NAME).write_text(json.dumps(manifest, indent=2, sort_keys=True) + "\n")
    return manifest


def _sweep(folder: Path) -> None:
    """Remove what a killed run of the same step left half made."""
    for left in folder.parent.glob(f".{folder.name}-*"):
        shutil.rmtree(left, ignore_errors=True)


def tools() -> dict[str, str]:
    """Versions of what took part, where installed."""
    found = {}
    for name in TOOLS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def half(tensors: Tensors) -> Tensors:
    """Floating tensors as contiguous f16 on the CPU; others unchanged."""
    return {
        name: (t.detach().cpu().half() if t.is_floating_point() else t.detach().cpu()).contiguous()
        for name, t in tensors.items()
    }


def part(tensors: Tensors, name: str) -> Tensors:
    """The tensors of the submodule `name`, without its prefix."""
    prefix = f"{name}."
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def write(
    folder: Path,
    stage: str,
    digest: str,
    config: dict[str, Any],
    metrics: dict[str, Any],
    tensors: Tensors,
    texts: Mapping[str, str] | None = None,
) -> Artifact:
    """The artifact of a training stage: its weights, and `texts` as more files."""

    def make(into: Path) -> dict[str, Any]:
        save_file(half(tensors), str(into / WEIGHTS_NAME))
        (into / WEIGHTS_NAME).chmod(0o644)
        for name, text in (texts or {}).items():
            (into / name).write_text(text, encoding="utf-8")
        weights_bytes = (into / WEIGHTS_NAME).stat().st_size
        if weights_bytes > MAX_WEIGHTS_BYTES:
            raise ValueError(f"stage '{stage}' wrote {weights_bytes} bytes; its weights may take {MAX_WEIGHTS_BYTES}")
        return metrics

    return _publish(folder, stage, digest, config, make)
