"""GGUF files, written tensor by tensor: header and places come first, so shapes must be known, values not.

Format: ggml-org/ggml, docs/gguf.md. Metadata is the ``gguf`` package's; tensors are widened or halved block by block,
so that memory is that of the largest tensor as stored.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

import gguf
import numpy as np
import torch
from torch import Tensor

from edge_rsvlm.errors import InputError
from edge_rsvlm.export.checkpoint.reading import LazyTensor
from edge_rsvlm.export.graphs.external_data import Progress

Precision = Literal["F32", "F16"]
Change = Callable[[Tensor], Tensor]

ALIGNMENT = gguf.GGUF_DEFAULT_ALIGNMENT
BLOCK_ELEMENTS = 4 << 20
FILE_TYPES = {"F32": gguf.LlamaFileType.ALL_F32, "F16": gguf.LlamaFileType.MOSTLY_F16}


def same(tensor: Tensor) -> Tensor:
    return tensor


@dataclass(frozen=True)
class Entry:
    """A tensor of the file: ``change`` of one of the checkpoint's. It also runs on the meta device, for the shape."""

    name: str
    source: LazyTensor
    change: Change = same
    exact: bool = False
    """Stays in float32 whatever the file's precision, as vectors do."""

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.change(torch.empty(self.source.shape, device="meta")).shape)

    def dtype(self, precision: Precision) -> torch.dtype:
        half = precision == "F16" and len(self.shape) > 1 and not self.exact
        return torch.float16 if half else torch.float32

    def bytes(self, precision: Precision) -> int:
        return math.prod(self.shape) * self.dtype(precision).itemsize


def write_file(
    path: Path,
    architecture: str,
    describe: Callable[[gguf.GGUFWriter], None],
    entries: Sequence[Entry],
    precision: Precision,
    progress: Progress | None = None,
) -> None:
    """Write ``path``: what ``describe`` adds to the metadata, then ``entries`` in order.

    InputError for a tensor that half precision cannot hold.
    """
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_file_type(FILE_TYPES[precision])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    describe(writer)
    for entry in entries:
        dtype = np.dtype(np.float16 if entry.dtype(precision) == torch.float16 else np.float32)
        writer.add_tensor_info(entry.name, entry.shape, dtype, entry.bytes(precision))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    total, done = sum(entry.bytes(precision) for entry in entries), 0
    with path.open("ab") as file:
        _pad(file)
        for entry in entries:
            _write(file, entry, entry.dtype(precision), path)
            _pad(file)
            done += entry.bytes(precision)
            if progress is not None:
                progress(done, total)


def _write(file: BinaryIO, entry: Entry, dtype: torch.dtype, path: Path) -> None:
    values = entry.change(entry.source.read()).reshape(-1)
    for block in values.split(BLOCK_ELEMENTS):
        stored = block.to(dtype)
        if dtype == torch.float16 and bool(stored.isinf().any()):
            raise InputError(
                f"{path.name}: '{entry.name}' has values that half precision cannot hold", fix="take target gguf:F32"
            )
        file.write(stored.contiguous().numpy().data)


def _pad(file: BinaryIO) -> None:
    file.write(bytes(-file.tell() % ALIGNMENT))
