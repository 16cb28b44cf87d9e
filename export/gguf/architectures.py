"""What llama.cpp calls the text models that it shares with transformers, and their tensors.

Names of llama.cpp: ggml-org/llama.cpp, src/llama-arch.cpp.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""Modules of one block: theirs, and those of transformers. Each has a weight, and may have a bias."""


@dataclass(frozen=True)
class Architecture:
    name: str
    """``general.architecture`` of the file."""
    interleaved: bool
    """Numbers that rotary embeddings turn together lie side by side, not half a head apart."""
    layer: Mapping[str, str]


LLAMA = Architecture("llama", interleaved=True, layer=LAYER)
QWEN2 = Architecture("qwen2", interleaved=False, layer=LAYER)
QWEN2VL = Architecture("qwen2vl", interleaved=False, layer=LAYER)

BY_TEXT_TYPE = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": QWEN2,
    "qwen2_vl_text": QWEN2VL,
    "qwen2_5_vl_text": QWEN2VL,
}
"""By the ``model_type`` of a text config."""
