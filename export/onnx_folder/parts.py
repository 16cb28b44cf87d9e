"""Graphs taken from an ONNX export, and what they must be like."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from onnx import ModelProto, TensorProto

from edge_rsvlm.bundle.external_data import NotOnnx, external_data
from edge_rsvlm.errors import InputError, UsageError
from edge_rsvlm.export.bundle_writer import place
from edge_rsvlm.export.families.base import Description
from edge_rsvlm.export.onnx_folder.graphs import Tensor

PLAIN = "take the float32 export, without a suffix like _fp16 or _q4 in its name"
AGAIN = "export the model again with optimum or torch.onnx"
Names = dict[str, dict[str, str]]
"""``{"inputs": {role: name}, "outputs": {role: name}}``."""


@dataclass(frozen=True)
class TakenGraph:
    """One graph of the bundle: ``source`` itself, or ``model`` which was made of it."""

    file: str
    source: Path
    names: Names
    model: ModelProto | None = None


@dataclass(frozen=True)
class OnnxFolder:
    """What a folder holds, ready to be written into a bundle."""

    description: Description
    graphs: dict[str, TakenGraph]

    def write(self, out: Path) -> dict[str, str]:
        """Graphs and their data files into ``out``; returns file names by graph name.

        The hub's cache is made of links: what they point to is placed.
        """
        for graph in self.graphs.values():
            if graph.model is None:
                place(graph.source.resolve(), out / graph.file)
            else:
                (out / graph.file).write_bytes(graph.model.SerializeToString())
            for data in data_files(graph.source):
                if not (out / data.name).exists():
                    place(data.resolve(), out / data.name)
        return {name: graph.file for name, graph in self.graphs.items()}


def only(path: Path, tensors: Mapping[str, Tensor], *names: str) -> Tensor:
    """The first of ``names`` that is there."""
    for name in names:
        if name in tensors:
            return tensors[name]
    raise UsageError(f"{path}: has no '{names[0]}' but {listed(tensors)}", fix=AGAIN)


def want(path: Path, tensor: Tensor, dtype: int) -> None:
    """UsageError unless the tensor is of this type of ONNX."""
    if tensor.dtype != dtype:
        found, wanted = (TensorProto.DataType.Name(kind) for kind in (tensor.dtype, dtype))
        raise UsageError(f"{path}: '{tensor.name}' is {found}, not {wanted}", fix=PLAIN)


def batched(path: Path, tensor: Tensor) -> Tensor:
    """``tensor``; UsageError when its batch is of one fixed size."""
    if tensor.shape and tensor.shape[0] is not None:
        raise UsageError(f"{path}: '{tensor.name}' takes batches of {tensor.shape[0]} only", fix=AGAIN)
    return tensor


def listed(names: Iterable[str]) -> str:
    return ", ".join(f"'{name}'" for name in sorted(names))


def data_files(path: Path) -> list[Path]:
    """Files beside ``path`` that hold its external tensors; InputError where one is missing or lies elsewhere."""
    try:
        locations = sorted({tensor.location for tensor in external_data(path)})
    except NotOnnx as exc:
        raise InputError(f"{path}: not an ONNX file ({exc})", fix="copy or download the file again") from exc
    for location in locations:
        if PurePosixPath(location).name != location or not (path.parent / location).is_file():
            raise InputError(f"{path}: its weights '{location}' are not beside it", fix="copy that file there too")
    return [path.parent / location for location in locations]
