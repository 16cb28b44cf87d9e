"""Graphs for TensorRT in half precision, strongly typed: the types in the file are those that are computed in.

Norms, softmax, pooling, reductions and what leads to angles stay in float32: half precision has 11 bits and ends at
65504, and a vision transformer whose norms were narrowed too kept a fifth of its accuracy.
"""

from __future__ import annotations

from pathlib import Path

import onnx
from onnxruntime.quantization.onnx_model import ONNXModel
from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16

from edge_rsvlm.export.quantize.loaded import Model, infer_types, load_wide, makers
from edge_rsvlm.export.quantize.stored import store

WIDE = (
    *DEFAULT_OP_BLOCK_LIST, "LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization",
    "InstanceNormalization", "GroupNormalization", "BatchNormalization", "LpNormalization", "Softmax", "LogSoftmax",
    "AveragePool", "GlobalAveragePool", "ReduceMean", "ReduceSum", "ReduceSumSquare", "ReduceL2", "ReduceMax",
    "ReduceMin", "Pow", "Sqrt", "Reciprocal", "Exp", "Log", "Sin", "Cos", "CumSum",
)  # fmt: skip
ANGLES = ("Sin", "Cos")
FLOAT, HALF = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16


def half_precision(graph: Path, out: Path) -> dict[str, float | int | str]:
    """Write ``out`` (and ``OUT_STEM.f16.data`` where it is large). Inputs and outputs keep their types."""
    model = halved(load_wide(graph))
    return {"bytes": store([(model, out)], f"{out.stem}.f16.data")}


def halved(model: Model) -> Model:
    """``model``, which is used up, with everything but WIDE in half precision."""
    ONNXModel(model).topological_sort()  # types are inferred in the order of the nodes
    infer_types(model)
    found = convert_float_to_float16(
        model, keep_io_types=True, disable_shape_infer=True, op_block_list=WIDE, node_block_list=_before_angles(model)
    )
    _drop_round_trips(found)
    return found


def _before_angles(model: Model) -> list[str]:
    """Nodes that positions pass on their way to sines and cosines: half precision counts to 2048."""
    made, found = makers(model), dict[str, None]()
    todo = [node for node in model.graph.node if node.op_type in ANGLES]
    while todo:
        node = todo.pop()
        if node.name not in found:
            found[node.name] = None
            todo += [made[name] for name in node.input if name in made]
    return list(found)


def _drop_round_trips(model: Model) -> None:
    """What goes from one float32 node to another must not pass half precision: a square would not come through."""
    made = makers(model)
    for node in model.graph.node:
        for place, name in enumerate(node.input):
            up = made.get(name)
            if up is None or not _casts(up, FLOAT):
                continue
            down = made.get(up.input[0])
            if down is not None and _is_added(down):
                node.input[place] = down.input[0]
    read = {name for node in model.graph.node for name in node.input} | {value.name for value in model.graph.output}
    kept = [node for node in model.graph.node if node.op_type != "Cast" or node.output[0] in read]
    del model.graph.node[:]
    model.graph.node.extend(kept)


def _is_added(node: onnx.NodeProto) -> bool:
    """A cast from float32 that the conversion put in; others may come from whole numbers."""
    return _casts(node, HALF) and (node.name.endswith("_cast_to_fp16_node") or node.name.startswith("graph_input_cast"))


def _casts(node: onnx.NodeProto, to: int) -> bool:
    return node.op_type == "Cast" and any(a.name == "to" and a.i == to for a in node.attribute)
