"""Checkpoint folders as ``save_pretrained`` wrote them, read lazily: headers first, one tensor at a time after.

Layouts: ``model.safetensors``, its shards with an index, ``pytorch_model.bin`` and its shards. Nothing here executes a
pickle: ``torch.load`` runs with ``weights_only=True``, and only to learn where in the file each tensor lies.
"""

from __future__ import annotations

import json
import math
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from edge_rsvlm.errors import InputError
from edge_rsvlm.export.checkpoint.names import match_names
from edge_rsvlm.export.checkpoint.skeleton import skeleton

if TYPE_CHECKING:
    from transformers import PretrainedConfig

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
"""In the order of preference; ``NAME.index.json`` beside it lists shards instead."""
SAFETENSORS_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors format
SEE_FORMATS = "give a folder with config.json and model.safetensors or pytorch_model.bin, whole or in shards"


class LazyTensor(Protocol):
    """A tensor that is read when asked for."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def read(self) -> Tensor:
        """A new tensor on the CPU in the stored dtype."""


@dataclass(frozen=True)
class StoredTensor:
    """Bytes in a checkpoint file; ``strides`` in elements."""

    name: str
    file: Path
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype

    @property
    def span_bytes(self) -> int:
        """From the first to past the last element."""
        if 0 in self.shape:
            return 0
        last = sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))
        return (last + 1) * self.dtype.itemsize

    def read(self) -> Tensor:
        data = torch.empty(self.span_bytes, dtype=torch.uint8)
        with self.file.open("rb") as file:
            file.seek(self.offset)
            if file.readinto(data.numpy()) != self.span_bytes:
                raise InputError(
                    f"{self.file}: ends inside of the tensor '{self.name}'", fix="copy or download the file again"
                )
        return data.view(self.dtype).as_strided(self.shape, self.strides)


@dataclass(frozen=True)
class MemoryTensor:
    """A tensor already in memory: old ``.bin`` files can only be read whole, and computed buffers are in no file."""

    tensor: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.tensor.dtype
        return dtype

    def read(self) -> Tensor:
        return self.tensor.clone()


@dataclass(frozen=True)
class Checkpoint:
    """A folder, its parsed config, and its tensors by the names in the files."""

    folder: Path
    config: PretrainedConfig
    files: tuple[Path, ...]
    tensors: Mapping[str, LazyTensor]

    def weights(self, model_class: type[nn.Module], config: PretrainedConfig | None = None) -> dict[str, LazyTensor]:
        """Tensors by the names of ``model_class``'s state dict: every name, tied ones sharing one tensor.

        InputError names the keys that are missing, unknown, met twice, or of another shape.
        """
        model = skeleton(model_class, config or self.config)
        computed = {name: MemoryTensor(buffer) for name, buffer in model.named_buffers(remove_duplicate=False)}
        return match_names(model, self.tensors, computed, self.folder)


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read config and headers. InputError when the folder is not a checkpoint, or its weights are quantized."""
    config = read_config(folder)
    files = _weight_files(folder)
    tensors: dict[str, LazyTensor] = {}
    for path in files:
        found = list_safetensors(path) if path.suffix == ".safetensors" else _list_pickled(path)
        if twice := tensors.keys() & found.keys():
            raise InputError(f"{path}: {_some(twice)} already in another shard", fix="remove the shard that is extra")
        tensors.update(found)
    return Checkpoint(folder, config, files, tensors)


def read_config(folder: Path) -> PretrainedConfig:
    """``config.json`` by transformers; InputError when it is missing, unknown to it, or of quantized weights."""
    from transformers import AutoConfig

    if not (folder / "config.json").is_file():
        raise InputError(f"no config.json in {folder}", fix=SEE_FORMATS)
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise InputError(
            f"{folder / 'config.json'}: transformers cannot read it ({error})",
            fix="check model_type; models with code of their own cannot be exported",
        ) from error
    if getattr(config, "quantization_config", None) is not None:
        raise InputError(f"{folder} holds quantized weights", fix="export the checkpoint that it was quantized from")
    return config


def has_weights(folder: Path) -> bool:
    return any((folder / name).is_file() or (folder / f"{name}.index.json").is_file() for name in WEIGHT_FILES)


def _weight_files(folder: Path) -> tuple[Path, ...]:
    for name in WEIGHT_FILES:
        if (folder / name).is_file():
            return (folder / name,)
        index = folder / f"{name}.index.json"
        if index.is_file():
            return _shards(index)
    raise InputError(f"no weights in {folder}", fix=SEE_FORMATS)


def _shards(index: Path) -> tuple[Path, ...]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{index}: not an index of shards", fix="copy or download the file again") from error
    paths = tuple(index.parent / str(name) for name in names)
    for path in paths:
        if path.parent != index.parent or not path.is_file():
            raise InputError(f"{index} lists '{path.name}', which is not there", fix="complete the checkpoint folder")
    return paths


def list_safetensors(path: Path) -> dict[str, LazyTensor]:
    """The header: a little-endian u64 length, then JSON of dtype, shape and data offsets by name."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
            raise _corrupt(path)
        text = file.read(length)
    try:
        entries = json.loads(text)
        entries.pop("__metadata__", None)
        return {name: _safetensors_entry(path, name, 8 + length, size, entry) for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _corrupt(path) from error


def _safetensors_entry(path: Path, name: str, start: int, file_bytes: int, entry: dict[str, Any]) -> StoredTensor:
    if entry["dtype"] not in SAFETENSORS_DTYPES:
        raise InputError(f"{path}: '{name}' is {entry['dtype']}", fix="export from float32, float16 or bfloat16")
    shape = tuple(int(size) for size in entry["shape"])
    begin, end = entry["data_offsets"]
    tensor = StoredTensor(
        name, path, start + begin, shape, _contiguous(shape), SAFETENSORS_DTYPES[entry["dtype"]]
    )  # fmt: skip
    if min((begin, *shape)) < 0 or end - begin != tensor.span_bytes or start + end > file_bytes:
        raise _corrupt(path)
    return tensor


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def _list_pickled(path: Path) -> dict[str, LazyTensor]:
    """Files of torch >= 1.6 are zip archives: loaded as fake tensors, which know their place in the file."""
    archive = zipfile.is_zipfile(path)
    try:
        if archive:
            with FakeTensorMode():
                state = torch.load(path, map_location="cpu", weights_only=True)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise InputError(
            f"{path}: not a state dict that loads without running code ({str(error).splitlines()[0]})",
            fix="save the model again with safe_serialization=True",
        ) from error
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise InputError(f"{path}: not a state dict", fix="save the model again with save_pretrained")
    return {
        name: _pickled_entry(path, name, value) if archive else MemoryTensor(value) for name, value in state.items()
    }


def _pickled_entry(path: Path, name: str, fake: Tensor) -> StoredTensor:
    start = fake.untyped_storage()._checkpoint_offset + fake.storage_offset() * fake.dtype.itemsize
    return StoredTensor(name, path, start, tuple(fake.shape), tuple(fake.stride()), fake.dtype)


def _corrupt(path: Path) -> InputError:
    return InputError(f"{path}: not a whole safetensors file", fix="copy or download the file again")


def _some(names: set[str]) -> str:
    return ", ".join(sorted(names)[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
