"""Fill a traced graph with weights and write it: ``NAME.onnx`` and, when it is large, ``NAME.onnx.data`` beside it.

Tensors go through one at a time, in the dtype of the checkpoint, and are widened or halved block by block: the memory
is that of the largest tensor as stored, whatever the model's size. With precision ``f16`` matrices are stored in half
precision behind a Cast: the device computes in float32 what it reads in float16.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import Tensor

from edge_rsvlm.errors import InputError
from edge_rsvlm.export.checkpoint.reading import LazyTensor
from edge_rsvlm.export.graphs.tracing import Traced, Weight

Precision = Literal["f32", "f16"]
Progress = Callable[[int, int], None]
"""Bytes done, bytes in all."""

EMBEDDED_BYTES = 64 << 20
"""Graphs with fewer bytes of weights are one file."""
ALIGNMENT = 4096  # pages, so that engines can map tensors where they lie
BLOCK_BYTES = 16 << 20
HALF_FROM = 1024
"""Vectors, and tensors of fewer elements, stay in float32: they save nothing and cost accuracy."""
HALF = ir.TensorType(ir.DataType.FLOAT16)
HALF_MAX = torch.finfo(torch.float16).max
DTYPES = {
    torch.float32: ir.DataType.FLOAT,
    torch.float16: ir.DataType.FLOAT16,
    torch.int64: ir.DataType.INT64,
    torch.bool: ir.DataType.BOOL,
}


@dataclass(frozen=True)
class _Filling:
    """One initialiser and where its values come from."""

    value: ir.Value
    weight: Weight
    source: LazyTensor

    @property
    def dtype(self) -> torch.dtype:
        return next(dtype for dtype, kind in DTYPES.items() if kind == self.value.dtype)

    def can_halve(self) -> bool:
        shape = self.source.shape
        return self.dtype == torch.float32 and len(shape) > 1 and math.prod(shape) >= HALF_FROM

    def bytes(self, precision: Precision) -> int:
        width = 2 if precision == "f16" and self.can_halve() else self.dtype.itemsize
        return math.prod(self.source.shape) * width


def write(
    traced: Traced,
    weights: Mapping[str, LazyTensor],
    path: Path,
    precision: Precision,
    progress: Progress | None = None,
) -> tuple[Path, ...]:
    """Write ``path`` (and its data file) and return what was written. ``traced`` can be written again.

    InputError when ``weights`` has a tensor of another shape than the graph.
    """
    model = traced.model.clone()
    fillings = [_filling(model.graph, name, weight, weights) for name, weight in traced.weights.items()]
    total = sum(filling.bytes(precision) for filling in fillings)
    data = path.with_name(f"{path.name}.data")
    done = 0
    if total <= EMBEDDED_BYTES:
        for filling in fillings:
            done += _embed(filling, precision)
            _report(progress, done, total)
        _widen(model.graph)
        ir.save(model, path)
        return (path,)
    with data.open("wb") as file:
        for filling in fillings:
            done += _store(filling, precision, file, data.name)
            _report(progress, done, total)
    _widen(model.graph)
    ir.save(model, path)
    return path, data


def _filling(graph: ir.Graph, name: str, weight: Weight, weights: Mapping[str, LazyTensor]) -> _Filling:
    value, source = graph.initializers[name], weights[weight.parameter]
    shape = tuple(source.shape)
    wanted = tuple(value.shape or ())
    if (shape[::-1] if weight.transposed else shape) != wanted:
        raise InputError(
            f"'{weight.parameter}' is {shape}, and the graph wants {wanted}",
            fix="check config.json against the weights",
        )
    return _Filling(value, weight, source)


def _report(progress: Progress | None, done: int, total: int) -> None:
    if progress is not None:
        progress(done, total)


def _embed(filling: _Filling, precision: Precision) -> int:
    tensor, dtype = _open(filling, precision)
    values = np.concatenate([*_blocks(tensor, dtype)])
    stored = values.reshape(tuple(filling.value.shape or ()))
    _set(filling.value, ir.Tensor(stored, name=filling.value.name))
    return int(values.nbytes)


def _store(filling: _Filling, precision: Precision, file: BinaryIO, location: str) -> int:
    tensor, dtype = _open(filling, precision)
    file.write(bytes(-file.tell() % ALIGNMENT))
    start = file.tell()
    for block in _blocks(tensor, dtype):
        file.write(block.data)
    length = file.tell() - start
    shape, name = ir.Shape(filling.value.shape or ()), str(filling.value.name)
    _set(filling.value, ir.ExternalTensor(location, start, length, DTYPES[dtype], shape=shape, name=name))
    return length


def _open(filling: _Filling, precision: Precision) -> tuple[Tensor, torch.dtype]:
    """The tensor in the graph's layout and its own dtype, and the dtype to store it in."""
    tensor = filling.source.read()
    half = precision == "f16" and filling.can_halve() and _fits_half(tensor)
    return tensor.t() if filling.weight.transposed else tensor, torch.float16 if half else filling.dtype


def _fits_half(tensor: Tensor) -> bool:
    low, high = torch.aminmax(tensor)
    return bool(low >= -HALF_MAX) and bool(high <= HALF_MAX)


def _blocks(tensor: Tensor, dtype: torch.dtype) -> Iterator[NDArray[np.generic]]:
    """Flat blocks of a tensor in row order, a few MiB each."""
    rows = tensor if tensor.dim() else tensor[None]
    step = max(1, BLOCK_BYTES * len(rows) // max(1, rows.numel() * dtype.itemsize))
    for start in range(0, len(rows), step):
        yield rows[start : start + step].to(dtype).contiguous().flatten().numpy()


def _set(value: ir.Value, tensor: ir.TensorProtocol) -> None:
    value.const_value = tensor
    if tensor.dtype == ir.DataType.FLOAT16:
        value.type = HALF  # a new one: clones of a graph share their types


def _widen(graph: ir.Graph) -> None:
    """Cast half-precision initialisers where they are read first, so that a part of the graph widens its own only.

    Rows of a table are gathered before: it need not be widened whole.
    """
    halves = {value for value in graph.initializers.values() if value.type == HALF}
    for node in list(graph):
        for value in node.inputs:
            if value not in halves:
                continue
            if all(use.node.op_type == "Gather" and use.idx == 0 for use in value.uses()):
                output = node.outputs[0]
                name = output.name
                output.name, output.type = f"{name}_f16", HALF
                graph.insert_after(node, _cast(output, name))
            else:
                graph.insert_before(node, _cast(value, f"{value.name}_f32"))


def _cast(value: ir.Value, name: str | None) -> ir.Node:
    """Let everything that reads ``value`` read it in float32, as ``name``."""
    output = ir.Value(name=name, shape=value.shape, type=ir.TensorType(ir.DataType.FLOAT))
    ir.convenience.replace_all_uses_with(value, output, replace_graph_outputs=True)
    to = {"to": ir.AttrInt64("to", ir.DataType.FLOAT)}
    return ir.Node("", "Cast", [value], to, outputs=[output], name=f"{name}_cast")
