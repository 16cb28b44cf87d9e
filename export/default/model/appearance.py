"""How things look, for comparison with examples: maps of the encoder whose channels count alike.

Shapes: N batch, D = 152 channels of MAPS together, h, w cells of STRIDE tile pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from edge_rsvlm.export.default.model.encoder import CHANNELS, STRIDES
from edge_rsvlm.export.default.model.layers import upsample2

MAPS = ("c2", "c3", "c4")
"""Finest first. Coarser ones see what is around a thing more than the thing."""
FEATURES = sum(CHANNELS[name] for name in MAPS)
STRIDE = STRIDES[MAPS[0]]


class Appearance(nn.Module):
    """c2 [N,24,h,w], c3 [N,32,h/2,w/2], c4 [N,96,h/4,w/4] -> [N,D,h,w]: minus the mean, over the standard deviation."""

    mean: Tensor
    deviation: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(FEATURES))
        self.register_buffer("deviation", torch.ones(FEATURES))

    def forward(self, c2: Tensor, c3: Tensor, c4: Tensor) -> Tensor:
        """Coarse maps are changed before they are large."""
        channels = [CHANNELS[name] for name in MAPS]
        means, deviations = (of[:, None, None].split(channels) for of in (self.mean, self.deviation))
        fine, middle, coarse = (
            (of - mean) / deviation for of, mean, deviation in zip((c2, c3, c4), means, deviations, strict=True)
        )
        return torch.cat([fine, upsample2(torch.cat([middle, upsample2(coarse)], dim=1))], dim=1)
