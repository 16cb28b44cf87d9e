"""The graphs of the default model: parts of it wrapped so that they trace, all with a dynamic batch N.

encoder          tiles [N, 5, H, W]                    -> c1 .. c5
detect           c2 .. c5                              -> embeddings [N, 64, H/4, W/4], shift, scale [N, 1, H/4, W/4],
                                                          ltrb [N, 4, H/4, W/4] in tile px
appearance       c2 .. c4                              -> features [N, 152, H/4, W/4]
segment          c3 .. c5                              -> embeddings [N, 64, H/8, W/8]
change           before_c1 .. c4, after_c1 .. c4       -> change [N, 1, H/2, W/2], a probability
match            c5                                    -> embedding [N, 128]
text             input_ids, attention_mask [N, T]      -> embedding [N, 128], query [N, 64], label [N, 64]
language_prefix  c4, c5                                -> features [N, H/32 * W/32, D]
language_embed   input_ids [N, T]                      -> inputs_embeds [N, T, D]
language_decoder inputs_embeds, past_key_values.*      -> logits [N, 1, V] of the last token, present.*
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from edge_rsvlm.export.default.model.boxes import BoxHead
from edge_rsvlm.export.default.model.change import ChangeHead
from edge_rsvlm.export.default.model.decoder import Cache, Decoder
from edge_rsvlm.export.default.model.dense import DenseHead
from edge_rsvlm.export.default.model.encoder import CHANNELS, Encoder
from edge_rsvlm.export.default.model.language import VisualPrefix, visual_tokens
from edge_rsvlm.export.default.model.pooled import PooledHead
from edge_rsvlm.export.default.model.pyramid import Pyramid
from edge_rsvlm.export.default.model.text import SPACES, TextEncoder

ENCODER_MAPS = tuple(CHANNELS)
DETECT_MAPS, SEGMENT_MAPS, TOKEN_MAPS = ("c2", "c3", "c4", "c5"), ("c3", "c4", "c5"), ("c4", "c5")
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
    def __init__(self, pyramid: Pyramid, boxes: BoxHead) -> None:
        super().__init__()
        self.pyramid, self.boxes = pyramid, boxes

    def forward(self, c2: Tensor, c3: Tensor, c4: Tensor, c5: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        found = self.boxes(self.pyramid(dict(zip(DETECT_MAPS, (c2, c3, c4, c5), strict=True)))["p2"])
        return found.embeddings, found.shift, found.scale, torch.exp(found.log_sides)


class SegmentGraph(nn.Module):
    def __init__(self, pyramid: Pyramid, dense: DenseHead) -> None:
        super().__init__()
        self.pyramid, self.dense = pyramid, dense

    def forward(self, c3: Tensor, c4: Tensor, c5: Tensor) -> Tensor:
        maps = self.pyramid(dict(zip(SEGMENT_MAPS, (c3, c4, c5), strict=True)), last="c3")
        out: Tensor = self.dense(maps["p3"])
        return out


class ChangeGraph(nn.Module):
    def __init__(self, head: ChangeHead) -> None:
        super().__init__()
        self.head = head

    def forward(
        self, b1: Tensor, b2: Tensor, b3: Tensor, b4: Tensor, a1: Tensor, a2: Tensor, a3: Tensor, a4: Tensor
    ) -> Tensor:
        before = dict(zip(CHANGE_MAPS, (b1, b2, b3, b4), strict=True))
        after = dict(zip(CHANGE_MAPS, (a1, a2, a3, a4), strict=True))
        return torch.sigmoid(self.head(before, after))


class MatchGraph(nn.Module):
    def __init__(self, pooled: PooledHead) -> None:
        super().__init__()
        self.pooled = pooled

    def forward(self, c5: Tensor) -> Tensor:
        out: Tensor = self.pooled(c5)
        return out


class TextGraph(nn.Module):
    def __init__(self, text: TextEncoder) -> None:
        super().__init__()
        self.text = text

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        vectors = self.text(input_ids, attention_mask)
        return tuple(vectors[space] for space in SPACES)


class PrefixGraph(nn.Module):
    """The places of cells come from the shape of the map."""

    def __init__(self, prefix: VisualPrefix) -> None:
        super().__init__()
        self.prefix = prefix

    def forward(self, c4: Tensor, c5: Tensor) -> Tensor:
        out: Tensor = self.prefix(visual_tokens(c4, c5))
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
