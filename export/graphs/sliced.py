"""Run an ONNX graph that does not fit into memory: a slice of its nodes at a time.

Nodes are cut in file order (which ONNX wants to be topological) where their initialisers would exceed a number of
bytes. Each slice is a session of its own that maps its part of the external data; only the values that later slices
read stay alive.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from edge_rsvlm.engines.onnxruntime import ort
from edge_rsvlm.types import InferenceSession
from edge_rsvlm.verify import cpu_graph

Arrays = dict[str, NDArray[Any]]

SLICE_BYTES = 256 << 20
WHOLE_BYTES = 1 << 30
"""Graphs with more bytes of weights run a slice at a time."""
EXTERNAL_FOLDER = "session.model_external_initializers_file_folder_path"


@dataclass(frozen=True)
class SlicedSession:
    """A graph as an engine's session that holds a slice of it at a time."""

    path: Path

    def run(self, inputs: Mapping[str, NDArray[Any]], outputs: Sequence[str]) -> list[NDArray[Any]]:
        found = dict(run_sliced(self.path, inputs, set(outputs)))
        return [found[name] for name in outputs]


def open_graph(path: Path) -> InferenceSession:
    """Whole as on the device, or by slices where the export shall not need that memory."""
    return SlicedSession(path) if weight_bytes(path) > WHOLE_BYTES else cpu_graph(path)


def weight_bytes(path: Path) -> int:
    """Of a graph and of the files beside it that hold its weights."""
    return sum(file.stat().st_size for file in path.parent.glob(f"{path.stem}.*") if "tensorrt" not in file.name)


@dataclass(frozen=True)
class _Slice:
    """Nodes, and the names that they read from before and give to after."""

    nodes: list[onnx.NodeProto]
    initializers: list[str]
    reads: list[str]
    gives: list[str]


def run_sliced(
    path: Path, inputs: Mapping[str, NDArray[Any]], wanted: Collection[str], slice_bytes: int = SLICE_BYTES
) -> Iterator[tuple[str, NDArray[Any]]]:
    """Values by name, graph outputs or any others, in the order in which the graph makes them.

    ``slice_bytes`` bounds the initialisers of a slice; a single larger one has a slice with one node.
    KeyError names a value that the graph does not make.
    """
    model = onnx.load(path, load_external_data=False)
    initializers = {tensor.name: tensor for tensor in model.graph.initializer}
    made = {name for node in model.graph.node for name in node.output}
    if unknown := set(wanted) - made:
        raise KeyError(f"{path} makes no {sorted(unknown)}")
    slices = _cut(list(model.graph.node), initializers, set(inputs), set(wanted), slice_bytes)
    alive: Arrays = dict(inputs)
    for index, part in enumerate(slices):
        alive |= _run(model, part, initializers, alive, path.parent)
        yield from ((name, alive[name]) for name in part.gives if name in wanted)
        needed = {name for later in slices[index + 1 :] for name in later.reads}
        alive = {name: value for name, value in alive.items() if name in needed}


def _cut(
    nodes: list[onnx.NodeProto],
    initializers: Mapping[str, onnx.TensorProto],
    inputs: set[str],
    wanted: set[str],
    slice_bytes: int,
) -> list[_Slice]:
    groups: list[list[onnx.NodeProto]] = [[]]
    held: dict[str, int] = {}
    for node in nodes:
        added = {name: _bytes(initializers[name]) for name in names_read(node) if name in initializers}
        if groups[-1] and sum((held | added).values()) > slice_bytes:
            groups.append([])
            held = {}
        groups[-1].append(node)
        held |= added
    reads = [{name for node in group for name in names_read(node)} for group in groups]
    makes = [[name for node in group for name in node.output if name] for group in groups]
    slices, available = [], set(inputs)
    for index, group in enumerate(groups):
        later = wanted.union(*reads[index + 1 :])
        slices.append(
            _Slice(
                group,
                sorted((reads[index] & initializers.keys()) - inputs),  # an input has a default where it is both
                sorted(reads[index] & available),
                [name for name in makes[index] if name in later],
            )
        )
        available.update(makes[index])
    return slices


def names_read(node: onnx.NodeProto) -> set[str]:
    """Inputs of a node, and what its subgraphs read from outside (with names of their own among them)."""
    names = {name for name in node.input if name}
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs):
            names |= {name for inner in graph.node for name in names_read(inner)}
            names |= {output.name for output in graph.output}
    return names


def _bytes(tensor: onnx.TensorProto) -> int:
    width = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    return int(np.prod(tensor.dims, dtype=np.int64)) * width


def _run(
    model: onnx.ModelProto,
    part: _Slice,
    initializers: Mapping[str, onnx.TensorProto],
    alive: Mapping[str, NDArray[Any]],
    folder: Path,
) -> Arrays:
    if not part.gives:
        return {}
    feeds = {name: alive[name] for name in part.reads}
    # Sizes and types of values are those of the arrays at hand: the file need not tell them.
    graph = onnx.helper.make_graph(
        part.nodes,
        "slice",
        [_value(name, array) for name, array in feeds.items()],
        [onnx.ValueInfoProto(name=name) for name in part.gives],
        [initializers[name] for name in part.initializers],
    )
    proto = onnx.helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
    session = ort.InferenceSession(proto.SerializeToString(), _options(folder), providers=["CPUExecutionProvider"])
    return dict(zip(part.gives, session.run(part.gives, feeds), strict=True))


def _value(name: str, array: NDArray[Any]) -> onnx.ValueInfoProto:
    return onnx.helper.make_tensor_value_info(name, onnx.helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)


def _options(folder: Path) -> ort.SessionOptions:
    """No copy of a weight but the mapped file: nothing is folded or packed ahead."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.enable_cpu_mem_arena = options.enable_mem_pattern = False
    options.add_session_config_entry("session.disable_prepacking", "1")
    options.add_session_config_entry(EXTERNAL_FOLDER, str(folder.resolve()))
    return options
