"""A whole image as one vector, in the space of texts. Shapes: N images, D = 128 dimensions."""

from __future__ import annotations

from torch import Tensor, nn

from edge_rsvlm.export.default.model.encoder import Head1280
from edge_rsvlm.export.default.model.text import EMBEDDING


class PooledHead(nn.Module):
    """c5 [N,320,h,w] -> [N,D] of any length: MobileNetV2's own last convolution, its mean over the map, projected."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.head = Head1280()
        self.drop = nn.Dropout(dropout)
        self.project = nn.Linear(1280, EMBEDDING)

    def forward(self, c5: Tensor) -> Tensor:
        out: Tensor = self.project(self.drop(self.head(c5).mean(dim=(2, 3))))
        return out
