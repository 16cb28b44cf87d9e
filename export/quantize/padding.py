"""Padding of zeros that convolutions do themselves: a Pad of its own is a pass over the whole map, in float32."""

from __future__ import annotations

from collections.abc import Mapping

from onnx import NodeProto, TensorProto, helper

from edge_rsvlm.export.quantize.layers import attribute
from edge_rsvlm.export.quantize.loaded import Model, array_of, constants, drop_unused, readers


def fold_padding(model: Model) -> int:
    """Move zeros that a Pad puts around images into the convolutions that read it; returns how many it moved.

    Padding at the far side alone, as TensorFlow's 'SAME' has at stride 2, comes out of an export as such a node.
    """
    known = constants(model)
    pads = {node.output[0]: node for node in model.graph.node if node.op_type == "Pad"}
    ends = {value.name for value in model.graph.output}
    moved = 0
    for conv in model.graph.node:
        pad = pads.get(conv.input[0]) if conv.op_type == "Conv" else None
        around = None if pad is None else _zeros_around(pad, known)
        if pad is None or around is None or attribute(conv, "auto_pad", b"NOTSET") != b"NOTSET":
            continue
        own = attribute(conv, "pads", [0] * len(around))
        kept = [given for given in conv.attribute if given.name != "pads"]
        del conv.attribute[:]
        conv.attribute.extend([*kept, helper.make_attribute("pads", [a + b for a, b in zip(own, around, strict=True)])])
        conv.input[0] = pad.input[0]
        moved += 1
    read = readers(model)
    idle = [node for name, node in pads.items() if name not in read and name not in ends]
    for node in idle:
        model.graph.node.remove(node)
    if idle:
        drop_unused(model)
    return moved


def _zeros_around(pad: NodeProto, known: Mapping[str, TensorProto]) -> list[int] | None:
    """Zeros before and after each axis of the image, as Conv has them; None where it is another padding."""
    given = [*pad.input, "", ""]
    pads, value, axes = given[1], given[2], given[3]
    constant = attribute(pad, "mode", b"constant") == b"constant"
    if not constant or axes or pads not in known or (value and not _is_zero(known.get(value))):
        return None
    before, after = array_of(known[pads]).reshape(2, -1).tolist()
    if any(before[:2] + after[:2]) or min(before + after) < 0:
        return None
    return [*before[2:], *after[2:]]


def _is_zero(tensor: TensorProto | None) -> bool:
    return tensor is not None and not array_of(tensor).any()
