"""Small graphs to quantize, stored as the exporter stores them: in float32, or with half-precision weights behind Cast.

Letters: N images, C channels, H rows, W columns; O outputs, I inputs of a layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import torch
from onnx import TensorProto, helper
from torch import nn

from edge_rsvlm.export.checkpoint.reading import MemoryTensor
from edge_rsvlm.export.families.base import GraphInput, GraphPlan
from edge_rsvlm.export.graphs.external_data import write
from edge_rsvlm.export.graphs.tracing import Traced, Weight, trace
from edge_rsvlm.export.quantize.loaded import array_of, load_wide

OPSET = 20
LEVEL = onnxruntime.GraphOptimizationLevel
SIDE_PX = 32
CONVOLUTIONS = {
    "stem": (16, 3, 3, 3), "widen": (96, 16, 1, 1), "depthwise": (96, 1, 3, 3), "narrow": (16, 96, 1, 1),
    "last": (64, 16, 1, 1),
}  # fmt: skip
"""Weights [O, I, H, W] by the name of their layer."""


def model(nodes, tensors: Mapping[str, Any], inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> onnx.ModelProto:
    ends = [
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in side.items()]
        for side in (inputs, outputs)
    ]
    initializers = [onnx.numpy_helper.from_array(np.asarray(array), name) for name, array in tensors.items()]
    graph = helper.make_graph(nodes, "g", *ends, initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)


def conv_net(seed: int = 0) -> onnx.ModelProto:
    """tiles [N, 3, H, W] -> map [N, 64, H/4, W/4], scores [N, 5]: an inverted residual, as in MobileNetV2."""
    rng = np.random.default_rng(seed)
    tensors = {f"{name}.w": _normal(rng, shape) for name, shape in CONVOLUTIONS.items()}
    tensors |= {f"{name}.b": _normal(rng, shape[:1], 0.3) for name, shape in CONVOLUTIONS.items()}
    tensors |= {"scores.w": _normal(rng, (5, 64)), "scores.b": _normal(rng, (5,), 0.3)}
    tensors |= {"zero": np.float32(0), "six": np.float32(6)}

    def conv(name, given, out, **how):
        return helper.make_node("Conv", [given, f"{name}.w", f"{name}.b"], [out], name=name, **how)

    def relu6(given, out):
        return helper.make_node("Clip", [given, "zero", "six"], [out], name=f"{out}_relu6")

    nodes = [
        conv("stem", "tiles", "a", pads=[1] * 4, strides=[2, 2]), relu6("a", "b"),
        conv("widen", "b", "c"), relu6("c", "d"),
        conv("depthwise", "d", "e", pads=[1] * 4, group=96), relu6("e", "f"),
        conv("narrow", "f", "h"), helper.make_node("Add", ["b", "h"], ["i"], name="residual"),
        helper.make_node("MaxPool", ["i"], ["j"], name="pool", kernel_shape=[2, 2], strides=[2, 2]),
        conv("last", "j", "map"), helper.make_node("GlobalAveragePool", ["map"], ["k"], name="mean"),
        helper.make_node("Flatten", ["k"], ["l"], name="flat"),
        helper.make_node("Gemm", ["l", "scores.w", "scores.b"], ["scores"], name="scores", transB=1),
    ]  # fmt: skip
    outputs = {"map": ["n", 64, "h4", "w4"], "scores": ["n", 5]}
    return model(nodes, tensors, {"tiles": ["n", 3, "h", "w"]}, outputs)


def _normal(rng, shape, scale: float | None = None):
    scale = 1.5 * np.prod(shape[1:]) ** -0.5 if scale is None else scale
    return rng.normal(scale=scale, size=shape).astype(np.float32)


def store(made: onnx.ModelProto, path: Path, precision: str) -> Path:
    """As ``external_data.write`` leaves a traced graph."""
    graph = ir.from_proto(made)
    weights = {t.name: MemoryTensor(torch.from_numpy(onnx.numpy_helper.to_array(t).copy())) for t in _floats(made)}
    write(Traced("g", graph, {name: Weight(name) for name in weights}, {}), weights, path, precision)
    return path


def _floats(made: onnx.ModelProto):
    return [t for t in made.graph.initializer if t.data_type == TensorProto.FLOAT and len(t.dims)]


class Tower(nn.Module):
    """tiles [N, 3, H, W] -> features [N, tokens, width]."""

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, tiles: torch.Tensor) -> torch.Tensor:
        return self.tower(pixel_values=tiles).last_hidden_state


class TracedTower:
    """A vision transformer with random weights, traced as those of CLIP are."""

    def __init__(self, **config: Any) -> None:
        from transformers import CLIPVisionConfig, CLIPVisionModel

        self.config = CLIPVisionConfig(**{"hidden_act": "gelu", **config})
        torch.manual_seed(0)
        self.weights = CLIPVisionModel(self.config).eval().state_dict()
        tiles = GraphInput("tiles", ("batch", 3, self.side_px, self.side_px), torch.float32)
        plan = GraphPlan("tower", Tower, (tiles,), ("features",), {"batch": 2})
        self._traced = trace(CLIPVisionModel, self.config, plan)

    @property
    def side_px(self) -> int:
        return int(self.config.image_size)

    def store(self, path: Path, precision: str) -> Path:
        write(self._traced, {name: MemoryTensor(tensor) for name, tensor in self.weights.items()}, path, precision)
        return path


def tiles(count: int, side_px: int = SIDE_PX, seed: int = 0):
    rng = np.random.default_rng(seed)
    return [{"tiles": rng.normal(size=(1, 3, side_px, side_px)).astype(np.float32)} for _ in range(count)]


def run(path, calls, level=LEVEL.ORT_ENABLE_ALL):
    """Outputs by name, calls stacked."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level, options.intra_op_num_threads, options.log_severity_level = level, 1, 3
    given = path if isinstance(path, bytes) else str(path)
    session = onnxruntime.InferenceSession(given, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    found = [session.run(names, call) for call in calls]
    return {name: np.concatenate([outputs[k] for outputs in found]) for k, name in enumerate(names)}


def loss(found, wanted) -> float:
    """Greatest relative error (Frobenius norm) of an output."""
    return max(float(np.linalg.norm(found[n] - wanted[n]) / np.linalg.norm(wanted[n])) for n in wanted)


def optimized(path, folder):
    """Operators that onnxruntime runs, counted."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(folder / "optimized.onnx"), 3
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [node.op_type for node in onnx.load(options.optimized_model_filepath, load_external_data=False).graph.node]
    return {name: names.count(name) for name in names}


def int8_weights(path):
    """Arrays by name, of matrices and kernels alone."""
    stored = {tensor.name: tensor for tensor in onnx.load(path).graph.initializer}
    return {n: array_of(t) for n, t in stored.items() if t.data_type == TensorProto.INT8 and len(t.dims) > 1}


def chain(relu: bool, seed: int = 0):
    """Three convolutions, the middle one depthwise, whose channels differ a hundredfold; and a last one."""
    rng = np.random.default_rng(seed)
    sizes = {"a": (16, 3, 3, 3), "b": (16, 1, 3, 3), "c": (8, 16, 1, 1), "d": (1, 8, 1, 1)}
    tensors = {f"{n}.w": rng.normal(scale=0.3, size=size).astype(np.float32) for n, size in sizes.items()}
    tensors |= {f"{n}.b": rng.normal(size=size[0]).astype(np.float32) for n, size in sizes.items()}
    tensors["a.w"] *= np.logspace(-1, 1, 16, dtype=np.float32)[:, None, None, None]
    tensors |= {"zero": np.float32(0), "six": np.float32(6)}
    nodes = [helper.make_node("Conv", ["tiles", "a.w", "a.b"], ["ay"], name="a")]
    for name, given, group in (("b", "ay", 16), ("c", "by", 1)):
        bounds = [] if relu else ["zero", "six"]
        nodes.append(helper.make_node("Relu" if relu else "Clip", [given, *bounds], [f"{name}x"], name=f"{name}x"))
        nodes.append(
            helper.make_node("Conv", [f"{name}x", f"{name}.w", f"{name}.b"], [f"{name}y"], name=name, group=group)
        )
    nodes.append(helper.make_node("Conv", ["cy", "d.w", "d.b"], ["dy"], name="d"))
    return model(nodes, tensors, {"tiles": [1, 3, "h", "w"]}, {"dy": [1, 1, "h1", "w1"]})


def opened(made, path):
    onnx.save(made, path)
    return load_wide(path)
