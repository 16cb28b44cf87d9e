"""Detection head: feature pyramid to stride 4, class heat map and box sides per cell.

Shapes: N batch, K classes, H, W tile pixels. A cell (i, j) has its centre at tile pixel ((j + 0.5) * 4, (i + 0.5) * 4)
and `ltrb` are the distances in tile pixels from there to the left, top, right and bottom sides.
Sources: heat map, Zhou et al. 2019 ("Objects as Points"); Gaussian-weighted sides, Liu et al. 2019 ("TTFNet").
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from edge_rsvlm.export.default.model.encoder import CHANNELS
from edge_rsvlm.export.default.model.layers import ConvNormAct, Separable, upsample2

CLASSES = ("airplane", "helicopter", "boat", "car", "truck", "bus", "van")
STRIDE = 4
WIDTH = 64
PRIOR_SCORE = 0.01
LEVELS = ("c5", "c4", "c3", "c2")
MIN_LOG_SIDE, MAX_LOG_SIDE = -1.0, 6.3  # e**6.3 = 544 px: an object larger than a tile has no box


class DetectHead(nn.Module):
    """Maps c2..c5 -> (score logits [N,K,H/4,W/4], log sides [N,4,H/4,W/4])."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.lateral = nn.ModuleDict({name: ConvNormAct(CHANNELS[name], width) for name in LEVELS})
        self.smooth = nn.ModuleDict({name: Separable(width, width) for name in LEVELS})
        self.score = nn.Sequential(Separable(width, width, 5), nn.Conv2d(width, len(CLASSES), 1))
        self.sides = nn.Sequential(Separable(width, width, 5), nn.Conv2d(width, 4, 1))
        self._init_outputs()

    def _init_outputs(self) -> None:
        # Rare positives: start at the prior so that the first steps are not spent on the background.
        for branch, std, bias in (
            (self.score, 0.01, -math.log(1 / PRIOR_SCORE - 1)),
            (self.sides, 0.01, math.log(16.0)),
        ):
            conv = branch[-1]
            assert isinstance(conv, nn.Conv2d) and conv.bias is not None
            nn.init.normal_(conv.weight, std=std)
            nn.init.constant_(conv.bias, bias)

    def forward(self, maps: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        x: Tensor | None = None
        for name in LEVELS:
            lateral = self.lateral[name](maps[name])
            x = self.smooth[name](lateral if x is None else lateral + upsample2(x))
        assert x is not None
        return self.score(x), self.sides(x).clamp(MIN_LOG_SIDE, MAX_LOG_SIDE)


def outputs(logits: Tensor, log_sides: Tensor) -> tuple[Tensor, Tensor]:
    """Head outputs -> (`scores` probabilities, `ltrb` in tile px)."""
    return torch.sigmoid(logits), torch.exp(log_sides)
