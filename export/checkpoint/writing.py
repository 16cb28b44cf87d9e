"""Writing a safetensors file tensor by tensor: the format's header comes first, so sizes must be known, values not."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from edge_rsvlm.export.graphs.external_data import Progress

BLOCK_ELEMENTS = 4 << 20
HEADER_ALIGNMENT = 8


@dataclass(frozen=True)
class Pending:
    """A float32 tensor of known shape that ``read`` computes when its turn comes."""

    shape: tuple[int, ...]
    read: Callable[[], Tensor]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * torch.float32.itemsize


def write_float32(path: Path, tensors: Mapping[str, Pending], progress: Progress | None = None) -> None:
    """Write ``tensors`` in order, holding one at a time. Format: huggingface/safetensors, README, "Format"."""
    header, end = {}, 0
    for name, pending in tensors.items():
        header[name] = {"dtype": "F32", "shape": list(pending.shape), "data_offsets": [end, end + pending.bytes]}
        end += pending.bytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % HEADER_ALIGNMENT)
    done = 0
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, pending in tensors.items():
            values = pending.read()
            if tuple(values.shape) != pending.shape:
                raise ValueError(f"'{name}' is {tuple(values.shape)}, announced as {pending.shape}")
            for block in values.reshape(-1).split(BLOCK_ELEMENTS):
                file.write(block.float().contiguous().numpy().data)
            done += pending.bytes
            if progress:
                progress(done, end)
