"""A graph of MatMulNBits layers for TensorRT: the same numbers in blocks of INT4, and half precision around them.

Types are found on a bare graph, in which inputs stand in for the weights: these are read one at a time.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnxruntime.quantization.onnx_model import ONNXModel

from edge_rsvlm.errors import InputError
from edge_rsvlm.export.graphs.sliced import names_read
from edge_rsvlm.export.quantize.graph_files import MICROSOFT, use_domain, write_graph
from edge_rsvlm.export.quantize.layers import attribute
from edge_rsvlm.export.quantize.nbits import Blocks, pack_int4_KN, unpack
from edge_rsvlm.export.quantize.rewriting import Rewriting
from edge_rsvlm.export.quantize.typed import halved

FLOAT, HALF, INT4 = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.INT4
INT4_OPSET = 21
LARGE_BYTES = 64 << 10
"""Smaller arrays stay in the bare graph."""


@dataclass(frozen=True)
class _Weight:
    """What an input ``name`` of the bare graph stands for: the weight of a MatMulNBits node, or an array."""

    name: str
    node: onnx.NodeProto | None
    array: str
    type: int


def write_blocked(graph: Path, out: Path) -> int:
    """Write ``graph``, whose layers are MatMulNBits, to ``out`` and return the bytes of its arrays.

    A layer of other numbers than TensorRT takes (4 bits, symmetric, whole blocks, scales above 0) has the same values
    in half precision; a graph of such layers alone keeps its opset. What goes into the graph and comes out keeps its
    type.
    """
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".int4-") as folder:
        work = Rewriting(graph, Path(folder))
        weights = [*_layers(work), *_arrays(work)]
        bare = _bare(work, weights)
        if any(_fits_tensorrt(work, weight.node) for weight in weights if weight.node is not None):
            bare = _at_opset(bare, graph.name)
        bare = halved(bare)
        del bare.graph.value_info[:]
        for tensor in bare.graph.initializer:
            work.tensors[tensor.name] = onnx.numpy_helper.to_array(tensor)
        for weight in weights:
            _put_back(work, bare.graph, weight)
        ONNXModel(bare).topological_sort()
        return write_graph(bare, work.tensors, out)


def _layers(work: Rewriting) -> Iterator[_Weight]:
    for node in work.model.graph.node:
        if node.op_type == "MatMulNBits":
            yield _Weight(f"{node.output[0]}_weight", node, "", FLOAT)


def _arrays(work: Rewriting) -> Iterator[_Weight]:
    """Large floating-point arrays, after the Cast that widens them where there is one."""
    types = {tensor.name: tensor.data_type for tensor in work.model.graph.initializer}
    large = {
        n for n in work.constants.initializers if work.tensors[n].nbytes >= LARGE_BYTES and types[n] in (FLOAT, HALF)
    }
    read = {
        name for node in work.model.graph.node if node.op_type != "MatMulNBits" for name in _read_apart(node, large)
    }
    yield from (_Weight(name, None, name, types[name]) for name in sorted(read))
    for node in work.model.graph.node:
        if _widens(node, large):
            yield _Weight(node.output[0], None, node.input[0], FLOAT)


def _read_apart(node: onnx.NodeProto, large: set[str]) -> set[str]:
    return set() if _widens(node, large) else names_read(node) & large


def _widens(node: onnx.NodeProto, large: set[str]) -> bool:
    return node.op_type == "Cast" and node.input[0] in large and attribute(node, "to") == FLOAT


def _bare(work: Rewriting, weights: Sequence[_Weight]) -> onnx.ModelProto:
    """The graph with an input in the place of every weight."""
    graph, names = work.model.graph, {weight.name for weight in weights}
    nodes = [_as_product(node) for node in graph.node if not names.intersection(node.output)]
    nodes = _alive(nodes, {value.name for value in graph.output})
    read = {name for node in nodes for name in names_read(node)}
    small = [
        onnx.numpy_helper.from_array(np.asarray(work.tensors[tensor.name]), tensor.name)
        for tensor in graph.initializer if tensor.name in read and tensor.name not in names
    ]  # fmt: skip
    inputs = [onnx.helper.make_tensor_value_info(w.name, w.type, _shape(work, w)) for w in weights]
    bare = onnx.helper.make_graph(nodes, graph.name, [*graph.input, *inputs], graph.output, small)
    opsets = [entry for entry in work.model.opset_import if entry.domain != MICROSOFT]
    return onnx.helper.make_model(bare, opset_imports=opsets, ir_version=max(work.model.ir_version, 10))


def _as_product(node: onnx.NodeProto) -> onnx.NodeProto:
    if node.op_type != "MatMulNBits":
        return node
    weight = f"{node.output[0]}_weight"
    return onnx.helper.make_node("MatMul", [node.input[0], weight], list(node.output), name=node.name)


def _alive(nodes: Sequence[onnx.NodeProto], outputs: set[str]) -> list[onnx.NodeProto]:
    """Nodes that lead to the outputs; the order is that of the graph."""
    needed, found = set(outputs), []
    for node in reversed(nodes):
        if needed.intersection(node.output):
            found.append(node)
            needed |= names_read(node)
    return found[::-1]


def _shape(work: Rewriting, weight: _Weight) -> tuple[int, ...]:
    if weight.node is None:
        return tuple(work.tensors[weight.array].shape)
    return attribute(weight.node, "K"), attribute(weight.node, "N")


def _at_opset(model: onnx.ModelProto, name: str) -> onnx.ModelProto:
    """``model`` at the first opset that has blocks of INT4."""
    version = next(entry.version for entry in model.opset_import if not entry.domain)
    if version >= INT4_OPSET:
        return model
    if version == INT4_OPSET - 1 and all(node.op_type != "GroupNormalization" for node in model.graph.node):
        use_domain(model, "", INT4_OPSET)  # which differ in types alone
        return model
    try:
        return onnx.version_converter.convert_version(model, INT4_OPSET)
    except RuntimeError as exc:
        raise InputError(
            f"{name} has opset {version}, which could not be raised to {INT4_OPSET} ({exc})",
            fix="export the graph with opset 20, or leave TensorRT out of this recipe's engines",
        ) from exc


def _put_back(work: Rewriting, graph: onnx.GraphProto, weight: _Weight) -> None:
    """The weight in half precision where it is read so, else as it was."""
    given = next(value for value in graph.input if value.name == weight.name)
    graph.input.remove(given)
    half = f"{weight.name}_half"
    for cast in [node for node in graph.node if node.op_type == "Cast" and list(node.input) == [weight.name]]:
        if attribute(cast, "to") == HALF:
            _rename(graph, cast.output[0], half)
            graph.node.remove(cast)
    read = {name for node in graph.node for name in names_read(node)}
    if half in read or weight.node is not None:
        _add_half(work, graph, weight, half)
    if weight.name in read:
        source = half if weight.node is not None else weight.array
        _add_as_it_was(work, graph, weight, source)


def _rename(graph: onnx.GraphProto, old: str, new: str) -> None:
    for node in graph.node:
        for place, name in enumerate(node.input):
            if name == old:
                node.input[place] = new


def _add_half(work: Rewriting, graph: onnx.GraphProto, weight: _Weight, name: str) -> None:
    if weight.node is None:
        _add_array(work, graph, name, np.asarray(work.tensors[weight.array], np.float16))
        return
    blocks = _blocks(work, weight.node)
    if not _fits_tensorrt(work, weight.node):
        _add_array(work, graph, name, blocks.values_NK().T.astype(np.float16))
        return
    numbers, scales = f"{weight.name}_int4", f"{weight.name}_scales"
    work.add_tensor(numbers, pack_int4_KN(blocks))
    graph.initializer.append(onnx.TensorProto(name=numbers, dims=blocks.numbers_NK.shape[::-1], data_type=INT4))
    _add_array(work, graph, scales, blocks.scales_NG.T.astype(np.float16))
    graph.node.append(
        onnx.helper.make_node("DequantizeLinear", [numbers, scales], [name], name=name, axis=0, block_size=blocks.block)
    )


def _add_array(work: Rewriting, graph: onnx.GraphProto, name: str, array: NDArray[Any]) -> None:
    """The array apart, and in the graph what says that it is an initialiser."""
    work.add_tensor(name, array)
    kind = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
    graph.initializer.append(onnx.TensorProto(name=name, dims=array.shape, data_type=kind))


def _add_as_it_was(work: Rewriting, graph: onnx.GraphProto, weight: _Weight, source: str) -> None:
    if source == weight.name:
        graph.initializer.append(onnx.TensorProto(name=source, dims=work.tensors[source].shape, data_type=weight.type))
        return
    graph.node.append(
        onnx.helper.make_node("Cast", [source], [weight.name], name=f"{weight.name}_cast", to=weight.type)
    )


def _blocks(work: Rewriting, node: onnx.NodeProto) -> Blocks:
    numbers, scales, zeros = _arrays_of(work, node)
    assert numbers is not None and scales is not None
    shaped = scales.reshape(attribute(node, "N"), -1)
    return unpack(np.asarray(numbers), np.asarray(shaped), zeros, attribute(node, "K"), attribute(node, "bits"))


def _fits_tensorrt(work: Rewriting, node: onnx.NodeProto) -> bool:
    """The numbers themselves are not read."""
    _, scales, zeros = _arrays_of(work, node)
    assert scales is not None
    whole = attribute(node, "K") % attribute(node, "block_size") == 0
    positive = bool((np.asarray(scales, np.float16) > 0).all())
    return attribute(node, "bits") == 4 and zeros is None and whole and positive


def _arrays_of(work: Rewriting, node: onnx.NodeProto) -> list[NDArray[Any] | None]:
    """Numbers, scales and zeros of a layer."""
    arrays = [work.constants.value(name, work.tensors) for name in node.input[1:4]]
    return [*arrays, None][:3]
