"""What speaks: visual tokens of the encoder's two coarsest maps, and the decoder that reads them before a prompt.

Letters: N images, T tokens, D decoder width, h, w cells of c5.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edge_rsvlm.export.default.model.decoder import Decoder, DecoderConfig
from edge_rsvlm.export.default.model.encoder import CHANNELS

TOKEN_CHANNELS = CHANNELS["c5"] + 4 * CHANNELS["c4"]
WAVES = 4


def visual_tokens(c4: Tensor, c5: Tensor) -> Tensor:
    """c4 [N,96,2h,2w] and c5 [N,320,h,w] -> [N,704,h,w]: a cell of c5 with the 2 x 2 cells of c4 under it."""
    return torch.cat([c5, F.pixel_unshuffle(c4, 2)], dim=1)


def places(height: int, width: int, like: Tensor) -> Tensor:
    """Where each cell is in the image [h*w, 4 * WAVES]: sines and cosines of its x and y as shares of the whole."""
    y, x = ((torch.arange(n, device=like.device, dtype=torch.float32) + 0.5) / n for n in (height, width))
    yx = torch.stack([y[:, None].expand(height, width), x[None].expand(height, width)], dim=-1).reshape(-1, 2)
    angles = (yx[..., None] * torch.pi * 2.0 ** torch.arange(WAVES, device=like.device)).flatten(1)
    return torch.cat([angles.sin(), angles.cos()], dim=1).to(like.dtype)


class VisualPrefix(nn.Module):
    """[N,704,h,w] -> visual tokens [N, h*w, D], in raster order."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(TOKEN_CHANNELS)
        self.project = nn.Linear(TOKEN_CHANNELS, config.width)
        self.place = nn.Linear(4 * WAVES, config.width, bias=False)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, tokens: Tensor) -> Tensor:
        height, width = tokens.shape[2:]
        seen: Tensor = self.project(self.drop(self.norm(tokens.flatten(2).transpose(1, 2))))
        placed: Tensor = self.place(places(height, width, seen))
        return seen + placed


class Language(nn.Module):
    """The trained pair."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.prefix, self.decoder = VisualPrefix(config), Decoder(config)
