"""Feature pyramid that the box head and the dense map share: coarse maps are brought down and added to finer ones.

Source: Lin et al. 2017, "Feature Pyramid Networks for Object Detection". Shapes: N batch, H, W tile pixels.
"""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn

from edge_rsvlm.export.default.model.encoder import CHANNELS
from edge_rsvlm.export.default.model.layers import ConvNormAct, Separable, upsample2

LEVELS = ("c5", "c4", "c3", "c2")
WIDTH = 64


class Pyramid(nn.Module):
    """c2..c5 -> p2 [N,64,H/4,W/4] and p3 [N,64,H/8,W/8]."""

    def __init__(self) -> None:
        super().__init__()
        self.lateral = nn.ModuleDict({name: ConvNormAct(CHANNELS[name], WIDTH) for name in LEVELS})
        self.smooth = nn.ModuleDict({name: Separable(WIDTH, WIDTH) for name in LEVELS})

    def forward(self, maps: dict[str, Tensor], last: str = "c2") -> dict[str, Tensor]:
        """The maps by name (p3 alone where ``last`` is c3)."""
        x = self.smooth["c5"](self.lateral["c5"](maps["c5"]))
        found: dict[str, Tensor] = {}
        for _, name in pairwise(LEVELS):
            x = self.smooth[name](self.lateral[name](maps[name]) + upsample2(x))
            found[name.replace("c", "p")] = x
            if name == last:
                break
        return found
