"""ONNX graphs of a few nodes, under the names of those that write text."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("onnx", reason="needs onnx: not installed")

from onnx import TensorProto, helper, numpy_helper


def save(path, nodes, inputs, outputs, weights=(), opset=20):
    graph = helper.make_graph(nodes, "made", inputs, outputs, list(weights))
    path.write_bytes(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9).SerializeToString()
    )


def embed_graph(folder, width):
    save(
        folder / "embed_tokens.onnx", [helper.make_node("Gather", ["table", "input_ids"], ["inputs_embeds"])],
        [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["B", "S"])],
        [helper.make_tensor_value_info("inputs_embeds", TensorProto.FLOAT, ["B", "S", width])],
        [numpy_helper.from_array(np.zeros((400, width), np.float32), "table")],
    )  # fmt: skip


def decoder_graph(
    folder, *, position_rank=2, extra=(), dtype=TensorProto.FLOAT, heads=2, layers=(0, 1), tokens="inputs_embeds"
):
    """Reads nothing of what it is given; only its names, types and shapes matter."""
    past = [f"past_key_values.{layer}.{part}" for layer in layers for part in ("key", "value")]
    present = [name.replace("past_key_values", "present") for name in past]
    positions = [3, "B", "S"] if position_rank == 3 else ["B", "S"]
    nodes = [helper.make_node("Identity", [tokens], ["logits"])]
    nodes += [helper.make_node("Identity", [a], [b]) for a, b in zip(past, present, strict=True)]
    shape = ["B", heads, "P", 12]
    inputs = [
        helper.make_tensor_value_info(tokens, TensorProto.FLOAT, ["B", "S", 48]),
        helper.make_tensor_value_info("position_ids", TensorProto.INT64, positions),
        *(helper.make_tensor_value_info(name, dtype, shape) for name in past),
        *(helper.make_tensor_value_info(name, TensorProto.BOOL, [1]) for name in extra),
    ]
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["B", "S", 48])]
    outputs += [helper.make_tensor_value_info(name, dtype, shape) for name in present]
    save(folder / "decoder_model_merged.onnx", nodes, inputs, outputs)


def vision_graph(folder, shape, dtype=TensorProto.FLOAT, extra=(), opset=20):
    inputs = [helper.make_tensor_value_info("pixel_values", dtype, shape)]
    inputs += [helper.make_tensor_value_info(name, TensorProto.BOOL, ["B", "I", 42, 42]) for name in extra]
    outputs = [helper.make_tensor_value_info("image_features", dtype, ["B", 9, 48])]
    nodes = [helper.make_node("Identity", ["pixel_values"], ["image_features"])]
    save(folder / "vision_encoder.onnx", nodes, inputs, outputs, opset=opset)
