"""Text encoder: words -> vectors of the spaces that images are in.

Letters: N texts, T tokens, D width. The layers are those of the decoder (RMSNorm, rotary positions, SwiGLU), looking
both ways; a text is the mean over its tokens. Three spaces: whole images (``embedding``), boxes (``query``) and the
ground (``label``).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from edge_rsvlm.export.default.model import boxes, dense
from edge_rsvlm.export.default.model.decoder import EPSILON, DecoderConfig, Layer, rotary

EMBEDDING = 128
WIDTH, HIDDEN, LAYERS, HEADS = 128, 256, 2, 2
SPACES = {"embedding": EMBEDDING, "query": boxes.DIMENSIONS, "label": dense.DIMENSIONS}


class TextEncoder(nn.Module):
    """Token numbers and what of them is no padding, [N, T] each -> vectors [N, SPACES[name]] by name, of any length."""

    def __init__(self, vocabulary: int, dropout: float = 0.0) -> None:
        super().__init__()
        config = DecoderConfig(vocabulary, WIDTH, HIDDEN, LAYERS, HEADS, dropout)
        self.embed_tokens = nn.Embedding(vocabulary, WIDTH)
        nn.init.normal_(self.embed_tokens.weight, std=0.05)
        self.layers = nn.ModuleList(Layer(config) for _ in range(LAYERS))
        self.norm = nn.RMSNorm(WIDTH, eps=EPSILON)
        self.out = nn.ModuleDict({name: nn.Linear(WIDTH, size, bias=False) for name, size in SPACES.items()})

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        kept = attention_mask.bool()
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        cos, sin = rotary(positions, WIDTH // HEADS)
        x = self.embed_tokens(input_ids)
        for layer in self.layers:
            x, _, _ = layer(x, cos, sin, kept[:, None, None, :], None)
        share = kept[..., None].to(x.dtype)
        mean = (self.norm(x) * share).sum(dim=1) / share.sum(dim=1).clamp(min=1)
        return {name: out(mean) for name, out in self.out.items()}
