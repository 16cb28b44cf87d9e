"""Sizes as an ONNX file writes them: numbers, names, and sums, products and quotients of these."""

from __future__ import annotations

import ast
import operator
from collections.abc import Mapping
from pathlib import Path

import onnx

from edge_rsvlm.errors import InputError

Dims = list[int | str]
OPERATIONS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv}


def inputs(graph: Path) -> dict[str, Dims]:
    """Those without a value of their own; sizes that vary are texts."""
    model = onnx.load(graph, load_external_data=False).graph
    given = {tensor.name for tensor in model.initializer}
    return {value.name: dims_of(value) for value in model.input if value.name not in given}


def dims_of(value: onnx.ValueInfoProto) -> Dims:
    return [d.dim_value if d.HasField("dim_value") else d.dim_param for d in value.type.tensor_type.shape.dim]


def size_of(dim: int | str, symbols: Mapping[str, int]) -> int:
    """Of "(s0//4)"; InputError for what is not sums, products and quotients of known sizes."""
    if isinstance(dim, int):
        return dim
    try:
        return _value(ast.parse(dim, mode="eval").body, symbols)
    except (SyntaxError, KeyError, AttributeError) as exc:
        raise InputError(f"the size '{dim}' cannot be told from {dict(symbols)}", fix="leave TensorRT out") from exc


def _value(node: ast.expr, symbols: Mapping[str, int]) -> int:
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        return node.value
    if isinstance(node, ast.Name):
        return symbols[node.id]
    if isinstance(node, ast.BinOp):
        found: int = OPERATIONS[type(node.op)](_value(node.left, symbols), _value(node.right, symbols))
        return found
    raise KeyError(ast.unparse(node))
