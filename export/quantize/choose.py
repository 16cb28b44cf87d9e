"""Which kind of INT8 suits a graph on a processor.

Convolutions want static ranges: computed dynamically they take three to four times as long as in float32. Transformers
want dynamic ones: their products are as fast, each input has its own range, and nothing but the products is narrowed.
A graph is static where more multiply-accumulates are those of convolutions than of products with a constant matrix.
Each weight is one at every position of the output, so weights are counted: no size of an input need be assumed. What
cuts an image into patches (as wide as its stride) is a convolution by name only and does not count.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import onnx

from edge_rsvlm.export.quantize.layers import Constants, attribute

Int8Kind = Literal["int8", "int8-dynamic", "f16"]
"""``f16``: nothing to compute in 8 bits, such as a table of embeddings."""


def int8_kind(graph: Path) -> Int8Kind:
    model = onnx.load(graph, load_external_data=False)
    known = Constants(model.graph)
    shapes = {tensor.name: list(tensor.dims) for tensor in model.graph.initializer}
    count = {"Conv": 0, "MatMul": 0, "Gemm": 0}
    for node in model.graph.node:
        if node.op_type in count and not known.holds(node.input[0]):
            source = known.source(node.input[1])
            if source is not None and not _cuts_patches(node, shapes[source[0]]):
                count[node.op_type] += math.prod(shapes[source[0]])
    if not any(count.values()):
        return "f16"
    return "int8" if count["Conv"] > count["MatMul"] + count["Gemm"] else "int8-dynamic"


def _cuts_patches(node: onnx.NodeProto, shape: Sequence[int]) -> bool:
    kernel = list(shape[2:])
    return node.op_type == "Conv" and math.prod(kernel) > 1 and list(attribute(node, "strides", [])) == kernel
