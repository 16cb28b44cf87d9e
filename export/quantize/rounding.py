"""Weights of convolutions rounded so that what they compute stays, on average and in its spread.

Rounding to the nearest shifts the mean of a channel: inputs behind a ReLU are positive and alike, so that errors of a
kernel add up, and a depthwise kernel has nine weights to average them over. The shift goes into the bias (Nagel et al.
2019, "Data-Free Quantization Through Weight Equalization and Bias Correction", section 4.2, from measured means), and
the weights are rounded one after another so that those to come make up for those before (GPTQ, see ``gptq``), by the
covariance of the patches that a kernel sees.

Every static graph is rounded so; it stands in for a training of the rounded graph, needs no labels, and takes about as
long as finding the ranges. Of the packaged encoder in INT8, 1 - cosine over its five maps is 0.0225 to the nearest,
0.0042 with the biases shifted and 0.0035 with both. What is left comes from the activations.

Letters: G groups, O outputs of a group, K weights of an output, P patches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray

from edge_rsvlm.export.quantize.calibration import Arrays
from edge_rsvlm.export.quantize.gptq import gptq
from edge_rsvlm.export.quantize.layers import attribute
from edge_rsvlm.export.quantize.loaded import Model, array_of, constants, readers, set_array
from edge_rsvlm.export.quantize.ranges import each_run
from edge_rsvlm.export.quantize.rtn import Grid

PATCHES = 2048
"""Of one call, at places drawn by chance."""
BITS, HALF, MOST = 8, 128, 127
Scales = dict[str, NDArray[np.float32]]
F64 = NDArray[np.float64]


@dataclass
class _Moments:
    sum_GK: F64
    products_GKK: F64
    count: int = 0

    def add(self, patches_GKP: NDArray[np.float32]) -> None:
        self.sum_GK += patches_GKP.sum(-1)
        self.products_GKK += patches_GKP @ patches_GKP.transpose(0, 2, 1)
        self.count += patches_GKP.shape[-1]

    @property
    def mean_GK(self) -> F64:
        return self.sum_GK / self.count

    @property
    def covariance_GKK(self) -> F64:
        return self.products_GKK / self.count - self.mean_GK[:, :, None] * self.mean_GK[:, None, :]


@dataclass(frozen=True)
class _Convolution:
    node: onnx.NodeProto
    weight_OCHW: NDArray[np.float32]

    @property
    def groups(self) -> int:
        return int(attribute(self.node, "group", 1))

    @property
    def weight_GOK(self) -> NDArray[np.float32]:
        outputs = self.weight_OCHW.shape[0]
        return self.weight_OCHW.reshape(self.groups, outputs // self.groups, -1)

    def patches(self, input_NCHW: NDArray[np.float32]) -> NDArray[np.float32]:
        """Some of what the kernel sees [G, K, P]."""
        kernel = self.weight_OCHW.shape[2:]
        strides, dilations = (attribute(self.node, name, [1, 1]) for name in ("strides", "dilations"))
        top, left, bottom, right = attribute(self.node, "pads", [0, 0, 0, 0])
        padded = np.pad(input_NCHW, ((0, 0), (0, 0), (top, bottom), (left, right)))
        reach = [(size - 1) * step + 1 for size, step in zip(kernel, dilations, strict=True)]
        sizes = [(padded.shape[2 + k] - reach[k]) // strides[k] + 1 for k in (0, 1)]
        count = len(padded) * sizes[0] * sizes[1]
        places = np.random.default_rng(0).choice(count, min(count, PATCHES), replace=False)
        image, row, col = np.unravel_index(places, (len(padded), *sizes))
        steps = np.array(list(product(*(range(size) for size in kernel)))) * dilations
        rows, cols = row[:, None] * strides[0] + steps[:, 0], col[:, None] * strides[1] + steps[:, 1]
        patches_PKC = padded[image[:, None], :, rows, cols]
        return np.ascontiguousarray(patches_PKC.transpose(2, 1, 0)).reshape(self.groups, -1, len(places))


def round_convolutions(model: Model, nodes: Sequence[onnx.NodeProto], calls: Sequence[Arrays]) -> Scales:
    """Replace weights and biases of the convolutions among ``nodes`` in ``model``.

    Returns the scale of each output by the name of the weight, which is whole numbers from -128 to 127 times it. What
    is no plain two-dimensional convolution, or has weights that others share, is left as it is.
    """
    known, read = constants(model), readers(model)
    plain = [node for node in nodes if _is_plain(node, known) and len(read[node.input[1]]) == 1]
    found = [_Convolution(node, array_of(known[node.input[1]])) for node in plain]
    moments = _observe(model, found, calls) if found else {}
    scales: Scales = {}
    for conv in found:
        seen = moments[conv.node.output[0]]
        scales_O = _scales(conv.weight_OCHW)
        rounded_GOK = _round(conv.weight_GOK, scales_O, seen.covariance_GKK)
        _shift_bias(model, conv.node, ((conv.weight_GOK - rounded_GOK) @ seen.mean_GK[:, :, None]).reshape(-1))
        set_array(known[conv.node.input[1]], rounded_GOK.reshape(conv.weight_OCHW.shape).astype(np.float32))
        scales[conv.node.input[1]] = scales_O
    return scales


def _is_plain(node: onnx.NodeProto, known: dict[str, Any]) -> bool:
    return (
        node.op_type == "Conv"
        and len(known[node.input[1]].dims) == 4
        and attribute(node, "auto_pad", b"NOTSET") == b"NOTSET"
    )


def _observe(model: Model, found: Sequence[_Convolution], calls: Sequence[Arrays]) -> dict[str, _Moments]:
    moments = {}
    for conv in found:
        groups, _, size = conv.weight_GOK.shape
        moments[conv.node.output[0]] = _Moments(np.zeros((groups, size)), np.zeros((groups, size, size)))
    given = {value.name for value in model.graph.input}
    made = {conv.node.input[0] for conv in found} - given
    for call, values in zip(calls, each_run(model, sorted(made), calls), strict=True):
        for conv in found:
            name = conv.node.input[0]
            moments[conv.node.output[0]].add(conv.patches(values[name] if name in made else call[name]))
    return moments


def _scales(weight_OCHW: NDArray[np.float32]) -> NDArray[np.float32]:
    most_O = np.abs(weight_OCHW).reshape(len(weight_OCHW), -1).max(axis=1)
    least = most_O[most_O > 0].min(initial=1.0)
    return (np.where(most_O > 0, most_O, least) / MOST).astype(np.float32)


def _round(weight_GOK: NDArray[np.float32], scales_O: NDArray[np.float32], covariance_GKK: F64) -> F64:
    rounded = []
    scales_GO1 = torch.from_numpy(scales_O.astype(np.float64)).reshape(*weight_GOK.shape[:2], 1)
    for weight_OK, scales_O1, covariance_KK in zip(weight_GOK, scales_GO1, covariance_GKK, strict=True):
        grid = Grid(scales_O1, torch.full_like(scales_O1, HALF), weight_OK.shape[1], BITS, symmetric=True)
        numbers_OK = gptq(torch.from_numpy(weight_OK.astype(np.float64)), torch.from_numpy(covariance_KK), grid)
        rounded.append(((numbers_OK - HALF) * scales_O1).numpy())
    return np.stack(rounded)


def _shift_bias(model: Model, node: onnx.NodeProto, shift_O: F64) -> None:
    """A bias of the node's own: others may share the old one."""
    before = array_of(constants(model)[node.input[2]]) if len(node.input) > 2 and node.input[2] else 0.0
    bias = onnx.numpy_helper.from_array((before + shift_O).astype(np.float32), f"{node.name}_shifted_bias")
    model.graph.initializer.append(bias)
    del node.input[2:]
    node.input.append(bias.name)
