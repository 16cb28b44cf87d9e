"""The graphs of the model that is asked by words, beside those of ``edge_rsvlm.export.default.graphs`` that it shares
(encoder, change, embedding and decoder of words).

detect          c2 .. c5                              -> embeddings [N, 64, H/4, W/4], shift, scale [N, 1, H/4, W/4],
                                                         ltrb [N, 4, H/4, W/4] in tile px
segment         c3 .. c5                              -> embeddings [N, 64, H/8, W/8]
match           c5                                    -> embedding [N, 128]
text            input_ids, attention_mask [N, T]      -> embedding [N, 128], query [N, 64], label [N, 64]
language_prefix c4, c5                                -> features [N, H/32 * W/32, D]
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from edge_rsvlm.export.default.model.boxes import BoxHead
from edge_rsvlm.export.default.model.dense import DenseHead
from edge_rsvlm.export.default.model.language import VisualPrefix, visual_tokens
from edge_rsvlm.export.default.model.pooled import PooledHead
from edge_rsvlm.export.default.model.pyramid import Pyramid
from edge_rsvlm.export.default.model.text import SPACES, TextEncoder

DETECT_MAPS, SEGMENT_MAPS, TOKEN_MAPS = ("c2", "c3", "c4", "c5"), ("c3", "c4", "c5"), ("c4", "c5")


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
