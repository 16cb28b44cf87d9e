"""Graphs that take the factors of an adapter as inputs, and the files that hold them.

An adapted layer computes y + (x A) B. A [in, rank] and B [rank, out] are inputs with defaults of rank 0, whose product
is all zeros: without an adapter the graph gives bit for bit what it gave before. The rank is free, so adapters of
several ranks share one graph and one session, and are switched by feeding other arrays.

onnxruntime has a file format and run options of its own for this (``LoraAdapter``). Plain inputs give the same numbers
at the same speed, and every engine has them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from edge_rsvlm.errors import UsageError
from edge_rsvlm.export.adapters.kept import KeptAdapter
from edge_rsvlm.export.graphs.external_data import HALF_MAX, Precision
from edge_rsvlm.export.graphs.tracing import Traced

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FILE = "adapter-{name}.npz"
FLOAT = ir.TensorType(ir.DataType.FLOAT)
PRODUCTS = ("MatMul", "Gemm")
FACTORS = ("lora_A", "lora_B")
VERBS = ("caption", "ask", "ground")


@dataclass(frozen=True)
class Switchable:
    """A graph that takes factors, and the weights (by name in the model's state dict) whose layers they adapt."""

    traced: Traced
    weights: frozenset[str]


def input_names(weight: str) -> tuple[str, str]:
    """Graph inputs of A and B for the layer of this weight."""
    module = weight.removesuffix(".weight")
    a, b = (f"{module}.{part}" for part in FACTORS)
    return a, b


def switchable(traced: Traced, adapters: Sequence[KeptAdapter], model: PreTrainedModel) -> Switchable:
    """``traced`` with inputs for every layer in it that one of ``adapters`` adapts; ``traced`` stays as it was.

    ``model`` (whose tensors may have no data) tells which weights are tied. UsageError where a weight is used by
    something else than a matrix product.
    """
    wanted = sorted({weight for adapter in adapters for weight in adapter.factors})
    changed = replace(traced, model=traced.model.clone())
    graph, sources = changed.model.graph, _sources(model)
    values = {sources.get(w.parameter, w.parameter): graph.initializers[name] for name, w in traced.weights.items()}
    adapted = [
        weight for weight in wanted
        if (value := values.get(sources.get(weight, weight))) is not None and _adapt(graph, value, weight, traced.name)
    ]  # fmt: skip
    return Switchable(changed, frozenset(adapted))


def _sources(model: PreTrainedModel) -> dict[str, str]:
    """Tied weights by name, and the name of the one tensor that they share."""
    tied: dict[str, str] = dict(model.all_tied_weights_keys)
    return tied


def _adapt(graph: ir.Graph, value: ir.Value, weight: str, name: str) -> bool:
    """Give every product with this weight its factors; False where there is none (an embedding's rows are not)."""
    products = _products(value)
    if any(node.op_type not in (*PRODUCTS, "Gather") for node, _ in products):
        kinds = ", ".join(sorted({node.op_type for node, _ in products}))
        raise UsageError(
            f"graph '{name}' uses '{weight}' in {kinds}, where an adapter cannot stay apart",
            fix="merge the adapters on it (keep = false)",
        )
    products = [(node, sizes) for node, sizes in products if node.op_type in PRODUCTS]
    if not products:
        return False
    a, b = _factor_inputs(graph, weight, *products[0][1])
    for node, _ in products:
        _add_factors(graph, node, a, b)
    return True


def _products(value: ir.Value) -> list[tuple[ir.Node, tuple[int, int]]]:
    """Nodes that multiply by this matrix, with the sizes (in, out) of the layer; any other node that reads it too."""
    rows, columns = (int(size) for size in value.shape or ())
    found = []
    for use in value.uses():
        if use.node.op_type == "Transpose":
            found += [(node, (out, into)) for node, (into, out) in _products_of_transposed(use.node)]
            continue
        turned = use.node.op_type == "Gemm" and bool(use.node.attributes.get_int("transB", 0))
        found.append((use.node, (columns, rows) if turned else (rows, columns)))
    return found


def _products_of_transposed(node: ir.Node) -> list[tuple[ir.Node, tuple[int, int]]]:
    source, turned = node.inputs[0], node.outputs[0]
    assert source is not None and source.shape is not None
    sizes = (int(source.shape[0]), int(source.shape[1]))
    return [(use.node, sizes) for use in turned.uses()]


def _factor_inputs(graph: ir.Graph, weight: str, into: int, out: int) -> tuple[ir.Value, ir.Value]:
    """Inputs A [in, rank] and B [rank, out] whose defaults have rank 0."""
    names, rank = input_names(weight), f"{weight.removesuffix('.weight')}.rank"
    shapes: tuple[tuple[int | str, ...], ...] = ((into, rank), (rank, out))
    made = []
    for name, shape in zip(names, shapes, strict=True):
        value = ir.Value(name=name, type=FLOAT, shape=ir.Shape(shape))
        empty = np.zeros([size if isinstance(size, int) else 0 for size in shape], np.float32)
        value.const_value = ir.Tensor(empty, name=name)
        graph.inputs.append(value)
        graph.initializers[name] = value
        made.append(value)
    return made[0], made[1]


def _add_factors(graph: ir.Graph, node: ir.Node, a: ir.Value, b: ir.Value) -> None:
    """The sum takes the name of the product: what was the layer's output still is."""
    product, x = node.outputs[0], node.inputs[0]
    name, shape = product.name, product.shape
    narrow = ir.Node("", "MatMul", [x, a], name=f"{name}_lora_A")
    wide = ir.Node("", "MatMul", [narrow.outputs[0], b], name=f"{name}_lora_B")
    for made in (narrow, wide):
        made.outputs[0].name, made.outputs[0].type = made.name, FLOAT
    total = ir.Value(name=name, type=FLOAT, shape=shape)
    ir.convenience.replace_all_uses_with(product, total, replace_graph_outputs=True)
    product.name = f"{name}_without_lora"
    added = ir.Node("", "Add", [product, wide.outputs[0]], outputs=[total], name=f"{name}_with_lora")
    graph.insert_after(node, [narrow, wide, added])


def write_adapters(
    adapters: Sequence[KeptAdapter],
    graphs: Mapping[str, Collection[str]],
    bundle: Path,
    precision: Precision,
    verbs: Collection[str],
) -> dict[str, dict[str, Any]]:
    """A file for each adapter in ``bundle``, and the manifest's ``adapters``.

    ``graphs`` are the weights that each graph has inputs for (``Switchable.weights``), ``verbs`` what the bundle
    answers. UsageError where no verb takes an adapter, and for one that changes nothing in any graph.
    """
    if adapters and not set(VERBS) & set(verbs):
        raise UsageError(
            f"only {', '.join(VERBS)} take an adapter, and this model does none of them",
            fix="merge the adapters (keep = false)",
        )
    return {adapter.name: _write(adapter, graphs, bundle, precision) for adapter in adapters}


def _write(
    adapter: KeptAdapter, graphs: Mapping[str, Collection[str]], bundle: Path, precision: Precision
) -> dict[str, Any]:
    arrays = {
        f"{graph}/{name}": _stored(values, precision)
        for graph, weights in graphs.items()
        for weight in sorted(adapter.factors.keys() & set(weights))
        for name, values in zip(input_names(weight), _pair(adapter, weight), strict=True)
    }
    if not arrays:
        raise UsageError(
            f"the adapter '{adapter.name}' changes nothing that this bundle computes",
            fix="leave it out, or check what it was trained on",
        )
    file = FILE.format(name=adapter.name)
    # savez stores names as members of a zip; mypy takes them for its own keywords.
    np.savez(bundle / file, **arrays)  # type: ignore[arg-type]
    return {"file": file, "parameters": sum(values.size for values in arrays.values())}


def _pair(adapter: KeptAdapter, weight: str) -> tuple[Tensor, Tensor]:
    return adapter.factors[weight].a, adapter.factors[weight].b


def _stored(values: Tensor, precision: Precision) -> np.ndarray[Any, Any]:
    half = precision == "f16" and bool(values.abs().max() <= HALF_MAX)
    stored: np.ndarray[Any, Any] = values.to(torch.float16 if half else torch.float32).contiguous().numpy()
    return stored


def unused(adapter: KeptAdapter, graphs: Mapping[str, Collection[str]]) -> tuple[str, ...]:
    """Layers of the adapter that no graph computes, such as vision layers behind the one whose output is taken."""
    used = {weight for weights in graphs.values() for weight in weights}
    return tuple(sorted(adapter.factors.keys() - used))
