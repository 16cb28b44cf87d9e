"""Weights in 4 bits, activations as they were: a graph's layers one after another.

What a layer is fitted to is what reaches it on the device: calibration samples pass through the layers before it as
they were stored, by the engine's own kernel (Frantar et al. 2022, section 4). Memory is near that of the layers that
read the same activations, of their K x K matrix, and of the samples between two layers.

Blocks have zeros of their own, or the middle number where the same numbers go to TensorRT, which takes no others.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import Tensor

from edge_rsvlm.errors import InputError, UsageError
from edge_rsvlm.export.quantize.awq import input_scales, output_error
from edge_rsvlm.export.quantize.blocked import write_blocked
from edge_rsvlm.export.quantize.folding import divide_before
from edge_rsvlm.export.quantize.gptq import gptq
from edge_rsvlm.export.quantize.graph_files import MICROSOFT, use_domain
from edge_rsvlm.export.quantize.layers import Group, Layer, attribute, find_layers, groups_of
from edge_rsvlm.export.quantize.nbits import Blocks, pack
from edge_rsvlm.export.quantize.rewriting import Rewriting
from edge_rsvlm.export.quantize.rtn import Grid, searched_grid
from edge_rsvlm.export.quantize.settings import Int4, WeightMethod
from edge_rsvlm.export.quantize.stream import Arrays, Stream

ACCURACY_LEVEL = 4
"""Activations meet the weights in 8 bits: onnxruntime's fastest kernel on processors."""
BITS = 4
Metrics = dict[str, float | int | str]


@dataclass(frozen=True)
class _Fit:
    """How a weight becomes blocks."""

    method: WeightMethod
    block: int
    symmetric: bool

    def grid(self, weight_NK: Tensor, importance_K: Tensor) -> Grid:
        return searched_grid(weight_NK, importance_K, self.block, BITS, symmetric=self.symmetric)

    def nearest(self, weight_NK: Tensor) -> Blocks:
        grid = self.grid(weight_NK, torch.ones(weight_NK.shape[1]))
        return grid.blocks(grid.round(weight_NK))

    def fitted(self, weight_NK: Tensor, hessian_KK: Tensor) -> Blocks:
        grid = self.grid(weight_NK, hessian_KK.diagonal())
        return grid.blocks(gptq(weight_NK, hessian_KK, grid) if self.method == "gptq" else grid.round(weight_NK))


def quantize_int4(graph: Path, samples: Sequence[Arrays], settings: Int4, out: Path, tensorrt: Path | None) -> Metrics:
    """Write ``graph`` to ``out`` with its layers as MatMulNBits, and to ``tensorrt`` with the same numbers in INT4.

    Returns how many layers there are, the bytes of the graph's arrays before and after, and, of methods that are
    calibrated, the mean and the worst relative error of a layer's outputs: the root of the mean square of what
    quantizing the weight changed in the outputs over that of the outputs, on the calibration samples.
    UsageError where the graph has no layer that could be stored so, or calibration is needed and there is none.
    """
    if settings.method != "rtn" and not samples:
        raise UsageError(f"{settings.method} needs calibration images", fix="name some in the recipe, or take rtn")
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".int4-") as folder:
        work = Rewriting(graph, Path(folder))
        layers = find_layers(work.model.graph, work.constants, work.tensors, settings.keep)
        if not layers:
            raise UsageError(f"{graph.name} has no layer to quantize", fix="leave this graph as it is")
        use_domain(work.model, MICROSOFT, 1)
        before = sum(work.tensors[name].nbytes for name in work.constants.initializers)
        fit = _Fit(settings.method, settings.block, symmetric=tensorrt is not None)
        errors = _quantize(work, groups_of(work.originals, layers), samples, fit, Path(folder))
        after = work.write(out)
    if tensorrt is not None:
        write_blocked(out, tensorrt)
    return {"layers": len(layers), "bytes_before": before, "bytes_after": after, **_summary(errors)}


def _summary(errors: Sequence[float]) -> Metrics:
    return {"mean_output_error": float(np.mean(errors)), "worst_output_error": max(errors)} if errors else {}


def _quantize(
    work: Rewriting, groups: Sequence[Group], samples: Sequence[Arrays], fit: _Fit, folder: Path
) -> list[float]:
    """Replace the layers, and return the relative error of each one's outputs."""
    if fit.method == "rtn":
        for group in groups:
            for layer in group.layers:
                _replace(work, layer, fit.nearest(_weight(work, layer)), layer.input)
        return []
    stream = Stream(work.model, work.constants, samples, folder)
    stream.begin(work.needed_from(0), work.tensors)
    at, errors = 0, []
    for group in groups:
        stream.run(work.nodes(at, group.at), work.tensors, work.needed_from(group.at))
        at = group.at
        errors += _quantize_group(work, group, stream, fit)
    return errors


def _quantize_group(work: Rewriting, group: Group, stream: Stream, fit: _Fit) -> list[float]:
    hessian_KK, magnitude_K = _statistics(stream.rows(group.input), group)
    reading, scales_K = group.input, torch.ones_like(magnitude_K)
    if fit.method == "awq":
        weights = (_weight(work, layer) for layer in group.layers)
        scales_K = input_scales(weights, hessian_KK, magnitude_K, fit.grid)
        reading = divide_before(work, group, scales_K.numpy(), stream)
    errors = []
    for layer in group.layers:
        weight_NK = _weight(work, layer)
        blocks = fit.fitted(weight_NK * scales_K, hessian_KK / torch.outer(scales_K, scales_K))
        error_NK = torch.from_numpy(blocks.values_NK()) / scales_K - weight_NK
        errors.append(_relative(error_NK, weight_NK, hessian_KK))
        _replace(work, layer, blocks, reading)
    return errors


def _statistics(samples: Iterable[Tensor], group: Group) -> tuple[Tensor, Tensor]:
    """The mean of x x^T [K, K], and of the size of x [K], over what the layers of ``group`` read.

    Calls count alike, whatever they read: a prompt has many rows, each word of an answer one, and as much to say.
    """
    hessian_KK, magnitude_K, calls = torch.zeros(()), torch.zeros(()), 0
    for rows in samples:
        if len(rows):
            hessian_KK = hessian_KK + rows.T @ rows / len(rows)
            magnitude_K = magnitude_K + rows.abs().mean(0)
            calls += 1
    if not hessian_KK.isfinite().all():
        raise InputError(f"what '{group.layers[0].node.name}' reads is not finite", fix="start from float32 graphs")
    return hessian_KK / max(calls, 1), magnitude_K / max(calls, 1)


def _relative(error_NK: Tensor, weight_NK: Tensor, hessian_KK: Tensor) -> float:
    power = output_error(weight_NK, hessian_KK)
    return (output_error(error_NK, hessian_KK) / power) ** 0.5 if power else 0.0


def _weight(work: Rewriting, layer: Layer) -> Tensor:
    return torch.from_numpy(layer.weight_NK(work.constants, work.tensors))


def _replace(work: Rewriting, layer: Layer, blocks: Blocks, reading: str) -> None:
    """``blocks`` in the place of the layer's weight; a bias is added after."""
    name = layer.output
    made = name if layer.bias is None else f"{name}_without_bias"
    outputs, inputs = blocks.numbers_NK.shape
    node = onnx.helper.make_node(
        "MatMulNBits",
        [reading, *_add_blocks(work, layer, blocks)],
        [made],
        name=layer.node.name or name,
        domain=MICROSOFT,
        K=inputs,
        N=outputs,
        bits=blocks.bits,
        block_size=blocks.block,
        accuracy_level=ACCURACY_LEVEL,
    )
    bias = [] if layer.bias is None else [onnx.helper.make_node("Add", [made, layer.bias], [name], name=f"{name}_bias")]
    work.replace(layer.node, [node, *bias])


def _add_blocks(work: Rewriting, layer: Layer, blocks: Blocks) -> list[str]:
    """Names of numbers, scales and zeros; scales are stored in half precision, which they are."""
    name, (numbers, zeros) = layer.output, pack(blocks)
    names = [work.add_tensor(f"{name}_q{blocks.bits}", numbers)]
    scales, type_ = work.add_tensor(f"{name}_scales_f16", blocks.scales_NG.astype(np.float16)), _type(work, layer)
    if type_ != onnx.TensorProto.FLOAT16:
        wide = onnx.helper.make_node("Cast", [scales], [f"{name}_scales"], name=f"{name}_scales_cast", to=type_)
        scales = work.add_constant(wide)
    names.append(scales)
    return names if zeros is None else [*names, work.add_tensor(f"{name}_zeros", zeros)]


def _type(work: Rewriting, layer: Layer) -> int:
    """In which the layer computes: that of its weight where the product reads it."""
    source = work.constants.source(layer.weight)
    assert source is not None
    casts = [attribute(node, "to") for node in source[1] if node.op_type == "Cast"]
    return int(casts[-1] if casts else onnx.helper.np_dtype_to_tensor_dtype(work.tensors[source[0]].dtype))
