"""Scene heads of the vision stage: they keep the encoder's coarse map good for captions, and are not shipped."""

from __future__ import annotations

from torch import Tensor, nn

from edge_rsvlm.export.default.model.encoder import CHANNELS


class SceneHead(nn.Module):
    """c5 [N,320,h,w] -> logits of each label set, from the mean over the map."""

    def __init__(self, sizes: dict[str, int]) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.2)
        self.out = nn.ModuleDict({name: nn.Linear(CHANNELS["c5"], size) for name, size in sizes.items()})

    def forward(self, c5: Tensor) -> dict[str, Tensor]:
        pooled = self.drop(c5.mean(dim=(2, 3)))
        return {name: layer(pooled) for name, layer in self.out.items()}
