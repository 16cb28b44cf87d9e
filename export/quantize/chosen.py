"""Which nodes of a graph compute in 8 bits.

Layers with constant weights do: Conv, MatMul and Gemm. Products of two activations (attention) stay in floating point:
they gain little, bring Softmax along and cost accuracy. What only moves, joins or clips 8-bit values goes along where all
that it reads is in 8 bits already, so that nothing is widened between two convolutions.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import onnx

from edge_rsvlm.export.quantize.layers import attribute
from edge_rsvlm.export.quantize.loaded import Model, constants

LAYERS = ("Conv", "MatMul", "Gemm")
ALONG = ("Clip", "Relu", "Add", "Concat", "Resize", "MaxPool")
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
    layers, along, kept = [], [], 0
    in_8_bits: set[str] = set()
    for node in model.graph.node:
        if is_layer(node, known):
            if any(name.startswith(tuple(keep)) for name in (node.input[1], node.name, node.output[0])):
                kept += 1
                continue
            layers.append(node)
        elif node.op_type in ALONG and _reads_only(node, in_8_bits):
            along.append(node)
        else:
            continue
        in_8_bits.update(node.output)
    return Chosen(tuple(layers), tuple(along), kept)


def is_layer(node: onnx.NodeProto, known: Collection[str]) -> bool:
    if node.op_type not in LAYERS or node.domain or node.input[1] not in known or node.input[0] in known:
        return False
    if len(node.input) > 2 and node.input[2] and node.input[2] not in known:
        return False
    return node.op_type != "Gemm" or (
        not attribute(node, "transA", 0) and attribute(node, "alpha", 1.0) == attribute(node, "beta", 1.0) == 1.0
    )


def _reads_only(node: onnx.NodeProto, names: Collection[str]) -> bool:
    data = node.input[: DATA_INPUTS.get(node.op_type, len(node.input))]
    nearest = node.op_type != "Resize" or attribute(node, "mode", b"nearest") == b"nearest"
    return nearest and all(name in names for name in data)
