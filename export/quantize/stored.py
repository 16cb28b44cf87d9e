"""Quantized graphs on disk: small ones in one file, others beside their weights, which two graphs may share."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import onnx
from onnx import TensorProto
from onnxruntime.quantization.onnx_model import ONNXModel

from edge_rsvlm.export.graphs.external_data import ALIGNMENT, EMBEDDED_BYTES
from edge_rsvlm.export.quantize.loaded import INFERRED, Model, array_of

SHARED_FROM = 1024
"""Smaller tensors stay in the graph: shapes and scales."""
Place = tuple[int, int]


def store(models: Sequence[tuple[Model, Path]], data_name: str) -> int:
    """Write each model to its path and return the bytes of all files.

    Several models share the file ``data_name``, in which equal tensors lie once; one alone has it where it is large.
    """
    for model, _ in models:
        _tidy(model)
    total = sum(tensor.ByteSize() for model, _ in models for tensor in model.graph.initializer)
    data = models[0][1].with_name(data_name)
    data.unlink(missing_ok=True)
    if len(models) > 1 or total > EMBEDDED_BYTES:
        places: dict[str, Place] = {}
        with data.open("wb") as file:
            for model, _ in models:
                for tensor in model.graph.initializer:
                    _move(tensor, file, data_name, places)
    for model, path in models:
        path.write_bytes(model.SerializeToString())
    return sum(path.stat().st_size for path in (*(path for _, path in models), data) if path.exists())


def _tidy(model: Model) -> None:
    ONNXModel(model).topological_sort()
    kept = [entry for entry in model.metadata_props if entry.key != INFERRED[0]]
    del model.metadata_props[:]
    model.metadata_props.extend(kept)
    del model.graph.value_info[:]


def _move(tensor: TensorProto, file: BinaryIO, location: str, places: dict[str, Place]) -> None:
    raw = tensor.raw_data or array_of(tensor).tobytes()
    if len(raw) < SHARED_FROM:
        return
    digest = hashlib.sha256(raw).hexdigest()
    if digest not in places:
        file.write(bytes(-file.tell() % ALIGNMENT))
        places[digest] = (file.tell(), len(raw))
        file.write(raw)
    offset, length = places[digest]
    bare = TensorProto(name=tensor.name, dims=tensor.dims, data_type=tensor.data_type)
    bare.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        bare.external_data.add(key=key, value=str(value))
    tensor.CopyFrom(bare)


def copied(model: Model) -> Model:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    return copy
