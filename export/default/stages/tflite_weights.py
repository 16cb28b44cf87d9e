"""Read the convolutions of a quantised TFLite file as float tensors, in execution order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import tflite
import torch
from torch import Tensor

DTYPES = {tflite.TensorType.INT8: np.int8, tflite.TensorType.INT32: np.int32, tflite.TensorType.UINT8: np.uint8}


def dequantised(model: Any, graph: Any, index: int, channel_axis: int) -> np.ndarray:
    """Tensor `index` as float32: (stored - zero point) * scale, per tensor or per channel."""
    tensor = graph.Tensors(index)
    raw = model.Buffers(tensor.Buffer()).DataAsNumpy()
    shape = [int(n) for n in tensor.ShapeAsNumpy()]
    stored = np.frombuffer(raw.tobytes(), DTYPES[tensor.Type()]).reshape(shape).astype(np.float64)
    scale = np.atleast_1d(tensor.Quantization().ScaleAsNumpy()).astype(np.float64)
    zero = np.atleast_1d(tensor.Quantization().ZeroPointAsNumpy()).astype(np.float64)
    broadcast = [1] * len(shape)
    if scale.size > 1:
        broadcast[channel_axis] = scale.size
    return np.asarray(
        (stored - zero.reshape(broadcast if zero.size > 1 else [1] * len(shape))) * scale.reshape(broadcast)
    )


def convolutions(path: Path) -> list[tuple[Tensor, Tensor]]:
    """(kernel [C_out, C_in/groups, kH, kW], bias [C_out]) of each convolution in the file, in execution order."""
    model = tflite.Model.GetRootAsModel(path.read_bytes(), 0)
    graph = model.Subgraphs(0)
    found: list[tuple[Tensor, Tensor]] = []
    for i in range(graph.OperatorsLength()):
        op = graph.Operators(i)
        code_table = model.OperatorCodes(op.OpcodeIndex())
        code = max(code_table.BuiltinCode(), code_table.DeprecatedBuiltinCode())
        if code not in (tflite.BuiltinOperator.CONV_2D, tflite.BuiltinOperator.DEPTHWISE_CONV_2D):
            continue
        depthwise = code == tflite.BuiltinOperator.DEPTHWISE_CONV_2D
        _, weight_index, bias_index = (int(n) for n in op.InputsAsNumpy())
        kernel = dequantised(model, graph, weight_index, channel_axis=3 if depthwise else 0)
        # TFLite stores OHWI, and 1HWC for depthwise; torch wants OIHW and C1HW.
        kernel = kernel.transpose(3, 0, 1, 2) if depthwise else kernel.transpose(0, 3, 1, 2)
        bias = dequantised(model, graph, bias_index, channel_axis=0)
        found.append((torch.from_numpy(kernel.copy()).float(), torch.from_numpy(bias).float()))
    return found
