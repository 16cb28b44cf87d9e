"""Tiny random models in GGUF files, written with the ``gguf`` package: a language model, and an image encoder for it.

No two sizes are equal by chance. Weights come as arrays by their names in the file, for whoever computes the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Text:
    """Sizes of a language model."""

    words: int = 320
    width: int = 64
    inner: int = 96
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    head: int = 16
    context: int = 512


@dataclass(frozen=True)
class Eye:
    """Sizes of an image encoder, whose visual tokens join ``scale`` x ``scale`` patches."""

    width: int = 24
    inner: int = 40
    layers: int = 2
    heads: int = 3
    image: int = 32
    patch: int = 4
    scale: int = 2
    longest: int = 64


TINY, EYE = Text(), Eye()
CACHE_BYTES_PER_TOKEN = 2 * 2 * TINY.layers * TINY.kv_heads * TINY.head
"""Keys and values, in half precision."""
SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<end_of_utterance>", "<fake_token_around_image>", "<image>",
    "<global-img>", *(f"<row_{r}_col_{c}>" for r in range(1, 5) for c in range(1, 5)), "<|box_start|>", "<|box_end|>",
)  # fmt: skip
END = SPECIAL.index("<end_of_utterance>")
TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}"
    "{% if message['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{ line['text'] }}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


def text_weights(size: Text = TINY, seed: int = 0, *, biased: bool = False) -> dict[str, np.ndarray]:
    """Of a Llama (of a Qwen2 with biases), q and k in the order of the file; logits lie far apart."""
    rng = np.random.default_rng(seed)

    def matrix(rows: int, columns: int, gain: float = 1.2) -> np.ndarray:
        return rng.standard_normal((rows, columns), np.float32) * np.float32(gain / np.sqrt(columns))

    def vector(length: int, around: float) -> np.ndarray:
        return (around + 0.1 * rng.standard_normal(length)).astype(np.float32)

    found = {
        "token_embd.weight": matrix(size.words, size.width, 4.0),
        "output.weight": matrix(size.words, size.width, 6.0),
        "output_norm.weight": vector(size.width, 1.0),
    }
    for layer in range(size.layers):
        at = f"blk.{layer}"
        rows = {
            "attn_q": size.heads * size.head,
            "attn_k": size.kv_heads * size.head,
            "attn_v": size.kv_heads * size.head,
        }
        for name, length in rows.items():
            found[f"{at}.{name}.weight"] = matrix(length, size.width)
            if biased:
                found[f"{at}.{name}.bias"] = vector(length, 0.0)
        for name in ("attn_norm", "ffn_norm"):
            found[f"{at}.{name}.weight"] = vector(size.width, 1.0)
        found[f"{at}.attn_output.weight"] = matrix(size.width, size.heads * size.head)
        for name in ("ffn_gate", "ffn_up"):
            found[f"{at}.{name}.weight"] = matrix(size.inner, size.width)
        found[f"{at}.ffn_down.weight"] = matrix(size.width, size.inner)
    return found


def vocabulary(words: int = TINY.words) -> list[str]:
    """Special tokens, the bytes in the letters of GPT-2, two line ends as one, and room that nothing uses."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    shifted = iter(range(256, 512))
    letters = [chr(byte if byte in kept else next(shifted)) for byte in range(256)]
    tokens = [*SPECIAL, *letters, 2 * letters[ord("\n")]]
    return tokens + [f"<unused{number}>" for number in range(words - len(tokens))]


def write_text(
    file: Path, weights: Mapping[str, np.ndarray], size: Text = TINY, *, mrope: bool = False, template: str = TEMPLATE
) -> Path:
    """A Llama, or a Qwen2-VL with ``mrope`` sections (2, 3, 3)."""
    import gguf

    writer = gguf.GGUFWriter(str(file), "qwen2vl" if mrope else "llama")
    writer.add_name("tiny")
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_block_count(size.layers)
    writer.add_context_length(size.context)
    writer.add_embedding_length(size.width)
    writer.add_feed_forward_length(size.inner)
    writer.add_head_count(size.heads)
    writer.add_head_count_kv(size.kv_heads)
    writer.add_rope_dimension_count(size.head)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(size.words)
    if mrope:
        writer.add_rope_dimension_sections([2, 3, 3, 0])
    tokens = vocabulary(size.words)
    kinds = [gguf.TokenType.CONTROL] * len(SPECIAL) + [gguf.TokenType.NORMAL] * 257
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds + [gguf.TokenType.UNUSED] * (size.words - len(kinds)))
    end = tokens[len(SPECIAL) + ord("\n")]
    writer.add_token_merges([f"{end} {end}"])
    writer.add_bos_token_id(SPECIAL.index("<|im_start|>"))
    writer.add_eos_token_id(END)
    writer.add_add_bos_token(False)
    writer.add_chat_template(template)
    return _finish(writer, weights, file)


def write_projector(file: Path, size: Text = TINY, v: Eye = EYE, seed: int = 1) -> Path:
    """The image encoder and projector of an Idefics3."""
    import gguf

    rng = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(str(file), "clip")
    writer.add_type("mmproj")
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type("idefics3")
    writer.add_vision_use_gelu(True)
    writer.add_vision_projection_dim(size.width)
    writer.add_vision_image_size(v.image)
    writer.add_vision_patch_size(v.patch)
    writer.add_vision_embedding_length(v.width)
    writer.add_vision_feed_forward_length(v.inner)
    writer.add_vision_block_count(v.layers)
    writer.add_vision_head_count(v.heads)
    writer.add_vision_image_mean([0.5, 0.5, 0.5])
    writer.add_vision_image_std([0.5, 0.5, 0.5])
    writer.add_vision_attention_layernorm_eps(1e-6)
    writer.add_vision_projector_scale_factor(v.scale)
    writer.add_vision_preproc_image_size(v.longest)
    width, inner, joined = v.width, v.inner, v.width * v.scale**2
    shapes = {
        "mm.model.fc.weight": (size.width, joined), "v.patch_embd.weight": (width, 3, v.patch, v.patch),
        "v.patch_embd.bias": (width,), "v.position_embd.weight": ((v.image // v.patch) ** 2, width),
        "v.post_ln.weight": (width,), "v.post_ln.bias": (width,),
    }  # fmt: skip
    for layer in range(v.layers):
        at = f"v.blk.{layer}"
        for name in ("attn_q", "attn_k", "attn_v", "attn_out"):
            shapes |= {f"{at}.{name}.weight": (width, width), f"{at}.{name}.bias": (width,)}
        for name in ("ln1", "ln2"):
            shapes |= {f"{at}.{name}.weight": (width,), f"{at}.{name}.bias": (width,)}
        shapes |= {f"{at}.ffn_up.weight": (inner, width), f"{at}.ffn_up.bias": (inner,)}
        shapes |= {f"{at}.ffn_down.weight": (width, inner), f"{at}.ffn_down.bias": (width,)}
    weights = {}
    for name, shape in shapes.items():
        gain = 0.1 if len(shape) == 1 else 1.2 / np.sqrt(np.prod(shape[1:]))
        centre = 1.0 if len(shape) == 1 and "ln" in name and name.endswith("weight") else 0.0
        weights[name] = (centre + gain * rng.standard_normal(shape)).astype(np.float32)
    return _finish(writer, weights, file)


def _finish(writer: Any, weights: Mapping[str, np.ndarray], file: Path) -> Path:
    for name, array in weights.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def reference_logits(
    weights: Mapping[str, np.ndarray],
    embeds_SD: np.ndarray,
    positions: np.ndarray,
    *,
    see_ahead: np.ndarray | None = None,
) -> np.ndarray:
    """Logits [S, V] of a Llama by NumPy in f64 (Qwen2-VL where positions are [3, S]).

    Rotary pairs are neighbours in a Llama's file, halves in a Qwen's. ``see_ahead`` marks tokens that see each other.
    """
    mrope = positions.ndim == 2
    count = len(embeds_SD)
    angles = _angles(positions)
    mask = np.where(np.tri(count, dtype=bool), 0.0, -np.inf)
    if see_ahead is not None:
        mask[np.ix_(see_ahead, see_ahead)] = 0.0
    hidden = embeds_SD.astype(np.float64)
    for layer in range(TINY.layers):

        def of(name: str, x: np.ndarray, at: str = f"blk.{layer}") -> np.ndarray:
            return x @ weights[f"{at}.{name}.weight"].T.astype(np.float64) + weights.get(f"{at}.{name}.bias", 0.0)

        x = _norm(hidden, weights[f"blk.{layer}.attn_norm.weight"])
        q, k, v = (of(f"attn_{part}", x).reshape(count, -1, TINY.head) for part in "qkv")
        q, k = _turn(q, angles, mrope), _turn(k, angles, mrope)
        k, v = (np.repeat(part, TINY.heads // TINY.kv_heads, axis=1) for part in (k, v))
        scores = np.einsum("shd,thd->hst", q, k) / np.sqrt(TINY.head) + mask
        share = np.exp(scores - scores.max(axis=-1, keepdims=True))
        seen = np.einsum("hst,thd->shd", share / share.sum(axis=-1, keepdims=True), v).reshape(count, -1)
        hidden = hidden + of("attn_output", seen)
        x = _norm(hidden, weights[f"blk.{layer}.ffn_norm.weight"])
        gate = of("ffn_gate", x)
        hidden = hidden + of("ffn_down", gate / (1 + np.exp(-gate)) * of("ffn_up", x))
    return _norm(hidden, weights["output_norm.weight"]) @ weights["output.weight"].T.astype(np.float64)


def _norm(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + 1e-5) * weight


def _angles(positions: np.ndarray) -> np.ndarray:
    """[S, TINY.head / 2]; the first 2 turn by time, the next 3 by height, the last 3 by width."""
    speed = 10000.0 ** (-np.arange(0, TINY.head, 2) / TINY.head)
    axis = np.repeat([0, 1, 2], [2, 3, 3])
    places = positions[axis].T if positions.ndim == 2 else positions[:, None]
    return places * speed


def _turn(x: np.ndarray, angles: np.ndarray, halves: bool) -> np.ndarray:
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
    first, second = (x[..., : TINY.head // 2], x[..., TINY.head // 2 :]) if halves else (x[..., ::2], x[..., 1::2])
    turned = first * cos - second * sin, second * cos + first * sin
    return np.concatenate(turned, -1) if halves else np.stack(turned, -1).reshape(x.shape)
