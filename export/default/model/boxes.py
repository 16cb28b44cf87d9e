"""Box head that is asked by vectors, of words or of examples: per cell an embedding, and the sides of a box.

The score of a query vector q is sigmoid((cosine(embedding, q) + shift) * scale) (Minderer et al. 2022, "Simple
Open-Vocabulary Object Detection"), on a heat map of centres (Zhou et al. 2019, "Objects as Points") with sides per
cell (Tian et al. 2019, "FCOS"). Shapes: N batch, D = 64, h, w cells of STRIDE tile pixels: cell (i, j) has its centre
at tile pixel ((j + 0.5) * 4, (i + 0.5) * 4).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edge_rsvlm.export.default.model.layers import Separable
from edge_rsvlm.export.default.model.pyramid import WIDTH

STRIDE = 4
DIMENSIONS = 64
PRIOR_SCORE, FIRST_SCALE = 0.01, 8.0
MIN_LOG_SIDE, MAX_LOG_SIDE = -1.0, 6.3
"""e**6.3 = 544 px: an object larger than a tile has no box."""


@dataclass(frozen=True)
class Found:
    """``embeddings`` [N,D,h,w], ``shift`` and ``scale`` [N,1,h,w], logarithms of the sides [N,4,h,w] in tile px."""

    embeddings: Tensor
    shift: Tensor
    scale: Tensor
    log_sides: Tensor

    def logits(self, queries_QD: Tensor) -> Tensor:
        """[N,Q,h,w] of query vectors of any length."""
        cosine = torch.einsum("ndhw,qd->nqhw", unit(self.embeddings), F.normalize(queries_QD.float(), dim=1))
        return (cosine + self.shift.float()) * self.scale.float()


def unit(embeddings: Tensor) -> Tensor:
    """Of length 1 over the channels, in float32."""
    return F.normalize(embeddings.float(), dim=1)


def centred(c_in: int, c_out: int) -> nn.Sequential:
    """Embeddings around zero: what all cells share would make the cosine of any two of them near 1."""
    return nn.Sequential(nn.Conv2d(c_in, c_out, 1, bias=False), nn.BatchNorm2d(c_out, momentum=0.03, affine=False))


class BoxHead(nn.Module):
    """p2 [N,64,h,w] -> Found."""

    def __init__(self) -> None:
        super().__init__()
        self.what, self.where = (nn.Sequential(*(Separable(WIDTH, WIDTH) for _ in range(2))) for _ in range(2))
        self.embedding = centred(WIDTH, DIMENSIONS)
        self.contrast = nn.Conv2d(WIDTH, 2, 1)
        self.sides = nn.Conv2d(WIDTH, 4, 1)
        # Rare positives: start at the prior, so that the first steps are not spent on the background.
        shift = -math.log(1 / PRIOR_SCORE - 1) / FIRST_SCALE
        for out, bias in ((self.contrast, (shift, FIRST_SCALE - 1)), (self.sides, (math.log(16.0),) * 4)):
            assert out.bias is not None
            nn.init.normal_(out.weight, std=0.01)
            with torch.no_grad():
                out.bias.copy_(torch.tensor(bias))

    def forward(self, p2: Tensor) -> Found:
        what = self.what(p2)
        shift, scale = self.contrast(what).split(1, dim=1)
        sides = self.sides(self.where(p2)).clamp(MIN_LOG_SIDE, MAX_LOG_SIDE)
        return Found(self.embedding(what), shift, F.elu(scale) + 1, sides)
