"""Which objects a phrase means: a text and a set of objects, read together.

Letters: N phrases, T tokens, C objects, F features of each (``edge_rsvlm.tasks.refer``), D width. The layers are those
of the decoder, looking both ways; objects have no order, so all of them stand at the position before the text.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from edge_rsvlm.export.default.model.decoder import EPSILON, DecoderConfig, Layer, rotary

WIDTH, HIDDEN, LAYERS, HEADS = 128, 256, 3, 4


class Refer(nn.Module):
    """Tokens and their mask [N, T], objects [N, C, F] and theirs [N, C] -> logits [N, C]."""

    def __init__(self, vocabulary: int, features: int, dropout: float = 0.0) -> None:
        super().__init__()
        config = DecoderConfig(vocabulary, WIDTH, HIDDEN, LAYERS, HEADS, dropout)
        self.embed_tokens = nn.Embedding(vocabulary, WIDTH)
        nn.init.normal_(self.embed_tokens.weight, std=0.05)
        self.read = nn.Sequential(nn.Linear(features, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, WIDTH))
        self.layers = nn.ModuleList(Layer(config) for _ in range(LAYERS))
        self.norm = nn.RMSNorm(WIDTH, eps=EPSILON)
        self.out = nn.Linear(WIDTH, 1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, objects: Tensor, objects_mask: Tensor) -> Tensor:
        words = input_ids.shape[1]
        x = torch.cat([self.embed_tokens(input_ids), self.read(objects)], dim=1)
        order = torch.arange(1, words + 1, device=x.device)
        positions = torch.cat([order, torch.zeros_like(objects_mask[0])])[None]
        cos, sin = rotary(positions, WIDTH // HEADS)
        seen = torch.cat([attention_mask, objects_mask], dim=1).bool()[:, None, None, :]
        for layer in self.layers:
            x, _, _ = layer(x, cos, sin, seen, None)
        logits: Tensor = self.out(self.norm(x[:, words:]))[..., 0]
        return logits
