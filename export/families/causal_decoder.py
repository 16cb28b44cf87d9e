"""The text half of every generative family: token embedding, and a causal language model with its cache as tensors.

One decoder graph serves the prompt at once (P = 0), the prompt in chunks, and every next token: the mask follows from
the lengths alone. Letters: B batch, S new tokens, P past tokens, D width, V vocabulary, H key-value heads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from edge_rsvlm.errors import UsageError
from edge_rsvlm.export.families.base import GraphInput, GraphPlan

if TYPE_CHECKING:
    from transformers import PretrainedConfig

MASKED = -3e4
"""Added to scores of keys that a query must not see: exp() of it is 0, and half precision can still hold it."""
FULL, SLIDING = "full_attention", "sliding_attention"
CHANGING_ROPE = {
    "dynamic": "take rope_scaling out of config.json: up to max_position_embeddings tokens the model is the same",
    "longrope": "export a model whose rope_type is default, linear, llama3 or yarn",
}
"""Rotary embeddings whose frequencies change with the length of the text, which a graph cannot do."""
PAST, PRESENT = "past_key_values.{layer}.{part}", "present.{layer}.{part}"


@dataclass(frozen=True)
class TextModel:
    """Where the text parts of a transformers model are: ``body`` gives ``last_hidden_state``, ``head`` its logits."""

    embed: nn.Module
    body: nn.Module
    head: nn.Module


class TokenEmbedding(nn.Module):
    """input_ids [B, S] -> inputs_embeds [B, S, D]."""

    def __init__(self, embed: nn.Module) -> None:
        super().__init__()
        self.embed = embed

    def forward(self, input_ids: Tensor) -> Tensor:
        embeds: Tensor = self.embed(input_ids)
        return embeds


class CausalDecoder(nn.Module):
    """inputs_embeds [B, S, D], position_ids [B, S] or [3, B, S], and a key and a value [B, H, P, hd] per layer
    -> logits [B, 1, V] of the last token, and a key and a value [B, H, P + S, hd] per layer."""

    def __init__(self, text: TextModel, config: PretrainedConfig) -> None:
        super().__init__()
        self.body, self.head = text.body, text.head
        self.windows = _windows(config)

    def forward(self, inputs_embeds: Tensor, position_ids: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        cache = DynamicCache(list(zip(past[::2], past[1::2], strict=True)))
        output = self.body(
            inputs_embeds=inputs_embeds,
            attention_mask=self._masks(inputs_embeds, past[0].shape[2]),
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        )
        logits = self.head(output.last_hidden_state[:, -1:])
        present = [part for keys, values, _ in cache for part in (keys, values)]
        return (logits, *present)

    def _masks(self, inputs_embeds: Tensor, past: int) -> Tensor | dict[str, Tensor]:
        masks = {kind: causal_mask(inputs_embeds, past, window) for kind, window in self.windows.items()}
        return masks if len(masks) > 1 else next(iter(masks.values()))


def causal_mask(inputs_embeds: Tensor, past: int, window: int | None) -> Tensor:
    """[1, 1, S, P + S], added to the scores: token s sees the keys up to P + s, the last ``window`` of them."""
    new = inputs_embeds.shape[1]
    keys = torch.arange(past + new)
    queries = torch.arange(new)[:, None] + past
    seen = keys <= queries
    if window is not None:
        seen = seen & (keys > queries - window)
    return torch.where(seen, 0.0, MASKED).to(inputs_embeds.dtype)[None, None]


def _windows(config: PretrainedConfig) -> dict[str, int | None]:
    """How far back each kind of layer sees (None: to the start)."""
    window = getattr(config, "sliding_window", None)
    known = {FULL: None, SLIDING: window}
    kinds = sorted(set(getattr(config, "layer_types", None) or [FULL if window is None else SLIDING]))
    if unknown := set(kinds) - set(known):
        raise UsageError(
            f"the text model {config.model_type} has layers of {', '.join(sorted(unknown))}",
            fix=f"export a model whose layers are {FULL} or {SLIDING}",
        )
    return {kind: known[kind] for kind in kinds}


def _check_rope(config: PretrainedConfig) -> None:
    """UsageError for frequencies that are not the same at every length."""
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [part.get("rope_type") for part in (rope, *rope.values()) if isinstance(part, dict)]
    for kind in CHANGING_ROPE.keys() & kinds:
        raise UsageError(
            f"the text model {config.model_type} has rotary embeddings of the type '{kind}', which is not supported",
            fix=CHANGING_ROPE[kind],
        )


def cache_of(config: PretrainedConfig) -> dict[str, Any]:
    """The manifest's ``cache`` of a text config."""
    heads = config.num_attention_heads
    return {
        "layers": config.num_hidden_layers,
        "heads": getattr(config, "num_key_value_heads", None) or heads,
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // heads,
        "past": PAST,
        "present": PRESENT,
    }


def cache_names(config: PretrainedConfig, pattern: str) -> tuple[str, ...]:
    return tuple(
        pattern.format(layer=layer, part=part) for layer in range(config.num_hidden_layers) for part in ("key", "value")
    )


def embed_plan(find: Callable[[nn.Module], TextModel]) -> GraphPlan:
    """``embed``: the embedding of every token id, those of images included."""
    return GraphPlan(
        name="embed",
        wrap=lambda model: TokenEmbedding(find(model).embed),
        inputs=(GraphInput("input_ids", ("batch", "tokens"), torch.int64),),
        outputs=("inputs_embeds",),
        sizes={"batch": 2, "tokens": 7},
    )


def decoder_plan(config: PretrainedConfig, find: Callable[[nn.Module], TextModel], *, mrope: bool) -> GraphPlan:
    """``decoder`` of a text config; ``mrope`` has three rows of positions."""
    _check_rope(config)
    cache = cache_of(config)
    past = ("batch", cache["heads"], "past", cache["head_dim"])
    positions = (3, "batch", "tokens") if mrope else ("batch", "tokens")
    return GraphPlan(
        name="decoder",
        wrap=lambda model: CausalDecoder(find(model), config),
        inputs=(
            GraphInput("inputs_embeds", ("batch", "tokens", config.hidden_size)),
            GraphInput("position_ids", positions, torch.int64),
            *(GraphInput(name, past) for name in cache_names(config, PAST)),
        ),
        outputs=("logits", *cache_names(config, PRESENT)),
        sizes={"batch": 2, "tokens": 7, "past": 5},
    )
