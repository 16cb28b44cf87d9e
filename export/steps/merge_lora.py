"""Step ``merge_lora``: the tensors that adapters change, merged one at a time into ``merged.safetensors`` (float32)."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from edge_rsvlm.export.adapters.reading import Adapter
from edge_rsvlm.export.adapters.resolve import Resolution, resolve
from edge_rsvlm.export.adapters.updates import Update, merge
from edge_rsvlm.export.checkpoint.reading import Checkpoint, LazyTensor, list_safetensors
from edge_rsvlm.export.checkpoint.skeleton import skeleton
from edge_rsvlm.export.checkpoint.writing import Pending, write_float32
from edge_rsvlm.export.graphs.external_data import Progress

if TYPE_CHECKING:
    from transformers import PretrainedConfig

FILE = "merged.safetensors"


@dataclass(frozen=True)
class ModelWeights:
    """What a graph is made of: a config, and a tensor for every name of the model's state dict."""

    config: PretrainedConfig
    tensors: Mapping[str, LazyTensor]


def resolution(checkpoint: Checkpoint, model_class: type[nn.Module], adapters: Sequence[Adapter]) -> Resolution:
    return resolve(adapters, skeleton(model_class, checkpoint.config))


def merge_lora(
    tensors: Mapping[str, LazyTensor], found: Resolution, folder: Path, progress: Progress | None = None
) -> dict[str, Any]:
    """Fill ``folder`` with every changed tensor, and with those that must not be shared any more."""
    sources = {name: name for name in found.updates} | dict(found.untied)
    pending = {
        name: Pending(tuple(tensors[source].shape), _Merged(tensors[source], found.updates.get(name, ())))
        for name, source in sorted(sources.items())
    }
    write_float32(folder / FILE, pending, progress)
    return {"tensors": len(pending), "untied": [name for name, _ in found.untied], "notes": list(found.notes)}


def merged_weights(
    checkpoint: Checkpoint, tensors: Mapping[str, LazyTensor], folder: Path, untied: Sequence[str]
) -> ModelWeights:
    """The checkpoint's tensors, those in ``folder`` in their place."""
    config = copy.deepcopy(checkpoint.config)
    if untied:
        for part in (config, config.get_text_config()):
            part.tie_word_embeddings = False
    return ModelWeights(config, {**tensors, **list_safetensors(folder / FILE)})


@dataclass(frozen=True)
class _Merged:
    source: LazyTensor
    updates: tuple[Update, ...]

    def __call__(self) -> Tensor:
        return merge(self.source.read(), self.updates, torch.float32)
