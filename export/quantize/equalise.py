"""Channels between two convolutions brought to one range, so that one scale for all of them fits each.

A convolution makes a channel smaller by a factor, the next one larger by the same (Nagel et al. 2019, "Data-Free
Quantization Through Weight Equalization and Bias Correction", section 4.1, with measured ranges of activations in place
of the first one's weights, whose scale is per channel anyway). What lies between has to let factors through: nothing,
or ReLU. ReLU6 does not, and a bound per channel is nothing that engines join to a convolution: such pairs are left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray

from edge_rsvlm.export.quantize.calibration import Arrays
from edge_rsvlm.export.quantize.layers import attribute
from edge_rsvlm.export.quantize.loaded import Model, array_of, constants, makers, readers, set_array
from edge_rsvlm.export.quantize.ranges import each_run

LEAST = 1e-5


@dataclass(frozen=True)
class _Pair:
    first: onnx.NodeProto
    second: onnx.NodeProto

    @property
    def between(self) -> str:
        """The value whose channels are brought to one range."""
        return str(self.second.input[0])


def equalise(model: Model, layers: Sequence[onnx.NodeProto], calls: Sequence[Arrays]) -> int:
    """Change weights and biases of ``model``, which computes the same as before; returns the number of pairs."""
    pairs = _pairs(model, layers)
    if not pairs:
        return 0
    most: dict[str, NDArray[np.float32]] = {}
    for values in each_run(model, [pair.between for pair in pairs], calls):
        for name, value in values.items():
            now = np.abs(value).max(axis=(0, 2, 3))
            most[name] = np.maximum(most.get(name, now), now)
    for pair in pairs:
        _scale(model, pair, most[pair.between])
    return len(pairs)


def _pairs(model: Model, layers: Sequence[onnx.NodeProto]) -> list[_Pair]:
    made, read, known = makers(model), readers(model), constants(model)
    inside = {node.output[0]: node for node in layers if node.op_type == "Conv" and len(known[node.input[1]].dims) == 4}

    def alone(node: onnx.NodeProto) -> bool:
        """Its weights and its output have one reader."""
        return all(len(read[name]) == 1 for name in (*node.input[1:], node.output[0]) if name)

    found = []
    for second in inside.values():
        before = made.get(second.input[0])
        if before is not None and before.op_type == "Relu" and len(read[before.output[0]]) == 1:
            before = made.get(before.input[0])
        first = None if before is None else inside.get(before.output[0])
        weights_alone = all(len(read[name]) == 1 for name in second.input[1:] if name)
        if first is not None and alone(first) and weights_alone and _groups(second) in (1, _channels(known, first)):
            found.append(_Pair(first, second))
    return found


def _channels(known: dict[str, onnx.TensorProto], node: onnx.NodeProto) -> int:
    return int(known[node.input[1]].dims[0])


def _groups(node: onnx.NodeProto) -> int:
    return int(attribute(node, "group", 1))


def _scale(model: Model, pair: _Pair, most_C: NDArray[np.float32]) -> None:
    known = constants(model)
    second = known[pair.second.input[1]]
    depthwise = _groups(pair.second) > 1
    weight = array_of(second)
    # A depthwise kernel has a scale of its own, whatever its factor; others share the range of their inputs.
    weight_C = np.ones_like(most_C) if depthwise else np.abs(weight).max(axis=(0, 2, 3))
    factors_C = most_C if depthwise else np.sqrt(np.maximum(most_C, LEAST) / np.maximum(weight_C, LEAST))
    factors_C = np.where((most_C > LEAST) & (weight_C > LEAST), factors_C, 1.0)
    factors_C = (factors_C / np.exp(np.log(factors_C).mean())).astype(np.float32)
    for name in pair.first.input[1:]:
        array = array_of(known[name])
        set_array(known[name], array / factors_C.reshape(-1, *[1] * (array.ndim - 1)))
    per_input = factors_C[:, None, None, None] if depthwise else factors_C[None, :, None, None]
    if depthwise and len(weight) != len(factors_C):  # several kernels for one channel
        per_input = np.repeat(per_input, len(weight) // len(factors_C), axis=0)
    set_array(second, weight * per_input)
