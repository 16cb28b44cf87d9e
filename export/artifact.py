"""Stage artifacts: a folder with `weights.safetensors` (f16) and `artifact.json`, written whole or not at all.

A stage is described by its name, its config and the hashes of the artifacts it read. When a folder already holds an
artifact of the same description it is reused, so an interrupted export resumes where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

WEIGHTS_NAME = "weights.safetensors"
MANIFEST_NAME = "artifact.json"
MAX_ARTIFACT_BYTES = 10_000_000

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Artifact:
    """A finished stage on disk."""

    folder: Path
    manifest: dict[str, Any]

    @property
    def hash(self) -> str:
        return str(self.manifest["hash"])

    @property
    def metrics(self) -> dict[str, Any]:
        return dict(self.manifest["metrics"])

    def tensors(self) -> Tensors:
        """Stored weights as float32."""
        stored = load_file(str(self.folder / WEIGHTS_NAME))
        return {name: t.float() if t.is_floating_point() else t for name, t in stored.items()}


def stage_hash(stage: str, config: dict[str, Any], parents: list[Artifact]) -> str:
    """SHA-256 over what determines a stage's result: name, config and parent hashes."""
    text = json.dumps([stage, config, [p.hash for p in parents]], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def load(folder: Path) -> Artifact:
    """Read the artifact in `folder`; FileNotFoundError names the stage to run first."""
    path = folder / MANIFEST_NAME
    if not path.is_file():
        raise FileNotFoundError(
            f"no artifact in {folder}: run the stage '{folder.name}' of edge_rsvlm.export.train first"
        )
    return Artifact(folder, json.loads(path.read_text()))


def find(folder: Path, wanted_hash: str) -> Artifact | None:
    """The finished artifact in `folder` if it has this hash, else None."""
    if not (folder / MANIFEST_NAME).is_file():
        return None
    found = load(folder)
    return found if found.hash == wanted_hash else None


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
    """Write an artifact to a temporary folder beside `folder`, then rename it into place; `texts` are more files."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    save_file(half(tensors), str(temporary / WEIGHTS_NAME))
    for name, text in (texts or {}).items():
        (temporary / name).write_text(text, encoding="utf-8")
    weights_bytes = (temporary / WEIGHTS_NAME).stat().st_size
    if weights_bytes > MAX_ARTIFACT_BYTES:
        raise ValueError(f"stage '{stage}' wrote {weights_bytes} bytes; an artifact may hold {MAX_ARTIFACT_BYTES}")
    manifest = {
        "stage": stage,
        "hash": digest,
        "config": config,
        "metrics": metrics,
        "weights_bytes": weights_bytes,
        "torch": torch.__version__,
    }
    (temporary / MANIFEST_NAME).write_text(json.dumps(manifest, indent=2, sort_keys=True) + "\n")
    temporary.chmod(0o755)
    (temporary / WEIGHTS_NAME).chmod(0o644)
    if folder.exists():
        shutil.rmtree(folder)
    temporary.replace(folder)
    return Artifact(folder, manifest)
