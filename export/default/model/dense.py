"""Dense map in the space of words: what covers the ground, cell by cell.

Shapes: N batch, D = 64, h, w cells of STRIDE tile pixels. The logit of a label vector is cosine * scale + bias.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edge_rsvlm.export.default.model.boxes import centred, unit
from edge_rsvlm.export.default.model.layers import Separable
from edge_rsvlm.export.default.model.pyramid import WIDTH

STRIDE = 8
DIMENSIONS = 64


class DenseHead(nn.Module):
    """p3 [N,64,h,w] -> embeddings [N,D,h,w]."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Sequential(*(Separable(WIDTH, WIDTH) for _ in range(2)))
        self.embedding = centred(WIDTH, DIMENSIONS)
        self.log_scale = nn.Parameter(torch.tensor(math.log(10.0)))
        self.bias = nn.Parameter(torch.tensor(-4.0))

    def forward(self, p3: Tensor) -> Tensor:
        out: Tensor = self.embedding(self.mix(p3))
        return out

    def logits(self, embeddings: Tensor, labels_KD: Tensor) -> Tensor:
        """[N,K,h,w]."""
        cosine = torch.einsum("ndhw,kd->nkhw", unit(embeddings), F.normalize(labels_KD.float(), dim=1))
        return cosine * self.log_scale.exp() + self.bias
