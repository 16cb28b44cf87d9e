"""SmoothQuant: what is hard to quantize in activations moves into the weights that multiply them.

Xiao et al. 2023, "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models", section
4: Y = (X / s)(s W) with s = max|X|^a / max|W|^(1-a) per input channel. Division by s goes into the scale of the norm
before products that share their input, which costs nothing. Elsewhere it is a product of its own, and only made where a
channel stands out.

Letters: K inputs, N outputs of a layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from edge_rsvlm.export.quantize.calibration import Arrays
from edge_rsvlm.export.quantize.layers import attribute
from edge_rsvlm.export.quantize.loaded import Model, array_of, constants, drop_unused, infer_types, makers, readers
from edge_rsvlm.export.quantize.ranges import each_run

STANDS_OUT = 10.0
"""Greatest channel against the median one, from where on a product before the layers is worth its time."""
LEAST = 1e-5
NORMS = {"LayerNormalization": (1, 2), "RMSNormalization": (1,), "SimplifiedLayerNormalization": (1,)}
"""Inputs of a norm that its output scales with."""
Group = list[onnx.NodeProto]
F32 = NDArray[np.float32]


def smooth(model: Model, layers: Sequence[onnx.NodeProto], calls: Sequence[Arrays], share: float) -> int:
    """Change norms and weights of ``model``; returns the number of inputs smoothed. ``share`` is the paper's alpha."""
    groups = _groups(model, layers)
    if not groups or share == 0:
        return 0
    most = _greatest(model, list(groups), calls)
    done = 0
    for name, group in groups.items():
        scales_K = _scales(most[name], [_weight_KN(model, node) for node in group], share)
        outlier = most[name].max() / max(float(np.median(most[name])), LEAST)
        if not _fold(model, name, len(group), scales_K):
            if outlier <= STANDS_OUT:
                continue
            _multiply(model, name, group, scales_K)
        _scale_weights(model, group, scales_K)
        done += 1
    drop_unused(model)
    infer_types(model)
    return done


def _groups(model: Model, layers: Sequence[onnx.NodeProto]) -> dict[str, Group]:
    """Products by the name of the input that they share; where a weight has other readers the group is left out."""
    read = readers(model)
    groups: dict[str, Group] = {}
    for node in layers:
        if node.op_type != "Conv":
            groups.setdefault(node.input[0], []).append(node)
    return {name: group for name, group in groups.items() if all(len(read[node.input[1]]) == 1 for node in group)}


def _greatest(model: Model, names: Sequence[str], calls: Sequence[Arrays]) -> dict[str, F32]:
    given = {value.name for value in model.graph.input}
    made = [name for name in names if name not in given]
    most: dict[str, F32] = {}
    for call, values in zip(calls, each_run(model, made, calls), strict=True):
        for name in names:
            value = values[name] if name in values else call[name]
            now = np.abs(value.reshape(-1, value.shape[-1])).max(axis=0, initial=0.0)
            most[name] = np.maximum(most.get(name, now), now)
    return most


def _scales(most_K: F32, weights_KN: Sequence[F32], share: float) -> F32:
    weight_K = np.max([np.abs(weight).max(axis=1) for weight in weights_KN], axis=0)
    scales = np.maximum(most_K, LEAST) ** share / np.maximum(weight_K, LEAST) ** (1 - share)
    return np.where((most_K > 0) & (weight_K > 0), scales, 1.0).astype(np.float32)


def _weight_KN(model: Model, node: onnx.NodeProto) -> F32:
    weight: F32 = array_of(constants(model)[node.input[1]])
    return weight.T if attribute(node, "transB", 0) else weight


def _fold(model: Model, name: str, reading: int, scales_K: F32) -> bool:
    """Divide what the norm multiplies by; False where no norm with constants makes the input for these layers alone."""
    norm, known = makers(model).get(name), constants(model)
    if norm is None or len(readers(model)[name]) != reading:
        return False
    places = [at for at in (0, 1) if norm.input[at] in known] if norm.op_type == "Mul" else NORMS.get(norm.op_type, ())
    tensors = {at: known.get(norm.input[at]) for at in places if at < len(norm.input) and norm.input[at]}
    if not tensors or any(tensor is None or list(tensor.dims) != [len(scales_K)] for tensor in tensors.values()):
        return False
    for at, tensor in tensors.items():
        norm.input[at] = _add(model, f"{name}_smooth_{at}", array_of(tensor) / scales_K)
    return True


def _multiply(model: Model, name: str, group: Group, scales_K: F32) -> None:
    factors, smoothed = _add(model, f"{name}_smooth", 1 / scales_K), f"{name}_smoothed"
    first = min(index for index, node in enumerate(model.graph.node) if node.output[0] == group[0].output[0])
    model.graph.node.insert(first, onnx.helper.make_node("Mul", [name, factors], [smoothed], name=smoothed))
    for node in group:
        node.input[0] = smoothed


def _scale_weights(model: Model, group: Group, scales_K: F32) -> None:
    for node in group:
        weight_KN = _weight_KN(model, node) * scales_K[:, None]
        weight = weight_KN.T if attribute(node, "transB", 0) else weight_KN
        node.input[1] = _add(model, f"{node.input[1]}_smooth", weight)


def _add(model: Model, name: str, values: NDArray[Any]) -> str:
    tensor = onnx.numpy_helper.from_array(np.ascontiguousarray(values, np.float32), name)
    model.graph.initializer.append(tensor)
    return name
