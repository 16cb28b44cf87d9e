"""The graphs of the default model: parts of it wrapped so that they trace, all with a dynamic batch N.

encoder         tiles [N, 5, H, W]                    -> c1 .. c5
detect          c2 .. c5                              -> scores [N, K, H/4, W/4], ltrb [N, 4, H/4, W/4] in tile px
change          before_c1 .. c4, after_c1 .. c4       -> change [N, 1, H/2, W/2], a probability
caption_prefix  c5                                    -> features [N, T, D]
caption_embed   input_ids [N, T]                      -> inputs_embeds [N, T, D]
caption_decoder inputs_embeds, past_key_values.*      -> logits [N, 1, V] of the last token, present.*
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from edge_rsvlm.export.default.model import change, detect
from edge_rsvlm.export.default.model.decoder import Cache, Captioner, Decoder
from edge_rsvlm.export.default.model.encoder import CHANNELS, Encoder

ENCODER_MAPS = tuple(CHANNELS)
DETECT_MAPS = ("c2", "c3", "c4", "c5")
CHANGE_MAPS = ("c1", "c2", "c3", "c4")
CHANGE_INPUTS = tuple(f"{date}_{name}" for date in ("before", "after") for name in CHANGE_MAPS)


class EncoderGraph(nn.Module):
    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, tiles: Tensor) -> tuple[Tensor, ...]:
        maps = self.encoder(tiles)
        return tuple(maps[name] for name in ENCODER_MAPS)


class DetectGraph(nn.Module):
    def __init__(self, head: detect.DetectHead) -> None:
        super().__init__()
        self.head = head

    def forward(self, c2: Tensor, c3: Tensor, c4: Tensor, c5: Tensor) -> tuple[Tensor, Tensor]:
        return detect.outputs(*self.head(dict(zip(DETECT_MAPS, (c2, c3, c4, c5), strict=True))))


class ChangeGraph(nn.Module):
    def __init__(self, head: change.ChangeHead) -> None:
        super().__init__()
        self.head = head

    def forward(
        self, b1: Tensor, b2: Tensor, b3: Tensor, b4: Tensor, a1: Tensor, a2: Tensor, a3: Tensor, a4: Tensor
    ) -> Tensor:
        before = dict(zip(CHANGE_MAPS, (b1, b2, b3, b4), strict=True))
        after = dict(zip(CHANGE_MAPS, (a1, a2, a3, a4), strict=True))
        return torch.sigmoid(self.head(before, after))


class PrefixGraph(nn.Module):
    def __init__(self, captioner: Captioner) -> None:
        super().__init__()
        self.prefix = captioner.prefix

    def forward(self, c5: Tensor) -> Tensor:
        out: Tensor = self.prefix(c5)
        return out


class EmbedGraph(nn.Module):
    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.embed_tokens = decoder.embed_tokens

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.embed_tokens(tokens)
        return out


class DecoderGraph(nn.Module):
    """One graph for prefill (empty past) and for each further token."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, embeds: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        """``past`` and what follows the logits: the key and the value of each layer, [N, A, T, K]."""
        read, length = past[0].shape[2], embeds.shape[1]
        positions = torch.arange(length, device=embeds.device) + read
        mask = torch.arange(read + length, device=embeds.device)[None, :] <= positions[:, None]
        cache = Cache(torch.stack(past[0::2]), torch.stack(past[1::2]))
        hidden, grown = self.decoder(embeds, positions[None].expand(embeds.shape[0], -1), mask, cache)
        layers = zip(grown.keys.unbind(), grown.values.unbind(), strict=True)
        return self.decoder.logits(hidden[:, -1:]), *(part for pair in layers for part in pair)
