"""The default model's decoder as a Llama: RMSNorm, rotary positions in two halves, SwiGLU, tied embeddings."""

from __future__ import annotations

from transformers import LlamaConfig, PretrainedConfig

from edge_rsvlm.export.default.model.decoder import EPSILON, ROPE_BASE, DecoderConfig
from edge_rsvlm.export.gguf.architectures import LLAMA, Architecture

ARCHITECTURE = Architecture(
    "llama", interleaved=True, layer={ours: name.removeprefix("mlp.") for ours, name in LLAMA.layer.items()}
)
EMBED, BODY = "language.decoder.embed_tokens", "language.decoder"
NAMES = (EMBED, BODY, EMBED)
"""Of the token embedding, of what holds layers and norm, and of the head."""
CONTEXT_TOKENS = 2048
"""Positions have no end; there are a few hundred visual tokens, a question and a sentence."""


def text_config(config: PretrainedConfig) -> LlamaConfig:
    """The sizes of DecoderConfig in transformers' words."""
    sizes = DecoderConfig(config.vocabulary)
    return LlamaConfig(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.width,
        intermediate_size=sizes.hidden,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        max_position_embeddings=CONTEXT_TOKENS,
        rms_norm_eps=EPSILON,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_BASE},
        tie_word_embeddings=True,
    )
