"""How much a graph's outputs change when one of its layers alone has fewer bits.

The graph is opened once, with a switch at every layer: its weight can be fed, and its activations pass a Q/DQ pair as
far as a gate of 0 or 1 lets them. So no layer costs more than a run over the samples. To first order the squared errors
of layers add up (Dong et al. 2019, "HAWQ"), which is what the search goes by.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import NodeProto, helper, numpy_helper

from edge_rsvlm.export.quantize.calibration import Arrays
from edge_rsvlm.export.quantize.chosen import choose_nodes
from edge_rsvlm.export.quantize.loaded import Model, array_of, constants, load_wide
from edge_rsvlm.export.quantize.ranges import each_run, plain_session, save
from edge_rsvlm.export.quantize.rtn import searched_grid

MOST_SAMPLES = 8
LARGEST_BYTES = 1 << 30
"""Graphs with more bytes of weights are not opened whole, and so not searched by layers."""
STEPS_8_BITS = 255
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class LayerLoss:
    """``loss`` by precision: the squared error of the graph's outputs as a share of their square, in the mean."""

    graph: str
    layer: str
    weights: int
    loss: Mapping[str, float]


def layer_losses(
    name: str, graph: Path, samples: Sequence[Arrays], block: int, progress: Progress
) -> tuple[LayerLoss, ...]:
    """Of every layer with a constant weight: ``int8`` (weights and activations) and, of products, ``int4`` weights."""
    some = [samples[int(i)] for i in np.linspace(0, len(samples) - 1, min(MOST_SAMPLES, len(samples))).round()]
    model = load_wide(graph)
    nodes = choose_nodes(model, ()).layers
    weights = {node.name: array_of(constants(model)[node.input[1]]) for node in nodes}
    with tempfile.TemporaryDirectory(prefix="layers-") as folder:
        switched = _Switched(model, nodes, _spans(model, nodes, some), Path(folder))
        plain = [switched.run(call, {}) for call in some]
        found = []
        for index, node in enumerate(nodes):
            progress(index, len(nodes))
            weight = weights[node.name]
            narrow = {**switched.gate(node), node.input[1]: _int8(node, weight)}
            loss = {"int8": _mean_loss(switched, some, plain, narrow)}
            if weight.ndim == 2:
                loss["int4"] = _mean_loss(switched, some, plain, {node.input[1]: _int4(node, weight, block)})
            found.append(LayerLoss(name, node.input[1], weight.size, loss))
    progress(len(nodes), len(nodes))
    return tuple(found)


def _mean_loss(switched: _Switched, calls: Sequence[Arrays], plain: Sequence[Sequence[Any]], fed: Arrays) -> float:
    losses = [
        float(np.square(new - old).sum(dtype=np.float64) / max(float(np.square(old).sum(dtype=np.float64)), 1e-12))
        for call, before in zip(calls, plain, strict=True)
        for old, new in zip(before, switched.run(call, fed), strict=True)
    ]
    return float(np.mean(losses))


def _spans(model: Model, nodes: Sequence[NodeProto], calls: Sequence[Arrays]) -> dict[str, tuple[float, float]]:
    """Least and greatest value of what each layer reads, zero among them."""
    names = dict.fromkeys(node.input[0] for node in nodes)
    given = {value.name for value in model.graph.input}
    found = dict.fromkeys(names, (0.0, 0.0))
    for call, values in zip(calls, each_run(model, [n for n in names if n not in given], calls), strict=True):
        for name in names:
            low, high = found[name]
            value = values[name] if name in values else call[name]
            found[name] = min(low, float(value.min())), max(high, float(value.max()))
    return found


class _Switched:
    """The graph with a switch at every layer."""

    def __init__(
        self, model: Model, nodes: Sequence[NodeProto], spans: Mapping[str, tuple[float, float]], folder: Path
    ) -> None:
        self._outputs = [output.name for output in model.graph.output if not output.name.startswith("present")]
        chosen = {node.name for node in nodes}
        known, made = constants(model), []
        for node in model.graph.node:
            if node.name in chosen:
                made += _gated(model.graph, node, *spans[node.input[0]])
                weight = known[node.input[1]]
                model.graph.input.append(helper.make_tensor_value_info(weight.name, weight.data_type, weight.dims))
            made.append(node)
        del model.graph.node[:]
        model.graph.node.extend(made)
        save(model, folder / "switched.onnx")
        self._session = plain_session(folder / "switched.onnx")

    def gate(self, node: NodeProto) -> Arrays:
        return {_gate(node): np.array([1.0], np.float32)}

    def run(self, call: Arrays, fed: Arrays) -> list[NDArray[Any]]:
        found: list[NDArray[Any]] = self._session.run(self._outputs, {**call, **fed})
        return found


def _gate(node: NodeProto) -> str:
    return f"{node.name}.gate"


def _gated(graph: Any, node: NodeProto, low: float, high: float) -> list[NodeProto]:
    """x + gate (Q/DQ of x - x) in place of the x that ``node`` reads."""
    x, base = node.input[0], f"{node.name}.in"
    scale = max(high - low, 1e-8) / STEPS_8_BITS
    values = {
        f"{base}.scale": np.float32(scale), f"{base}.zero": np.uint8(np.clip(round(-low / scale), 0, STEPS_8_BITS)),
        _gate(node): np.array([0.0], np.float32),
    }  # fmt: skip
    graph.initializer.extend(numpy_helper.from_array(np.asarray(value), name) for name, value in values.items())
    graph.input.append(helper.make_tensor_value_info(_gate(node), onnx.TensorProto.FLOAT, [1]))
    node.input[0] = f"{base}.out"
    grid = [f"{base}.scale", f"{base}.zero"]
    return [
        helper.make_node("QuantizeLinear", [x, *grid], [f"{base}.q"]),
        helper.make_node("DequantizeLinear", [f"{base}.q", *grid], [f"{base}.dq"]),
        helper.make_node("Sub", [f"{base}.dq", x], [f"{base}.error"]),
        helper.make_node("Mul", [f"{base}.error", _gate(node)], [f"{base}.let"]),
        helper.make_node("Add", [x, f"{base}.let"], [f"{base}.out"]),
    ]


def _int8(node: NodeProto, weight: NDArray[Any]) -> NDArray[np.float32]:
    """Nearest of 255 symmetric steps per output channel."""
    axis = 0 if node.op_type == "Conv" or _turned(node) else 1
    others = tuple(i for i in range(weight.ndim) if i != axis)
    scale = np.maximum(np.abs(weight).max(axis=others, keepdims=True), 1e-12) / 127
    return np.asarray(np.round(weight / scale) * scale, np.float32)


def _int4(node: NodeProto, weight: NDArray[Any], block: int) -> NDArray[np.float32]:
    weight_NK = torch.from_numpy(np.array(weight if _turned(node) else weight.T, np.float32, order="C"))
    grid = searched_grid(weight_NK, torch.ones(weight_NK.shape[1]), block, 4)
    values_NK = grid.blocks(grid.round(weight_NK)).values_NK()
    return np.ascontiguousarray(values_NK if _turned(node) else values_NK.T)


def _turned(node: NodeProto) -> bool:
    return any(attribute.name == "transB" and attribute.i for attribute in node.attribute)


def table(losses: Sequence[LayerLoss]) -> str:
    """A line per layer, the most sensitive first."""
    rows = sorted(losses, key=lambda row: -row.loss["int8"])
    lines = [f"{'graph':<18}{'weights':>12}{'int8':>12}{'int4':>12}  layer"]
    for row in rows:
        int4 = f"{row.loss['int4']:>12.2e}" if "int4" in row.loss else f"{'':>12}"
        lines.append(f"{row.graph:<18}{row.weights:>12,}{row.loss['int8']:>12.2e}{int4}  {row.layer}")
    return "\n".join(lines)
