"""A graph and the arrays of its initialisers, written as ``NAME.onnx`` and, when they are large, ``NAME.onnx.data``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnx
from numpy.typing import NDArray

from edge_rsvlm.export.graphs.external_data import ALIGNMENT, BLOCK_BYTES, EMBEDDED_BYTES
from edge_rsvlm.export.graphs.sliced import names_read

MICROSOFT = "com.microsoft"
SMALL_BYTES = 1024
"""Initialisers below stay in the graph itself: shapes and axes must be known when it is opened."""


def write_graph(model: onnx.ModelProto, tensors: Mapping[str, NDArray[Any]], path: Path) -> int:
    """Write ``model`` with those of ``tensors`` that its nodes read, and return the bytes of these.

    Four-bit types come as TensorProtos' own bytes: an array named as an initialiser that the model has already is
    written with that one's type and shape.
    """
    graph = model.graph
    read = {name for node in graph.node for name in names_read(node)} | {value.name for value in graph.output}
    typed = {tensor.name: tensor for tensor in graph.initializer}
    arrays = {name: array for name, array in tensors.items() if name in read}
    total = sum(array.nbytes for array in arrays.values())
    protos = [_described(name, array, typed.get(name)) for name, array in arrays.items()]
    if total <= EMBEDDED_BYTES:
        for proto, array in zip(protos, arrays.values(), strict=True):
            proto.raw_data = np.ascontiguousarray(array).tobytes()
    else:
        with path.with_name(f"{path.name}.data").open("wb") as file:
            for proto, array in zip(protos, arrays.values(), strict=True):
                _store(proto, array, file, f"{path.name}.data")
    del graph.initializer[:]
    graph.initializer.extend(protos)
    path.write_bytes(model.SerializeToString())
    return total


def use_domain(model: onnx.ModelProto, domain: str, version: int) -> None:
    """Let the model have operators of ``domain`` in at least this version."""
    known = next((entry for entry in model.opset_import if entry.domain == domain), None)
    if known is None:
        model.opset_import.append(onnx.helper.make_opsetid(domain, version))
    else:
        known.version = max(known.version, version)


def _described(name: str, array: NDArray[Any], typed: onnx.TensorProto | None) -> onnx.TensorProto:
    if typed is not None and _packs_half_bytes(typed.data_type):
        return onnx.TensorProto(name=name, dims=typed.dims, data_type=typed.data_type)
    kind = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
    return onnx.TensorProto(name=name, dims=array.shape, data_type=kind)


def _packs_half_bytes(kind: int) -> bool:
    return kind in (onnx.TensorProto.INT4, onnx.TensorProto.UINT4)


def _store(proto: onnx.TensorProto, array: NDArray[Any], file: BinaryIO, location: str) -> None:
    if array.nbytes < SMALL_BYTES:
        proto.raw_data = np.ascontiguousarray(array).tobytes()
        return
    file.write(bytes(-file.tell() % ALIGNMENT))
    start = file.tell()
    flat = array.reshape(-1)
    step = max(1, BLOCK_BYTES // array.itemsize)
    for at in range(0, flat.size, step):
        file.write(np.ascontiguousarray(flat[at : at + step]).view(np.uint8).data)
    proto.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", start), ("length", array.nbytes)):
        proto.external_data.add(key=key, value=str(value))
