"""Tensors in files that this package writes, one at a time: their bytes' digests, and their values."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

CHUNK_BYTES = 1 << 20
SUFFIXES = (".safetensors", ".onnx")
DATA_SUFFIX = ".data"


@dataclass(frozen=True)
class TensorBytes:
    """``length`` bytes of ``file`` from ``offset`` on, or ``raw`` where they are in the graph itself."""

    name: str
    file: Path
    offset: int
    length: int
    raw: bytes | None = None

    def sha256(self) -> str:
        if self.raw is not None:
            return hashlib.sha256(self.raw).hexdigest()
        digest, left = hashlib.sha256(), self.length
        with self.file.open("rb") as stream:
            stream.seek(self.offset)
            while left and (chunk := stream.read(min(CHUNK_BYTES, left))):
                digest.update(chunk)
                left -= len(chunk)
        return digest.hexdigest()


def tensor_digests(folder: Path) -> dict[str, dict[str, str]]:
    """SHA-256 of every tensor in the safetensors and ONNX files below ``folder``, by file and name."""
    paths = [path for path in sorted(folder.rglob("*")) if path.suffix in SUFFIXES and path.is_file()]
    return {path.relative_to(folder).as_posix(): {t.name: t.sha256() for t in _tensors(path)} for path in paths}


def altered_tensors(folder: Path, files: Collection[str], known: Mapping[str, Mapping[str, str]]) -> list[str]:
    """Names of the tensors in ``files`` of ``folder`` that are not as in ``known``; none where a file is no file."""
    changed: dict[str, None] = {}
    for name in dict.fromkeys(name.removesuffix(DATA_SUFFIX) for name in files):
        if not name.endswith(SUFFIXES):
            continue
        before = known.get(name, {})
        try:
            now = {tensor.name: tensor.sha256() for tensor in _tensors(folder / name)}
        except (OSError, ValueError, KeyError):
            continue
        changed |= dict.fromkeys(tensor for tensor, digest in before.items() if now.get(tensor) != digest)
    return list(changed)


def initialisers(path: Path) -> dict[str, NDArray[Any]]:
    """Initialisers of an ONNX graph by name; those beside it are mapped, not read."""
    import onnx

    found: dict[str, NDArray[Any]] = {}
    for tensor in onnx.load(path, load_external_data=False).graph.initializer:
        if not onnx.external_data_helper.uses_external_data(tensor):
            found[tensor.name] = onnx.numpy_helper.to_array(tensor)
            continue
        place = onnx.external_data_helper.ExternalDataInfo(tensor)
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
        data = path.with_name(place.location)
        found[tensor.name] = np.memmap(data, dtype, "r", offset=place.offset or 0, shape=tuple(tensor.dims))
    return found


def _tensors(path: Path) -> list[TensorBytes]:
    return _stored(path) if path.suffix == ".safetensors" else _initialisers(path)


def _stored(path: Path) -> list[TensorBytes]:
    from edge_rsvlm.errors import InputError
    from edge_rsvlm.export.checkpoint.reading import StoredTensor, list_safetensors

    try:
        found = list_safetensors(path)
    except InputError as exc:
        raise ValueError(str(exc)) from exc
    stored = [tensor for tensor in found.values() if isinstance(tensor, StoredTensor)]
    return [TensorBytes(tensor.name, path, tensor.offset, tensor.span_bytes) for tensor in stored]


def _initialisers(path: Path) -> list[TensorBytes]:
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        graph = onnx.load(path, load_external_data=False).graph
    except DecodeError as exc:
        raise ValueError(f"{path} is not an ONNX file") from exc
    found = []
    for tensor in graph.initializer:
        if onnx.external_data_helper.uses_external_data(tensor):
            place = onnx.external_data_helper.ExternalDataInfo(tensor)
            data = path.with_name(place.location)
            found.append(TensorBytes(tensor.name, data, place.offset or 0, place.length or 0))
        else:
            raw = onnx.numpy_helper.to_array(tensor).tobytes()
            found.append(TensorBytes(tensor.name, path, 0, len(raw), raw))
    return found
