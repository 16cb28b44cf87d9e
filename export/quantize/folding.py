"""Activations divided by scales before the layers that read them: in the norm that makes them where that is exact."""

from __future__ import annotations

import numpy as np
import onnx
from numpy.typing import NDArray

from edge_rsvlm.export.quantize.layers import Group
from edge_rsvlm.export.quantize.rewriting import Rewriting
from edge_rsvlm.export.quantize.stream import Stream

Scales = NDArray[np.float32]
NORMS = {"LayerNormalization": (1, 2), "RMSNormalization": (1,), "SimplifiedLayerNormalization": (1,)}
"""Inputs that scale with the output."""


def divide_before(work: Rewriting, group: Group, scales_K: Scales, stream: Stream) -> str:
    """Name of the value that the layers of ``group`` have to read from now on."""
    name = group.input
    if work.readers(name) == len(group.layers) and _fold(work, name, scales_K, stream.dtype(name)):
        stream.divide(name, scales_K)  # the samples have passed the norm already
        return name
    factors = work.add_tensor(f"{name}_awq_factors", (1 / scales_K).astype(stream.dtype(name)))
    multiply = onnx.helper.make_node("Mul", [name, factors], [f"{name}_awq"], name=f"{name}_awq")
    work.insert_before(group.layers[0].node, multiply)
    return f"{name}_awq"


def _fold(work: Rewriting, name: str, scales_K: Scales, dtype: np.dtype[np.generic]) -> bool:
    """Divide what the node that makes ``name`` multiplies by; False where it multiplies by no constant."""
    node = work.maker(name)
    if node is None:
        return False
    places = [place for place in _places(node, work) if place < len(node.input) and node.input[place]]
    values = [work.constants.value(node.input[place], work.tensors) for place in places]
    if not places or not all(_is_vector(value, len(scales_K)) for value in values):
        return False
    divided = onnx.NodeProto()
    divided.CopyFrom(node)
    for place, value in zip(places, values, strict=True):
        assert value is not None
        array = (np.asarray(value, np.float32) / scales_K).astype(dtype)
        divided.input[place] = work.add_tensor(f"{name}_awq_{place}", array)
    work.replace(node, [divided])
    return True


def _places(node: onnx.NodeProto, work: Rewriting) -> tuple[int, ...]:
    if node.op_type == "Mul":
        return tuple(place for place in (0, 1) if work.constants.holds(node.input[place]))
    return NORMS.get(node.op_type, ())


def _is_vector(value: NDArray[np.generic] | None, size: int) -> bool:
    return value is not None and value.size == size == value.shape[-1]
