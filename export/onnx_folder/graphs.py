"""Reading ONNX graphs without their weights, cutting parts out of them, and nodes put in front.

Tensors kept in other files stay there: what is cut out or put in front of refers to them as before.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper

from edge_rsvlm.errors import InputError, UsageError

LEAST_OPSET = 13
"""Of a graph that gets nodes in front: older ones write some operators in another way."""
TILES = "tiles"


@dataclass(frozen=True)
class Tensor:
    """An input or output; a dimension is a size, or None where the graph leaves it open."""

    name: str
    dtype: int
    shape: tuple[int | None, ...] | None


def load(path: Path) -> ModelProto:
    """The graph, its external tensors not read; InputError for a file that is no ONNX model."""
    try:
        model = onnx.load(str(path), load_external_data=False)
    except (OSError, DecodeError) as exc:
        raise InputError(f"{path}: not an ONNX file ({exc})", fix="copy or download the file again") from exc
    if not model.graph.node:
        raise InputError(f"{path}: not an ONNX file (no nodes)", fix="copy or download the file again")
    return model


def inputs_of(model: ModelProto) -> dict[str, Tensor]:
    """What a caller must give: old graphs list their weights among the inputs too."""
    weights = {tensor.name for tensor in model.graph.initializer}
    return {value.name: _tensor(value) for value in model.graph.input if value.name not in weights}


def outputs_of(model: ModelProto) -> dict[str, Tensor]:
    return {value.name: _tensor(value) for value in model.graph.output}


def _tensor(value: ValueInfoProto) -> Tensor:
    kind = value.type.tensor_type
    sizes = [dim.dim_value if dim.HasField("dim_value") else None for dim in kind.shape.dim]
    return Tensor(value.name, kind.elem_type, tuple(sizes) if kind.HasField("shape") else None)


def cut(model: ModelProto, outputs: Sequence[str]) -> ModelProto:
    """The part of ``model`` that computes ``outputs``, with the inputs and the weights that it needs."""
    maker = {name: node for node in model.graph.node for name in node.output}
    needed, todo = {""}, list(outputs)
    while todo:
        name = todo.pop()
        if name not in needed:
            needed.add(name)
            todo += _reads(maker[name]) if name in maker else []
    part = ModelProto(ir_version=model.ir_version, producer_name=model.producer_name)
    part.opset_import.extend(model.opset_import)
    part.functions.extend(model.functions)
    part.graph.name = model.graph.name
    part.graph.node.extend(node for node in model.graph.node if needed.intersection(filter(None, node.output)))
    part.graph.initializer.extend(tensor for tensor in model.graph.initializer if tensor.name in needed)
    part.graph.input.extend(value for value in model.graph.input if value.name in needed)
    part.graph.output.extend(value for value in model.graph.output if value.name in outputs)
    return part


def _reads(node: NodeProto) -> list[str]:
    """Names that a node reads, those that its subgraphs take from outside included."""
    names = list(node.input)
    for inner in _subgraphs(node.attribute):
        for below in inner.node:
            names += _reads(below)
        names += [value.name for value in inner.output]
    return names


def _subgraphs(attributes: Iterable[AttributeProto]) -> list[GraphProto]:
    return [graph for attribute in attributes for graph in (attribute.g, *attribute.graphs) if graph.node]


def put_in_front(
    model: ModelProto, nodes: Sequence[NodeProto], constants: Sequence[TensorProto], made: Sequence[str], where: Path
) -> ModelProto:
    """``model`` with the one input ``tiles`` [N, 3, H, W], from which ``nodes`` compute the inputs ``made``."""
    opset = next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 0)
    if opset < LEAST_OPSET:
        raise UsageError(f"{where}: written in ONNX opset {opset}", fix=f"export it with opset {LEAST_OPSET} or later")
    fronted = ModelProto()
    fronted.CopyFrom(model)
    graph = fronted.graph
    old_nodes, old_inputs = list(graph.node), [value for value in graph.input if value.name not in made]
    del graph.node[:], graph.input[:]
    graph.node.extend([*nodes, *old_nodes])
    graph.input.extend([helper.make_tensor_value_info(TILES, TensorProto.FLOAT, ["N", 3, "H", "W"]), *old_inputs])
    graph.initializer.extend(constants)
    return fronted


def masked_single_images(pixels: str, mask: Tensor | None) -> tuple[list[NodeProto], list[TensorProto]]:
    """tiles [N, 3, H, W] -> ``pixels`` [N, 1, 3, H, W]: one image per conversation, and a ``mask`` [N, 1, H, W] that
    hides nothing."""
    nodes = [helper.make_node("Unsqueeze", [TILES, "front.axis"], [pixels])]
    constants = [helper.make_tensor("front.axis", TensorProto.INT64, [1], [1])]
    if mask is not None:
        nodes += [
            helper.make_node("Gather", [pixels, "front.first"], ["front.channel"], axis=2),
            helper.make_node("Equal", ["front.channel", "front.channel"], ["front.seen"]),
            helper.make_node("Cast", ["front.seen"], [mask.name], to=mask.dtype),
        ]
        constants.append(helper.make_tensor("front.first", TensorProto.INT64, [], [0]))
    return nodes, constants


def patches(
    pixels: str, grid: str, patch_px: int, merge: int, frames: int
) -> tuple[list[NodeProto], list[TensorProto]]:
    """tiles [N, 3, H, W] -> ``pixels`` [patches, 3 * frames * patch * patch] and ``grid`` [N, 3] of (1, rows, columns).

    As Qwen2-VL's image processor lays them out: the merge x merge patches of one visual token follow each other, tokens
    in raster order, and a still image is the same frame over and over.
    """
    lengths = {
        "zero": [0], "one": [1], "sides": [2, 3], "two": [2], "three": [3], "patch": [patch_px],
        "block": [patch_px * merge], "square": [merge, patch_px], "flat": [-1, 3, 1, patch_px * patch_px],
        "row": [-1, 3 * frames * patch_px * patch_px],
    }  # fmt: skip
    constants = [
        helper.make_tensor(f"front.{name}", TensorProto.INT64, [len(values)], values)
        for name, values in lengths.items()
    ]
    steps: list[tuple[str, list[str], str, dict[str, object]]] = [
        ("Shape", [TILES], "shape", {}),
        ("Gather", ["shape", "zero"], "count", {}),
        ("Gather", ["shape", "sides"], "hw", {}),
        ("Div", ["hw", "block"], "blocks", {}),
        ("Gather", ["blocks", "zero"], "down", {}),
        ("Gather", ["blocks", "one"], "across", {}),
        ("Concat", ["count", "three", "down", "square", "across", "square"], "split", {"axis": 0}),
        ("Reshape", [TILES, "split"], "parts", {}),  # N, channel, down, merge, patch, across, merge, patch
        ("Transpose", ["parts"], "ordered", {"perm": [0, 2, 5, 3, 6, 1, 4, 7]}),
        ("Reshape", ["ordered", "flat"], "still", {}),
        ("Concat", ["still"] * frames, "film", {"axis": 2}),
        ("Reshape", ["film", "row"], pixels, {}),
        ("Div", ["hw", "patch"], "counts", {}),
        ("Concat", ["one", "counts"], "grid", {"axis": 0}),
        ("Concat", ["count", "three"], "grids", {"axis": 0}),
        ("Expand", ["grid", "grids"], grid, {}),
    ]
    outside = {TILES, pixels, grid}

    def named(name: str) -> str:
        return name if name in outside else f"front.{name}"

    nodes = [helper.make_node(op, [named(i) for i in given], [named(out)], **more) for op, given, out, more in steps]
    return nodes, constants


def split_by_image(model: ModelProto, flat: str, features: str, width: int) -> None:
    """Appends ``flat`` [N * T, D] -> the output ``features`` [N, T, D], after ``patches`` in front."""
    model.graph.initializer.append(helper.make_tensor("front.width", TensorProto.INT64, [2], [-1, width]))
    model.graph.node.extend(
        [
            helper.make_node("Concat", ["front.count", "front.width"], ["front.by_image"], axis=0),
            helper.make_node("Reshape", [flat, "front.by_image"], [features]),
        ]
    )
    del model.graph.output[:]
    model.graph.output.append(helper.make_tensor_value_info(features, TensorProto.FLOAT, ["N", "T", width]))
