"""Dynamic INT8: weights in 8 bits, and ranges of activations measured while the graph runs.

Only products with a constant matrix take part. No calibration, and each input has the range that suits it; a
convolution computed this way is several times slower than in float32, so convolutions are left alone.
"""

from __future__ import annotations

from pathlib import Path

from onnxruntime.quantization import QuantType
from onnxruntime.quantization.onnx_quantizer import ONNXQuantizer
from onnxruntime.quantization.quant_utils import QuantizationMode

from edge_rsvlm.export.quantize.chosen import choose_nodes
from edge_rsvlm.export.quantize.loaded import load_wide
from edge_rsvlm.export.quantize.settings import Int8
from edge_rsvlm.export.quantize.stored import store

Metrics = dict[str, float | int | str]


def quantize_dynamic(graph: Path, settings: Int8, out: Path) -> Metrics:
    """Write ``out`` (and ``OUT_STEM.int8.data`` where it is large). Weights are symmetric, one scale per output."""
    model = load_wide(graph)
    chosen = choose_nodes(model, settings.keep)
    layers = [node for node in chosen.layers if node.op_type != "Conv"]
    wanted = [name for node in layers for name in (node.name, f"{node.name}_MatMul")]  # a Gemm becomes MatMul and Add
    metrics: Metrics = {"quantized layers": len(layers), "kept layers": chosen.kept}
    if layers:  # an empty list would mean every node
        quantizer = ONNXQuantizer(
            model, True, False, QuantizationMode.IntegerOps, False, QuantType.QInt8, QuantType.QUInt8, None, wanted, [],
            ["MatMul"], {"MatMulConstBOnly": True},
        )  # fmt: skip
        model = quantizer.quantize_model()
    return metrics | {"bytes": store([(model, out)], f"{out.stem}.int8.data")}
