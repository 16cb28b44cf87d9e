"""Change head: two dates through the same encoder, compared at strides 2..16 and decoded to stride 2.

Shapes: N pairs, C channels, H, W tile pixels. Each level sees both dates (with a learned temporal embedding each) and
their absolute difference; the idea of siamese features with concatenation and difference is Daudt et al. 2018
("Fully Convolutional Siamese Networks for Change Detection").
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, nn

from edge_rsvlm.export.default.model.encoder import CHANNELS
from edge_rsvlm.export.default.model.layers import ConvNormAct, Separable, upsample2

LEVELS = ("c4", "c3", "c2", "c1")
WIDTHS = {"c1": 24, "c2": 32, "c3": 48, "c4": 64}
STRIDE = 2
PRIOR = 0.03


class Compare(nn.Module):
    """Features of two dates [N,C,h,w] x 2 -> [N,C_out,h,w]."""

    def __init__(self, channels: int, c_out: int):
        super().__init__()
        self.date = nn.Parameter(torch.zeros(2, channels, 1, 1))
        self.fuse = nn.Sequential(ConvNormAct(3 * channels, c_out), Separable(c_out, c_out))

    def forward(self, before: Tensor, after: Tensor) -> Tensor:
        out: Tensor = self.fuse(torch.cat([before + self.date[0], after + self.date[1], (after - before).abs()], dim=1))
        return out


class ChangeHead(nn.Module):
    """c1..c4 of both dates -> change logit [N,1,H/2,W/2]."""

    def __init__(self) -> None:
        super().__init__()
        self.compare = nn.ModuleDict({name: Compare(CHANNELS[name], WIDTHS[name]) for name in LEVELS})
        self.drop = nn.Dropout2d(0.1)
        self.up = nn.ModuleDict(
            {name: Separable(WIDTHS[coarse] + WIDTHS[name], WIDTHS[name]) for coarse, name in pairwise(LEVELS)}
        )
        self.out = nn.Conv2d(WIDTHS["c1"], 1, 1)
        nn.init.normal_(self.out.weight, std=0.01)
        assert self.out.bias is not None
        nn.init.constant_(self.out.bias, -math.log(1 / PRIOR - 1))

    def forward(self, before: dict[str, Tensor], after: dict[str, Tensor]) -> Tensor:
        x: Tensor = self.compare["c4"](before["c4"], after["c4"])
        x = self.drop(x)
        for name in LEVELS[1:]:
            x = self.up[name](torch.cat([upsample2(x), self.compare[name](before[name], after[name])], dim=1))
        out: Tensor = self.out(x)
        return out
