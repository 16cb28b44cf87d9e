"""Graphs in memory, ready to be quantized: weights in float32, every node named, every value typed."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper

from edge_rsvlm.export.graphs.tensor_files import initialisers

Model: TypeAlias = onnx.ModelProto
SMALL_BYTES = 4096
"""Larger initialisers hold no shapes: nothing needs their values to know the types."""
INFERRED = ("onnx.infer", "onnxruntime.quant")
"""How onnxruntime marks a model whose types are known; else it writes and reads the whole model to infer them."""


def load_wide(path: Path) -> Model:
    """The graph with half-precision weights behind a Cast widened; tables that are gathered from stay as they are."""
    model = _whole(path)
    graph = model.graph
    stored = {tensor.name: tensor for tensor in graph.initializer}
    given = {value.name for value in graph.input}
    nodes, dropped = [], set()
    for node in graph.node:
        source = stored.get(node.input[0]) if node.op_type == "Cast" else None
        if source is None or source.name in given or not _widens(node, source):
            nodes.append(node)
            continue
        wide = array_of(source).astype(np.float32)
        graph.initializer.append(numpy_helper.from_array(wide, node.output[0]))
        dropped.add(source.name)
    dropped -= {name for node in nodes for name in node.input}
    _replace(graph.node, nodes)
    _replace(graph.initializer, [tensor for tensor in graph.initializer if tensor.name not in dropped])
    for index, node in enumerate(graph.node):
        node.name = node.name or f"{node.op_type}_{index}"
    infer_types(model)
    return model


def _whole(path: Path) -> Model:
    """With the tensors that lie beside it. ONNX's own loader refuses data with several hard links, which is how steps
    of an export share theirs."""
    model = onnx.load(path, load_external_data=False)
    outside = [t for t in model.graph.initializer if onnx.external_data_helper.uses_external_data(t)]
    arrays = initialisers(path) if outside else {}
    for tensor in outside:
        tensor.CopyFrom(numpy_helper.from_array(np.asarray(arrays[tensor.name]), tensor.name))
    return model


def _widens(node: onnx.NodeProto, source: TensorProto) -> bool:
    to = next(attribute.i for attribute in node.attribute if attribute.name == "to")
    return bool(to == TensorProto.FLOAT and source.data_type == TensorProto.FLOAT16)


def _replace(field: Any, items: Collection[Any]) -> None:
    kept = list(items)
    del field[:]
    field.extend(kept)


def infer_types(model: Model) -> None:
    """Fill ``value_info``, whatever the size of the weights."""
    graph = model.graph
    bare = onnx.helper.make_graph(graph.node, graph.name, graph.input, graph.output)
    for tensor in graph.initializer:
        if tensor.ByteSize() <= SMALL_BYTES:
            bare.initializer.append(tensor)
        else:
            bare.initializer.append(
                TensorProto(name=tensor.name, dims=tensor.dims, data_type=tensor.data_type,
                            data_location=TensorProto.EXTERNAL)
            )  # fmt: skip
    known = onnx.shape_inference.infer_shapes(
        onnx.helper.make_model(bare, opset_imports=model.opset_import, ir_version=model.ir_version)
    )
    _replace(graph.value_info, known.graph.value_info)
    mark = {entry.key: entry for entry in model.metadata_props}
    if INFERRED[0] not in mark:
        model.metadata_props.add(key=INFERRED[0], value=INFERRED[1])


def drop_unused(model: Model) -> None:
    """Initialisers that nothing reads any more."""
    used = readers(model)
    _replace(model.graph.initializer, [tensor for tensor in model.graph.initializer if tensor.name in used])


def constants(model: Model) -> dict[str, TensorProto]:
    """Initialisers that no caller can replace."""
    given = {value.name for value in model.graph.input}
    return {tensor.name: tensor for tensor in model.graph.initializer if tensor.name not in given}


def array_of(tensor: TensorProto) -> NDArray[Any]:
    found: NDArray[Any] = numpy_helper.to_array(tensor)
    return found


def set_array(tensor: TensorProto, values: NDArray[Any]) -> None:
    """New values, same name."""
    tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(values), tensor.name))


def readers(model: Model) -> dict[str, list[onnx.NodeProto]]:
    """Nodes by the name of a value that they read; a graph output is read by a node of no type."""
    found: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for name in dict.fromkeys(node.input):
            found.setdefault(name, []).append(node)
    for output in model.graph.output:
        found.setdefault(output.name, []).append(onnx.NodeProto())
    return found


def makers(model: Model) -> dict[str, onnx.NodeProto]:
    return {name: node for node in model.graph.node for name in node.output}
