"""Which nodes of a graph compute in 8 bits.

Layers with constant weights do: Conv, MatMul and Gemm. Products of two activations (attention) stay in floating point:
they gain little, bring Softmax along and cost accuracy. What only moves, joins or clips 8-bit values goes along where
all that it reads is in 8 bits already, so that nothing is widened between two convolutions.

A convolution with a small share of the weights that no other layer comes after stays too: 8 bits would be those of the
result, such as the sides of boxes.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import onnx

from edge_rsvlm.export.quantize.layers import attribute
from edge_rsvlm.export.quantize.loaded import Model, constants

LAYERS = ("Conv", "MatMul", "Gemm")
ALONG = ("Clip", "Relu", "Add", "Concat", "Resize", "MaxPool")
LAST_SHARE = 0.05
"""Of all layers' weights, up to which the last convolution stays."""
DATA_INPUTS = {"Clip": 1, "Resize": 1}
"""Of these the other inputs are bounds and sizes."""


@dataclass(frozen=True)
class Chosen:
    """``layers`` have weights, ``along`` is the rest; ``kept`` counts layers that were told to stay as they are."""

    layers: tuple[onnx.NodeProto, ...]
    along: tuple[onnx.NodeProto, ...]
    kept: int

    @property
    def nodes(self) -> tuple[onnx.NodeProto, ...]:
        return (*self.layers, *self.along)


def choose_nodes(model: Model, keep: Collection[str]) -> Chosen:
    """``keep`` names weights, nodes or outputs, or their beginnings."""
    known = constants(model)
    last = _last_convolutions(model, known)
    layers, along, kept = [], [], 0
    in_8_bits: set[str] = set()
    for node in model.graph.node:
        if is_layer(node, known):
            if any(name.startswith(tuple(keep)) for name in (node.input[1], node.name, node.output[0])):
                kept += 1
                continue
            if node.output[0] in last:
                continue
            layers.append(node)
            if node.op_type != "Conv":
                continue  # its results go on in float32
        elif node.op_type in ALONG and _reads_only(node, in_8_bits):
            along.append(node)
        else:
            continue
        in_8_bits.update(node.output)
    return Chosen(tuple(layers), tuple(along), kept)


def is_layer(node: onnx.NodeProto, known: Mapping[str, onnx.TensorProto]) -> bool:
    if node.op_type not in LAYERS or node.domain or node.input[1] not in known or node.input[0] in known:
        return False
    if len(node.input) > 2 and node.input[2] and node.input[2] not in known:
        return False
    weight = known[node.input[1]]
    if weight.data_type != onnx.TensorProto.FLOAT or (node.op_type != "Conv" and len(weight.dims) != 2):
        return False
    return node.op_type != "Gemm" or (
        not attribute(node, "transA", 0) and attribute(node, "alpha", 1.0) == attribute(node, "beta", 1.0) == 1.0
    )


def _last_convolutions(model: Model, known: Mapping[str, onnx.TensorProto]) -> set[str]:
    """By their outputs."""
    layers = [node for node in model.graph.node if is_layer(node, known)]
    sizes = {node.output[0]: math.prod(known[node.input[1]].dims) for node in layers}
    most = LAST_SHARE * sum(sizes.values())
    goes_on: set[str] = set()  # values that a layer is computed from, directly or not
    last = set()
    for node in reversed(model.graph.node):
        size, before_layer = sizes.get(node.output[0]), not goes_on.isdisjoint(node.output)
        if size is not None or before_layer:
            goes_on.update(node.input)
        if size is not None and size <= most and not before_layer and node.op_type == "Conv":
            last.add(node.output[0])
    return last


def _reads_only(node: onnx.NodeProto, names: Collection[str]) -> bool:
    data = node.input[: DATA_INPUTS.get(node.op_type, len(node.input))]
    nearest = node.op_type != "Resize" or attribute(node, "mode", b"nearest") == b"nearest"
    return nearest and all(name in names for name in data)
