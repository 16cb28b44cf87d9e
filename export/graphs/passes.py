"""Passes over a traced graph whose weights have no values yet."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import onnx_ir as ir
import onnx_ir.passes.common as common
from onnxscript.optimizer import fold_constants
from onnxscript.rewriter import RewritePass
from onnxscript.rewriter.rules.common import remove_optional_bias_from_conv_rule

READ_AS_MATRIX = ("MatMul", "Gemm")


def simplify(model: ir.Model, weights: Mapping[str, ir.Value]) -> None:
    """Fold what is constant, drop what is unused or twice there.

    The exporter's own optimisation goes on to rewrite rules, which take time quadratic in the layers and find next to
    nothing that engines do not find at load.
    """
    passes = ir.passes.Sequential(
        common.InlinePass(),
        RewritePass([remove_optional_bias_from_conv_rule]),  # onnxscript 0.7 gives Conv3d without bias one of 2 axes
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedFunctionsPass(),
        common.RemoveUnusedOpsetsPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.OutputFixPass(),
        common.NameFixPass(),
    )
    with _as_inputs(model.graph, weights):  # nothing may try to fold or compare what has no values
        fold_constants(model)
        _drop_zero_biases(model.graph)
        passes(model)


def _drop_zero_biases(graph: ir.Graph) -> None:
    """onnxscript 0.7.2 gives a conv3d without bias one of zeros [channels, 2], which onnxruntime may refuse."""
    for node in graph:
        if node.op_type == "Conv" and len(node.inputs) == 3:
            bias = node.inputs[2]
            if bias is not None and bias.const_value is not None and not bias.const_value.numpy().any():
                node.resize_inputs(2)


@contextmanager
def _as_inputs(graph: ir.Graph, weights: Mapping[str, ir.Value]) -> Iterator[None]:
    count = len(graph.inputs)
    for name in weights:
        del graph.initializers[name]
    graph.inputs.extend(weights.values())
    yield
    del graph.inputs[count:]
    graph.initializers.update(weights)


def fold_transposes(graph: ir.Graph, weights: Iterable[ir.Value]) -> set[ir.Value]:
    """Matrices that are read transposed by matrix products only are stored that way: the device need not do it."""
    folded = set()
    for weight in weights:
        nodes = [use.node for use in weight.uses()]
        if nodes and all(_is_transpose_of_matrix(node) for node in nodes):
            for node in nodes:
                ir.convenience.replace_all_uses_with(node.outputs[0], weight)
                graph.remove(node, safe=True)
            weight.shape = ir.Shape(reversed(weight.shape or ()))
            folded.add(weight)
    return folded


def _is_transpose_of_matrix(node: ir.Node) -> bool:
    if node.op_type != "Transpose" or list(node.attributes["perm"].as_ints()) != [1, 0]:
        return False
    readers = node.outputs[0].uses()
    return all(use.node.op_type in READ_AS_MATRIX for use in readers) and not node.outputs[0].is_graph_output()


def values_of(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph:
        yield from node.outputs


def strip_notes(model: ir.Model) -> None:
    """Drop source lines and paths of the machine that traced."""
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.doc_string = model.graph.doc_string = None
    for node in model.graph:
        node.metadata_props.clear()
        node.doc_string = None
    for value in values_of(model.graph):
        value.metadata_props.clear()
        value.doc_string = None
        if value.const_value is not None:
            value.const_value.metadata_props.clear()
