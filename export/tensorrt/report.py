"""What TensorRT would not take of a graph: by rules that need no library, and by its parser where there is one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx
from onnx import numpy_helper

from edge_rsvlm.engines.tensorrt_library import Complaints, load_tensorrt, new_network
from edge_rsvlm.errors import UsageError

OPSET, OPSET_OF_INT4 = 20, 21
"""TensorRT 10.3 reads up to 20; blocks of INT4 begin with 21."""
UNSIGNED = "activations quantized to unsigned numbers: quantize symmetrically"
OPERATORS = {
    "MatMulNBits": "4-bit weights of ONNX Runtime: write INT4 DequantizeLinear",
    "DynamicQuantizeLinear": "ranges measured while it runs: quantize with fixed ranges",
    "MatMulInteger": "integer products of ONNX Runtime: write QuantizeLinear and DequantizeLinear",
    "ConvInteger": "integer products of ONNX Runtime: write QuantizeLinear and DequantizeLinear",
    "QLinearConv": "integer products of ONNX Runtime: write QuantizeLinear and DequantizeLinear",
    "QLinearMatMul": "integer products of ONNX Runtime: write QuantizeLinear and DequantizeLinear",
    "Attention": "an operator of opset 23, which TensorRT 10.3 does not know: write its products",
}
QUANTIZED = ("QuantizeLinear", "DequantizeLinear")
PLAIN_DOMAINS = ("", "ai.onnx")


@dataclass(frozen=True)
class Unsupported:
    """A node, or the whole file where ``node`` is empty."""

    node: str
    operator: str
    reason: str

    def __str__(self) -> str:
        return f"{' '.join(filter(None, (self.operator, self.node)))}: {self.reason}"


def unsupported(graph: Path) -> list[Unsupported]:
    """Everything that would not build, by name; empty where nothing is known to fail."""
    found = known_problems(graph)
    named = {problem.node for problem in found}
    return found + [problem for problem in _parsed(graph) if problem.node not in named]


def known_problems(graph: Path) -> list[Unsupported]:
    """The same by rules alone, which read no weights."""
    model = onnx.load(graph, load_external_data=False)
    return [*_opset(model), *_nodes(model, graph.parent)]


def _opset(model: onnx.ModelProto) -> Iterator[Unsupported]:
    opset = next((entry.version for entry in model.opset_import if entry.domain in PLAIN_DOMAINS), 0)
    most = OPSET_OF_INT4 if _has_int4(model) else OPSET
    if opset > most:
        yield Unsupported("", "opset", f"it is {opset}, and TensorRT 10.3 reads {most}: export it with that")


def _has_int4(model: onnx.ModelProto) -> bool:
    kinds = (onnx.TensorProto.INT4, onnx.TensorProto.UINT4)
    return any(tensor.data_type in kinds for tensor in model.graph.initializer)


def _nodes(model: onnx.ModelProto, folder: Path) -> Iterator[Unsupported]:
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    constants |= {
        node.output[0]: attribute.t
        for node in model.graph.node
        if node.op_type == "Constant"
        for attribute in node.attribute
        if attribute.name == "value"
    }
    for node in model.graph.node:
        if node.op_type in OPERATORS:
            yield Unsupported(node.name, node.op_type, OPERATORS[node.op_type])
        elif node.domain not in PLAIN_DOMAINS and node.op_type not in QUANTIZED:
            yield Unsupported(node.name, node.op_type, f"an operator of {node.domain}, which TensorRT does not know")
        elif node.op_type in QUANTIZED and len(node.input) > 2 and node.input[2] in constants:
            yield from _zero_point(node, constants[node.input[2]], folder)


def _zero_point(node: onnx.NodeProto, tensor: onnx.TensorProto, folder: Path) -> Iterator[Unsupported]:
    if tensor.data_type in (onnx.TensorProto.UINT8, onnx.TensorProto.UINT4, onnx.TensorProto.UINT16):
        yield Unsupported(node.name, node.op_type, UNSIGNED)
    elif numpy_helper.to_array(tensor, base_dir=str(folder)).astype(int).any():
        yield Unsupported(node.name, node.op_type, "its zero point is not zero: quantize symmetrically")


def _parsed(graph: Path) -> Iterator[Unsupported]:
    """What the parser of the installed TensorRT refuses; nothing where none is installed."""
    try:
        library = load_tensorrt()
    except UsageError:
        return
    complaints = Complaints(library)
    network = new_network(library, library.Builder(complaints.logger))
    parser = library.OnnxParser(network, complaints.logger)
    if parser.supports_model_v2(graph.read_bytes(), str(graph)):
        return
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    for error in errors:
        yield Unsupported(error.node_name(), error.node_operator(), error.desc())
    if not errors:
        yield Unsupported("", "graph", complaints.reason())
