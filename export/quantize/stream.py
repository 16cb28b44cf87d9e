"""Calibration samples on their way through a graph, a few nodes at a time.

All samples have passed the same nodes; of each, the values that later nodes read are kept, in memory up to a bound and
in files beyond. Memory is that of the nodes being run and of what lies between two layers, whatever the graph's depth.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray

from edge_rsvlm.engines.onnxruntime import ort
from edge_rsvlm.export.graphs.sliced import names_read
from edge_rsvlm.export.quantize.layers import Constants, Nodes, Tensors

Arrays = Mapping[str, NDArray[Any]]

MEMORY_BYTES = 1 << 30
"""Of values between layers, of all samples together; what is more goes to files."""
SMALL_BYTES = 4096
"""Arrays below are never worth a file."""
EXTERNAL = "weights"  # the name of a file that is not there: every array is handed over


class Files:
    """Arrays that are mapped from files of a folder, which is theirs alone, instead of held."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self._folder, self._count = folder, 0

    def keep(self, array: NDArray[Any]) -> NDArray[Any]:
        if array.nbytes < SMALL_BYTES:
            return array
        self._count += 1
        path = self._folder / f"{self._count}.npy"
        np.save(path, array)
        return np.load(path, mmap_mode="r")

    @staticmethod
    def drop(array: NDArray[Any]) -> None:
        if isinstance(array, np.memmap):
            Path(str(array.filename)).unlink()


class Stream:
    """``samples`` (inputs of the graph by name) before the first node of ``model``."""

    def __init__(
        self,
        model: onnx.ModelProto,
        constants: Constants,
        samples: Sequence[Arrays],
        folder: Path,
        memory_bytes: int = MEMORY_BYTES,
    ) -> None:
        self._model, self._constants, self._files = model, constants, Files(folder / "values")
        self._left = memory_bytes
        self._values: list[dict[str, NDArray[Any]]] = [{} for _ in samples]
        self._samples = samples

    def begin(self, needed: Collection[str], tensors: Tensors) -> None:
        """Take the inputs that the graph reads from the samples, or their defaults, in the graph's own types."""
        inputs = [value for value in self._model.graph.input if value.name in needed]
        for values, sample in zip(self._values, self._samples, strict=True):
            for value in inputs:
                array = sample.get(value.name, tensors.get(value.name))
                assert array is not None, value.name
                dtype = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
                self._put(values, value.name, np.asarray(array, dtype))

    def rows(self, name: str) -> Iterator[torch.Tensor]:
        """Of each sample the rows [rows, K] of a value [..., K], in float32."""
        for values in self._values:
            array = np.asarray(values[name], np.float32)
            yield torch.from_numpy(array.reshape(-1, array.shape[-1]).copy())

    def dtype(self, name: str) -> np.dtype[Any]:
        return self._values[0][name].dtype

    def divide(self, name: str, scales_K: NDArray[np.float32]) -> None:
        for values in self._values:
            array = values[name]
            self._drop(values, name)
            self._put(values, name, (array / scales_K).astype(array.dtype))

    def run(self, nodes: Nodes, tensors: Tensors, needed: Collection[str]) -> None:
        """Pass all samples through ``nodes``; of what there is then, only ``needed`` stays."""
        gives = [name for node in nodes for name in node.output if name in needed]
        session = self._session(nodes, tensors, gives) if gives else None
        reads = {name for node in nodes for name in names_read(node)}
        for values in self._values:
            if session is not None:
                feeds = {name: np.asarray(values[name]) for name in reads & values.keys()}
                made = session.run(gives, feeds)
                for name in values.keys() - set(needed):
                    self._drop(values, name)
                for name, array in zip(gives, made, strict=True):
                    self._put(values, name, array)

    def _put(self, values: dict[str, NDArray[Any]], name: str, array: NDArray[Any]) -> None:
        if array.nbytes <= self._left:
            self._left -= array.nbytes
            values[name] = array
        else:
            values[name] = self._files.keep(array)

    def _drop(self, values: dict[str, NDArray[Any]], name: str) -> None:
        array = values.pop(name)
        if isinstance(array, np.memmap):
            self._files.drop(array)
        else:
            self._left += array.nbytes

    def _session(self, nodes: Nodes, tensors: Tensors, gives: Sequence[str]) -> ort.InferenceSession:
        every = [*self._constants.nodes_for(nodes), *nodes]
        names = {name for node in every for name in names_read(node)}
        feeds = {name: array for name, array in self._values[0].items() if name in names}
        held = {name: tensors[name] for name in sorted(names & tensors.keys()) if name not in feeds}
        options = _options()
        large = {name: array for name, array in held.items() if array.nbytes >= SMALL_BYTES}
        handed = [ort.OrtValue.ortvalue_from_numpy_with_onnx_type(a, _type(a)) for a in large.values()]
        options.add_external_initializers(list(large), handed)
        graph = onnx.helper.make_graph(
            every,
            "part",
            [_free_value(name, array) for name, array in feeds.items()],
            [onnx.ValueInfoProto(name=name) for name in gives],
            [
                _external(n, a) if n in large else onnx.numpy_helper.from_array(np.asarray(a), n)
                for n, a in held.items()
            ],
        )
        proto = onnx.helper.make_model(graph, opset_imports=self._model.opset_import, ir_version=self._model.ir_version)
        return ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _type(array: NDArray[Any]) -> int:
    return int(onnx.helper.np_dtype_to_tensor_dtype(array.dtype))


def _free_value(name: str, array: NDArray[Any]) -> onnx.ValueInfoProto:
    """An input of any size: samples differ."""
    return onnx.helper.make_tensor_value_info(name, _type(array), [None] * array.ndim)


def _external(name: str, array: NDArray[Any]) -> onnx.TensorProto:
    tensor = onnx.TensorProto(name=name, dims=array.shape, data_type=_type(array))
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", EXTERNAL), ("offset", "0"), ("length", str(array.nbytes))):
        tensor.external_data.add(key=key, value=value)
    return tensor


def _options() -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    options.enable_cpu_mem_arena = options.enable_mem_pattern = False
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options
