"""The decoder: a Llama-architecture language model that reads projected visual tokens before the prompt.

Letters: N batch, T tokens, D model width, A heads, K width of a head, V vocabulary, L layers. Sources: RMSNorm, Zhang &
Sennrich 2019; rotary positions in two halves, Su et al. 2021; SwiGLU, Shazeer 2020; all as in Touvron et al. 2023
("LLaMA"). Sizes are multiples of 256, so that K-quants of GGUF fit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ROPE_BASE = 10_000.0
EPSILON = 1e-5


@dataclass(frozen=True)
class DecoderConfig:
    vocabulary: int
    width: int = 256
    hidden: int = 512
    layers: int = 4
    heads: int = 4
    dropout: float = 0.1

    @property
    def head_width(self) -> int:
        return self.width // self.heads


@dataclass(frozen=True)
class Cache:
    """Keys and values of what was read before, [L, N, A, T, K] each."""

    keys: Tensor
    values: Tensor


def rotary(positions_NT: Tensor, head_width: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines [N, 1, T, K] of rotary positions."""
    half = head_width // 2
    frequency = ROPE_BASE ** (-torch.arange(half, device=positions_NT.device, dtype=torch.float32) / half)
    angle = positions_NT[:, None, :, None].float() * frequency
    angle = torch.cat([angle, angle], dim=-1)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-high, low], dim=-1) * sin


class Attention(nn.Module):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            nn.Linear(config.width, config.width, bias=False) for _ in range(4)
        )

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, past: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        shape = (x.shape[0], x.shape[1], self.config.heads, self.config.head_width)
        q, k, v = (project(x).view(shape).transpose(1, 2) for project in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q, cos, sin).to(v.dtype), rotate(k, cos, sin).to(v.dtype)
        if past is not None:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        # No dropout here: the fused kernels for processors have none.
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.o_proj(y.transpose(1, 2).flatten(2)), k, v


class Layer(nn.Module):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.width, eps=EPSILON)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.width, eps=EPSILON)
        self.gate_proj = nn.Linear(config.width, config.hidden, bias=False)
        self.up_proj = nn.Linear(config.width, config.hidden, bias=False)
        self.down_proj = nn.Linear(config.hidden, config.width, bias=False)
        self.drop = nn.Dropout(config.dropout)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, past: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        y, k, v = self.self_attn(self.input_layernorm(x), cos, sin, mask, past)
        x = x + self.drop(y)
        z = self.post_attention_layernorm(x)
        z = self.down_proj(F.silu(self.gate_proj(z)) * self.up_proj(z))
        return x + self.drop(z), k, v


class Decoder(nn.Module):
    """Embeddings [N, T, D] -> logits [N, T, V]; input and output embeddings are tied."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocabulary, config.width)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.width, eps=EPSILON)
        self.apply(_initialise)

    def embed(self, tokens_NT: Tensor) -> Tensor:
        out: Tensor = self.embed_tokens(tokens_NT)
        return out

    def logits(self, hidden_NTD: Tensor) -> Tensor:
        return F.linear(self.norm(hidden_NTD), self.embed_tokens.weight)

    def forward(
        self, embeds_NTD: Tensor, positions_NT: Tensor, mask: Tensor, past: Cache | None = None
    ) -> tuple[Tensor, Cache]:
        """Hidden states [N, T, D] before the last norm, and the grown cache.

        ``mask`` is True where a query (row) may look at a key (column), and broadcasts to [N, A, T, past + T].
        """
        cos, sin = rotary(positions_NT, self.config.head_width)
        x, keys, values = embeds_NTD, [], []
        for i, layer in enumerate(self.layers):
            x, k, v = layer(x, cos, sin, mask, None if past is None else (past.keys[i], past.values[i]))
            keys.append(k)
            values.append(v)
        return x, Cache(torch.stack(keys), torch.stack(values))


def _initialise(module: nn.Module) -> None:
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)


def packed_layout(prefix: int, sentences: int, length: int) -> tuple[Tensor, Tensor]:
    """Positions [T] and mask [T, T] of one image's prefix followed by several sentences of ``length`` tokens.

    Each sentence continues the prefix as if it stood alone: training reads the prefix once for all of them.
    """
    own = torch.arange(sentences).repeat_interleave(length)
    sentence = torch.cat([torch.zeros(prefix, dtype=torch.long), own + 1])
    positions = torch.cat([torch.arange(prefix), torch.arange(prefix, prefix + length).repeat(sentences)])
    order = torch.arange(len(sentence))
    causal = order[:, None] >= order[None, :]
    mask = causal & ((sentence[None, :] == 0) | (sentence[:, None] == sentence[None, :]))
    return positions, mask
