"""Which kind of INT8 suits a graph on a processor.

Convolutions want static ranges: computed dynamically they take three to four times as long as in float32. Transformers
want dynamic ones: their products are as fast, each input has its own range, and nothing but the products is narrowed.
A graph is static where more multiply-accumulates are those of convolutions than of products with a constant matrix. Each
weight is one at every position of the output, so weights are counted: no size of an input need be assumed.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

import onnx

from edge_rsvlm.export.quantize.layers import Constants

Int8Kind = Literal["int8", "int8-dynamic", "f16"]
"""``f16``: nothing to compute in 8 bits, such as a table of embeddings."""


def int8_kind(graph: Path) -> Int8Kind:
    model = onnx.load(graph, load_external_data=False)
    known = Constants(model.graph)
    sizes = {tensor.name: math.prod(tensor.dims) for tensor in model.graph.initializer}
    count = {"Conv": 0, "MatMul": 0, "Gemm": 0}
    for node in model.graph.node:
        if node.op_type in count and not known.holds(node.input[0]):
            source = known.source(node.input[1])
            count[node.op_type] += sizes[source[0]] if source else 0
    if not any(count.values()):
        return "f16"
    return "int8" if count["Conv"] > count["MatMul"] + count["Gemm"] else "int8-dynamic"
