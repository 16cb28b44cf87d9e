"""Static INT8 as Q/DQ graphs: weights and activations in 8 bits, by ranges that calibration found.

Two flavours from one calibration and one set of int8 weights. ONNX Runtime's kernels for x86 want unsigned activations
and signed weights (U8S8; S8S8 products are many times slower there), TensorRT takes symmetric signed ones alone (S8S8,
zero point 0) and no quantized bias.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

from onnx import NodeProto
from onnxruntime.quantization import QuantType
from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

from edge_rsvlm.export.quantize.calibration import Arrays
from edge_rsvlm.export.quantize.chosen import LAYERS, Chosen, choose_nodes
from edge_rsvlm.export.quantize.equalise import equalise
from edge_rsvlm.export.quantize.loaded import Model, drop_unused, load_wide
from edge_rsvlm.export.quantize.norms import fold_norms
from edge_rsvlm.export.quantize.padding import fold_padding
from edge_rsvlm.export.quantize.ranges import Ranges, find_ranges
from edge_rsvlm.export.quantize.rounding import Scales, round_convolutions
from edge_rsvlm.export.quantize.settings import Int8
from edge_rsvlm.export.quantize.smooth import smooth
from edge_rsvlm.export.quantize.stored import copied, store
from edge_rsvlm.export.quantize.typed import halved

Metrics = dict[str, float | int | str]
CALLS = 96
"""Of a graph, from which ranges and roundings are found: more change little."""
WEIGHT_SUFFIX, SCALE_SUFFIX = "_quantized", "_scale"
"""What onnxruntime calls the numbers of a weight and their scales."""


def quantize_static(
    graph: Path, samples: Sequence[Arrays], settings: Int8, out: Path, tensorrt: Path | None
) -> Metrics:
    """Write ``out`` for ONNX Runtime and, where it is wanted, ``tensorrt``, with what is not in 8 bits in half
    precision there. Both then share their weights, ``OUT_STEM.int8.data``.

    ``samples`` are inputs by their names in the graph.
    """
    model = load_wide(graph)
    fold_padding(model)
    fold_norms(model)
    chosen = choose_nodes(model, settings.keep)
    samples = _Spread(samples)
    metrics: Metrics = {"quantized layers": len(chosen.layers), "kept layers": chosen.kept}
    if settings.smooth:
        metrics["smoothed inputs"] = smooth(model, chosen.layers, samples, settings.smooth)
    if settings.equalise:
        metrics["equalised pairs"] = equalise(model, chosen.layers, samples)
    tensors = {name for node in chosen.nodes for name in (*node.input, *node.output)}
    ranges = find_ranges(model, tensors, samples, settings)
    scales = round_convolutions(model, chosen.layers, samples)
    drop_unused(model)
    unsigned = _unsigned(model, chosen, ranges, scales)
    models = [(unsigned, out)]
    if tensorrt is not None:
        signed = _signed(model, chosen, ranges, scales)
        _take_weights(chosen, unsigned, signed)
        models.append((halved(signed), tensorrt))
    return metrics | {"bytes": store(models, f"{out.stem}.int8.data")}


@dataclass(frozen=True)
class _Spread(Sequence[Arrays]):
    """CALLS of ``calls`` at most, as far apart as they can be; still read when they are asked for."""

    calls: Sequence[Arrays]

    def __len__(self) -> int:
        return min(len(self.calls), CALLS)

    @overload
    def __getitem__(self, index: int) -> Arrays: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Arrays]: ...
    def __getitem__(self, index: int | slice) -> Arrays | Sequence[Arrays]:
        if isinstance(index, slice):
            return [self[place] for place in range(len(self))[index]]
        if index >= len(self):
            raise IndexError(index)
        return self.calls[index * len(self.calls) // len(self)]


def _unsigned(model: Model, chosen: Chosen, ranges: Ranges, scales: Scales) -> Model:
    """U8S8. Clip and ReLU go where the range says the same, biases of convolutions are 32-bit integers.

    Results of matrix products go on in float32: what follows them (a bias, GELU, a residual) is computed in it.
    """
    options = _options(scales) | {"OpTypesToExcludeOutputQuantization": ["MatMul", "Gemm"]}
    return _quantize(model, chosen.nodes, ranges, QuantType.QUInt8, options)


def _signed(model: Model, chosen: Chosen, ranges: Ranges, scales: Scales) -> Model:
    """S8S8. Inputs of layers alone are quantized: TensorRT fuses what follows a layer, and wants nothing in between."""
    only = {
        "ActivationSymmetric": True, "QuantizeBias": False, "OpTypesToExcludeOutputQuantization": list(LAYERS),
    }  # fmt: skip
    return _quantize(model, chosen.layers, ranges, QuantType.QInt8, _options(scales) | only)


def _options(scales: Scales) -> dict[str, Any]:
    given = {
        name: [{"axis": 0, "quant_type": QuantType.QInt8, "scale": scale, "zero_point": 0} for scale in scales_O]
        for name, scales_O in scales.items()
    }
    return {"WeightSymmetric": True, "TensorQuantOverrides": given}


def _quantize(
    model: Model, nodes: Sequence[NodeProto], ranges: Ranges, kind: QuantType, options: dict[str, Any]
) -> Model:
    if not nodes:  # an empty list would mean every node
        return copied(model)
    names, types = [node.name for node in nodes], list({node.op_type for node in nodes})
    quantizer = QDQQuantizer(
        copied(model), True, False, QuantType.QInt8, kind, dict(ranges), names, [], types, options
    )  # fmt: skip
    found: Model = quantizer.quantize_model()
    return found


def _take_weights(chosen: Chosen, source: Model, target: Model) -> None:
    """Int8 weights and their scales from ``source``: it may have widened a scale so that a bias fits 32 bits."""
    stored = {tensor.name: tensor for tensor in source.graph.initializer}
    names = {f"{node.input[1]}{suffix}" for node in chosen.layers for suffix in (WEIGHT_SUFFIX, SCALE_SUFFIX)}
    for tensor in target.graph.initializer:
        if tensor.name in names:
            tensor.CopyFrom(stored[tensor.name])
