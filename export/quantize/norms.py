"""Batch norms computed by the convolutions before them: in between, values would be rounded to 8 bits for nothing.

Source: Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
Inference", section 3.2. Letters: O channels of the result.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from onnx import NodeProto, TensorProto, numpy_helper

from edge_rsvlm.export.quantize.layers import attribute
from edge_rsvlm.export.quantize.loaded import Model, array_of, constants, drop_unused, makers, readers, set_array


def fold_norms(model: Model) -> int:
    """Scale the weights of convolutions whose result a batch norm alone reads; returns how many norms went."""
    known, made, read = constants(model), makers(model), readers(model)
    folded = []
    for norm in model.graph.node:
        conv = made.get(norm.input[0]) if norm.op_type == "BatchNormalization" else None
        if conv is None or conv.op_type != "Conv" or len(read[conv.output[0]]) != 1:
            continue
        fixed = [*norm.input[1:], *conv.input[1:]]
        if attribute(norm, "training_mode", 0) or not known.keys() >= set(fixed) or len(read[conv.input[1]]) != 1:
            continue
        _fold(model, conv, norm, known)
        folded.append(norm)
    for norm in folded:
        model.graph.node.remove(norm)
    if folded:
        drop_unused(model)
    return len(folded)


def _fold(model: Model, conv: NodeProto, norm: NodeProto, known: Mapping[str, TensorProto]) -> None:
    scale_O, shift_O, mean_O, variance_O = (array_of(known[name]).astype(np.float64) for name in norm.input[1:])
    gain_O = scale_O / np.sqrt(variance_O + attribute(norm, "epsilon", 1e-5))
    weight = array_of(known[conv.input[1]])
    bias_O = array_of(known[conv.input[2]]) if len(conv.input) > 2 else np.zeros(len(weight))
    gain = gain_O.reshape(-1, *[1] * (weight.ndim - 1))
    set_array(known[conv.input[1]], (weight * gain).astype(weight.dtype))
    name = f"{norm.output[0]}_shift"
    shifted_O = ((bias_O - mean_O) * gain_O + shift_O).astype(weight.dtype)
    model.graph.initializer.append(numpy_helper.from_array(shifted_O, name))
    del conv.input[2:]
    conv.input.append(name)
    conv.output[0] = norm.output[0]
