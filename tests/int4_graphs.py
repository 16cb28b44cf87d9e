"""Small graphs of matrix products to store in 4 bits, and what they are fed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnx import TensorProto, helper, numpy_helper

from edge_rsvlm.export.quantize.layers import attribute
from edge_rsvlm.export.quantize.nbits import Blocks, unpack

FLOAT, HALF = TensorProto.FLOAT, TensorProto.FLOAT16
WIDTH = 64


def session(model):
    chosen = ort.SessionOptions()
    chosen.log_severity_level = 3
    source = model.SerializeToString() if isinstance(model, onnx.ModelProto) else str(model)
    return ort.InferenceSession(source, chosen, providers=["CPUExecutionProvider"])


def run(model, x):
    return session(model).run(None, {"x": x})[0]


def correlated(rows: int, width: int, seed: int = 0):
    """Inputs along a few directions, the same for every seed, as activations are, and a little of all others."""
    rng, directions = np.random.default_rng(seed), np.random.default_rng(7).normal(size=(width // 8, width))
    few = rng.normal(size=(rows, width // 8)) @ directions
    return (few + 0.3 * rng.normal(size=(rows, width))).astype(np.float32)


def hessian_of(x):
    rows = torch.from_numpy(x)
    return rows.T @ rows / len(rows)


def normal(*shape: int, seed: int = 0):
    return (np.random.default_rng(seed).normal(size=shape) / shape[-1] ** 0.5).astype(np.float32)


def saved(path: Path, nodes, arrays, width=WIDTH, outputs=("y",), type_=FLOAT, rank=2, external=False):
    held = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", type_, ["n", width])],
        [helper.make_tensor_value_info(name, type_, [None] * rank) for name in outputs], held,
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, path, save_as_external_data=external, location=f"{path.name}.data", size_threshold=1024)
    return path


def perceptron(path: Path, stored=np.float32, **options) -> Path:
    """Norm -> two layers that share it, one with a bias -> their product -> a third layer."""
    arrays = {
        "gamma": np.linspace(0.5, 2, WIDTH, dtype=np.float32),
        "beta": np.linspace(-1, 1, WIDTH, dtype=np.float32),
        "up": normal(WIDTH, 96, seed=1).astype(stored), "gate": normal(96, WIDTH, seed=2).astype(stored),
        "bias": np.linspace(-1, 1, 96, dtype=np.float32), "down": normal(96, 48, seed=3).astype(stored),
    }  # fmt: skip
    wide = {name: name for name in ("up", "gate", "down")}
    casts = []
    if stored != np.float32:
        wide = {name: f"{name}_f32" for name in wide}
        casts = [helper.make_node("Cast", [name], [to], name=to, to=FLOAT) for name, to in wide.items()]
    nodes = [
        *casts,
        helper.make_node("LayerNormalization", ["x", "gamma", "beta"], ["normed"], name="norm"),
        helper.make_node("MatMul", ["normed", wide["up"]], ["a"], name="up_product"),
        helper.make_node("Gemm", ["normed", wide["gate"], "bias"], ["b"], name="gate_product", transB=1),
        helper.make_node("Mul", ["a", "b"], ["c"], name="mul"),
        helper.make_node("MatMul", ["c", wide["down"]], ["y"], name="down_product"),
    ]
    return saved(path, nodes, arrays, **options)


def samples(count: int = 6, rows: int = 40):
    return [{"x": correlated(rows, WIDTH, seed)} for seed in range(count)]


def relative(found, wanted) -> float:
    return float(np.linalg.norm(found.astype(np.float32) - wanted) / np.linalg.norm(wanted))


def layers_of(path: Path) -> dict[str, Blocks]:
    """The MatMulNBits layers of a written graph, by output."""
    graph = onnx.load(path).graph
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Cast" and node.input[0] in arrays:
            arrays[node.output[0]] = arrays[node.input[0]]
    found = {}
    for node in graph.node:
        if node.op_type == "MatMulNBits":
            numbers, scales, zeros = [*(arrays[name] for name in node.input[1:]), None][:3]
            found[node.output[0]] = unpack(
                numbers, scales.reshape(attribute(node, "N"), -1), zeros, attribute(node, "K"), attribute(node, "bits")
            )
    return found
