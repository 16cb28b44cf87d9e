"""Checkpoints with their text models as GGUF files, and PyTorch with the weights that such a file really holds."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import gguf
import numpy as np
import torch

from edge_rsvlm.export.default.family import Default
from edge_rsvlm.export.families.base import Family, Source
from edge_rsvlm.export.families.registry import family_of, open_source
from edge_rsvlm.export.gguf.text import text_parts
from edge_rsvlm.export.gguf.writing import write_text_model
from edge_rsvlm.export.steps.merge_lora import ModelWeights
from tests.llama_files import llama


@dataclass(frozen=True)
class Made:
    """A checkpoint as an export reads it, and its text model in F32."""

    family: Family
    source: Source
    weights: ModelWeights
    file: Path

    @cached_property
    def model(self):
        model_class = self.family.model_class(self.source.config)
        return model_class.from_pretrained(self.source.folder, dtype=torch.float32).eval()

    def like(self, file: Path):
        """The model with the weights of ``file``, widened."""
        parts = text_parts(self.family, self.source, self.weights.tensors, self.weights.config)
        model = copy.deepcopy(self.model)
        states = model.state_dict(keep_vars=True)
        heads = dict(zip(("attn_q", "attn_k"), parts.heads, strict=True))
        with torch.no_grad():
            for tensor in gguf.GGUFReader(file).tensors:
                values = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
                module = tensor.name.split(".")[-2]
                if parts.architecture.interleaved and module in heads:
                    values = by_halves(values, heads[module])
                states[parts.names[tensor.name]].copy_(values)
        return model


def by_halves(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows whose rotary pairs lie side by side in the order of transformers, half a head apart."""
    return torch.cat([torch.cat([head[0::2], head[1::2]]) for head in weight.chunk(heads)])


def read(folder: Path, file: Path, precision: str = "F32") -> Made:
    opened = open_source(folder)
    family = family_of(opened.config)
    weights = ModelWeights(opened.config, opened.weights(family.model_class(opened.config)))
    made = Made(family, Source(folder, opened.config), weights, file)
    write_text_model(family, made.source, weights, file, precision)
    return made


@torch.no_grad()
def torch_logits(family: Family, model, ids: Sequence[int], features_TD: np.ndarray | None = None) -> np.ndarray:
    """[S, V] after each of ``ids``, which follow visual tokens where there are some."""
    words = torch.tensor([list(ids)])
    if not isinstance(family, Default):
        return model(words).logits[0].numpy()
    decoder = model.language.decoder
    embeds = decoder.embed(words)
    if features_TD is not None:
        embeds = torch.cat([torch.from_numpy(features_TD)[None], embeds], dim=1)
    order = torch.arange(embeds.shape[1])
    hidden, _ = decoder(embeds, order[None], order[None, :] <= order[:, None])
    return decoder.logits(hidden)[0, -len(ids) :].numpy()


def llama_logits(file: Path, ids: Sequence[int], features_TD: np.ndarray | None = None) -> np.ndarray:
    """The same by llama.cpp."""
    with llama(file) as found:
        seen = 0 if features_TD is None else len(features_TD)
        if features_TD is not None:
            found.embed_logits(features_TD, np.arange(seen)[None])
        return found.logits(list(ids), seen)


def relative(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))
