"""Layers of an ONNX graph whose weights can be stored in fewer bits, and what is constant around them.

A layer multiplies activations [..., K] by a constant matrix: MatMul, or Gemm without transposed activations, whose
weight is an initialiser, behind Cast, Transpose or Identity or not. Letters: N outputs, K inputs of a layer.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from edge_rsvlm.export.graphs.sliced import names_read

Nodes = Sequence[onnx.NodeProto]
Tensors = Mapping[str, NDArray[Any]]

LEAST = 32
"""Inputs and outputs that a layer has at least: smaller ones save nothing."""
THROUGH = ("Cast", "Transpose", "Identity")


class Constants:
    """What a graph computes from its initialisers alone."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        inputs = {value.name for value in graph.input}
        self.initializers = {tensor.name for tensor in graph.initializer} - inputs
        self.made: dict[str, onnx.NodeProto] = {}
        for node in graph.node:
            if node.domain == "" and not node.op_type.startswith("Random") and all(map(self.holds, names_read(node))):
                self.made |= dict.fromkeys(node.output, node)

    def holds(self, name: str) -> bool:
        return name in self.initializers or name in self.made

    def is_made_by(self, node: onnx.NodeProto) -> bool:
        return any(name in self.made for name in node.output)

    def nodes_for(self, nodes: Nodes, done: Collection[str] = ()) -> list[onnx.NodeProto]:
        """Constant nodes that these read, directly or not, in the order in which they must run; not those of ``done``
        (names of outputs)."""
        found: dict[str, onnx.NodeProto] = {}
        todo = [(name, False) for node in reversed(nodes) for name in sorted(names_read(node))]
        while todo:
            name, ready = todo.pop()
            maker = self.made.get(name)
            if maker is None or name in done or maker.output[0] in found:
                continue
            if ready:
                found[maker.output[0]] = maker
            else:
                todo += [(name, True), *((below, False) for below in sorted(names_read(maker)))]
        return list(found.values())

    def source(self, name: str) -> tuple[str, list[onnx.NodeProto]] | None:
        """The initialiser that ``name`` is, through THROUGH at most, and the nodes from it on."""
        path: list[onnx.NodeProto] = []
        while name not in self.initializers:
            node = self.made.get(name)
            if node is None or node.op_type not in THROUGH:
                return None
            path.insert(0, node)
            name = node.input[0]
        return name, path

    def value(self, name: str, tensors: Tensors) -> NDArray[Any] | None:
        """The array that ``name`` is, in the initialiser's own dtype; None where more than THROUGH is between."""
        found = self.source(name)
        if found is None:
            return None
        array = tensors[found[0]]
        for node in found[1]:
            if node.op_type == "Transpose":
                array = array.transpose(attribute(node, "perm"))
        return array


@dataclass(frozen=True)
class Layer:
    """``weight`` names a constant [K, N], or [N, K] where ``turned``."""

    node: onnx.NodeProto
    weight: str
    initializer: str
    turned: bool

    @property
    def input(self) -> str:
        return str(self.node.input[0])

    @property
    def output(self) -> str:
        return str(self.node.output[0])

    @property
    def bias(self) -> str | None:
        return self.node.input[2] if len(self.node.input) > 2 and self.node.input[2] else None

    def weight_NK(self, constants: Constants, tensors: Tensors) -> NDArray[np.float32]:
        array = constants.value(self.weight, tensors)
        assert array is not None
        return np.array(array if self.turned else array.T, np.float32, order="C")


def attribute(node: onnx.NodeProto, name: str, default: Any = None) -> Any:
    return next((onnx.helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)


def find_layers(graph: onnx.GraphProto, constants: Constants, tensors: Tensors, keep: Collection[str]) -> list[Layer]:
    """Layers in the order of the graph, but those that ``keep`` names: by weight, node or output, or its beginning."""
    found = []
    for node in graph.node:
        layer = _layer(node, constants)
        if layer is None or any(name.startswith(tuple(keep)) for name in _names(layer)):
            continue
        array = constants.value(layer.weight, tensors)
        if array is not None and array.ndim == 2 and min(array.shape) >= LEAST and _is_float(array):
            found.append(layer)
    return found


def _layer(node: onnx.NodeProto, constants: Constants) -> Layer | None:
    if node.op_type not in ("MatMul", "Gemm") or constants.holds(node.input[0]):
        return None
    source = constants.source(node.input[1])
    plain = node.op_type == "MatMul" or (
        not attribute(node, "transA", 0) and attribute(node, "alpha", 1.0) == attribute(node, "beta", 1.0) == 1.0
    )
    return Layer(node, node.input[1], source[0], bool(attribute(node, "transB", 0))) if source and plain else None


def _names(layer: Layer) -> list[str]:
    return [layer.initializer, layer.weight, layer.node.name, layer.output]


def _is_float(array: NDArray[Any]) -> bool:
    return array.dtype.kind == "f" or array.dtype.name == "bfloat16"


@dataclass(frozen=True)
class Group:
    """Layers that read the same activations; ``at`` is the first one's place among the graph's nodes."""

    at: int
    input: str
    layers: tuple[Layer, ...]


def groups_of(nodes: Nodes, layers: Sequence[Layer]) -> list[Group]:
    place = {node.output[0]: index for index, node in enumerate(nodes)}
    by_input: dict[str, list[Layer]] = {}
    for layer in layers:
        by_input.setdefault(layer.input, []).append(layer)
    return [Group(place[some[0].output], name, tuple(some)) for name, some in by_input.items()]
