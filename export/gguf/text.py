"""The text model of a checkpoint as llama.cpp sees it: its sizes, and which of the checkpoint's tensors is which.

Letters: H heads of K numbers each, D width of the model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import gguf
import torch
from torch import Tensor

from edge_rsvlm.errors import UsageError
from edge_rsvlm.export.checkpoint.reading import LazyTensor, MemoryTensor
from edge_rsvlm.export.checkpoint.skeleton import skeleton
from edge_rsvlm.export.default.family import Default
from edge_rsvlm.export.families.base import Family, Source
from edge_rsvlm.export.families.causal_decoder import SLIDING
from edge_rsvlm.export.families.generation import GenerativeFamily
from edge_rsvlm.export.gguf import default
from edge_rsvlm.export.gguf.architectures import BY_TEXT_TYPE, Architecture
from edge_rsvlm.export.gguf.files import Change, Entry, same

if TYPE_CHECKING:
    from transformers import PretrainedConfig

ROPE_TYPES = ("default", "linear", "llama3")
ONNX_INSTEAD = "export it with an onnx target"


@dataclass(frozen=True)
class TextParts:
    """``names`` are those of the checkpoint's tensors by llama.cpp's; ``config`` is the text model's."""

    architecture: Architecture
    config: PretrainedConfig
    names: Mapping[str, str]

    @property
    def heads(self) -> tuple[int, int]:
        """Of queries, and of keys and values."""
        heads = self.config.num_attention_heads
        return heads, getattr(self.config, "num_key_value_heads", None) or heads

    @property
    def head_width(self) -> int:
        return getattr(self.config, "head_dim", None) or self.config.hidden_size // self.heads[0]

    @property
    def cache_bytes_per_token(self) -> int:
        """Of keys and values in half precision, which llama.cpp keeps for its whole context."""
        return int(2 * 2 * self.config.num_hidden_layers * self.heads[1] * self.head_width)

    @property
    def rope(self) -> Mapping[str, Any]:
        return self.config.rope_parameters

    @property
    def context_tokens(self) -> int:
        """As far as llama.cpp, which looks back to the start in every layer, computes what transformers does."""
        most: int = self.config.max_position_embeddings
        window: int | None = getattr(self.config, "sliding_window", None)
        layers = getattr(self.config, "layer_types", None)
        return min(most, window) if window and (layers is None or SLIDING in layers) else most


def refusal(family: Family, source: Source) -> str | None:
    """Why llama.cpp cannot compute the text model of this checkpoint; None: it can."""
    if isinstance(family, Default):
        return None
    if not isinstance(family, GenerativeFamily):
        return f"models of the family {family.name} write no text"
    text = source.config.text_config
    if text.model_type not in BY_TEXT_TYPE:
        known = ", ".join(sorted(BY_TEXT_TYPE))
        return f"llama.cpp does not know the text model {text.model_type} of {family.name} (known here: {known})"
    if text.hidden_act != "silu":
        return f"llama.cpp computes {text.model_type} with silu, this one was trained with {text.hidden_act}"
    rope = text.rope_parameters
    if rope.get("rope_type", "default") not in ROPE_TYPES:
        return f"rotary embeddings of the type '{rope['rope_type']}' cannot be written to GGUF"
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        return "rotary embeddings of a part of every head cannot be written to GGUF"
    return None


def text_parts(
    family: Family, source: Source, weights: Mapping[str, LazyTensor], config: PretrainedConfig
) -> TextParts:
    """UsageError for a model that llama.cpp does not know, or with tensors that it would not use."""
    if reason := refusal(family, source):
        raise UsageError(reason, fix=ONNX_INSTEAD)
    if isinstance(family, Default):
        named = _named(default.ARCHITECTURE, *default.NAMES, weights)
        return TextParts(default.ARCHITECTURE, default.text_config(config), named)
    assert isinstance(family, GenerativeFamily)
    model = skeleton(family.model_class(config), config)
    text = family.text_model(model)
    names = {id(module): name for name, module in model.named_modules()}
    embed, body, head = (names[id(module)] for module in (text.embed, text.body, text.head))
    architecture = BY_TEXT_TYPE[config.text_config.model_type]
    return TextParts(architecture, config.text_config, _named(architecture, embed, body, head, weights))


def _named(
    architecture: Architecture, embed: str, body: str, head: str, weights: Mapping[str, LazyTensor]
) -> dict[str, str]:
    found = {"token_embd.weight": f"{embed}.weight", "output_norm.weight": f"{body}.norm.weight"}
    if weights[f"{head}.weight"] is not weights[f"{embed}.weight"]:
        found["output.weight"] = f"{head}.weight"
    for name in weights:
        if name.startswith(f"{body}.layers."):
            number, _, rest = name.removeprefix(f"{body}.layers.").partition(".")
            module, _, kind = rest.rpartition(".")
            theirs = {ours: its for its, ours in architecture.layer.items()}
            if module not in theirs:
                raise UsageError(f"llama.cpp's {architecture.name} has no tensor for '{name}'", fix=ONNX_INSTEAD)
            found[f"blk.{number}.{theirs[module]}.{kind}"] = name
    return found


def entries(parts: TextParts, weights: Mapping[str, LazyTensor]) -> Iterator[Entry]:
    """Every tensor of the file."""
    for name, source in parts.names.items():
        yield Entry(name, weights[source], _change(parts, name))
    if parts.rope.get("rope_type") == "llama3":
        yield Entry("rope_freqs.weight", MemoryTensor(llama3_divisors(parts.rope, parts.head_width)))


def _change(parts: TextParts, name: str) -> Change:
    if not parts.architecture.interleaved:
        return same
    heads = dict(zip(("attn_q", "attn_k"), parts.heads, strict=True)).get(name.split(".")[-2])
    return same if heads is None else lambda tensor: interleave(tensor, heads)


def interleave(weight: Tensor, heads: int) -> Tensor:
    """Rows [H * K, ...] of a projection whose rotary pairs (i, i + K/2) become (2i, 2i + 1)."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.transpose(1, 2).reshape(weight.shape)


def llama3_divisors(rope: Mapping[str, Any], head_width: int) -> Tensor:
    """[K/2], by which the rotary frequencies are divided (Llama 3.1, Meta 2024: long waves by ``factor``, short ones
    not, those between in proportion)."""
    frequencies = 1.0 / rope["rope_theta"] ** (torch.arange(0, head_width, 2, dtype=torch.float64) / head_width)
    turns = rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return (1.0 / ((1 - smooth) / rope["factor"] + smooth)).float()


def describe(parts: TextParts, writer: gguf.GGUFWriter) -> None:
    """Sizes of the text model."""
    config, (heads, heads_kv) = parts.config, parts.heads
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(parts.context_tokens)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads_kv)
    writer.add_key_length(parts.head_width)
    writer.add_value_length(parts.head_width)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(parts.head_width)
    writer.add_rope_freq_base(parts.rope["rope_theta"])
    if parts.rope.get("rope_type") == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(parts.rope["factor"])
    if sections := parts.rope.get("mrope_section"):
        writer.add_rope_dimension_sections([*sections, *[0] * (4 - len(sections))])
