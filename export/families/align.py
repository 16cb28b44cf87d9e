"""ALIGN (Jia et al. 2021, "Scaling Up Visual and Vision-Language Representation Learning ...")."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, nn
from transformers import AlignModel

from edge_rsvlm.export.families.dual_encoder import DualEncoder, stored_scalar, unit

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class PooledMap(nn.Module):
    """tiles [N, 3, H, W] -> embedding [N, D] of unit length.

    The model pools with a window far larger than its last map, which runtimes refuse; it is the mean of the map.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.vision = model.vision_model
        self.takes_mean = model.config.vision_config.pooling_type == "mean"

    def forward(self, tiles: Tensor) -> Tensor:
        map_NDHW = self.vision(pixel_values=tiles).last_hidden_state
        return unit(map_NDHW.mean((2, 3)) if self.takes_mean else map_NDHW.amax((2, 3)))


class Align(DualEncoder):
    name = "align"
    model_types = ("align",)
    image_module = PooledMap

    def model_class(self, config: PretrainedConfig) -> type[nn.Module]:
        return AlignModel

    def logits(self, folder: Path) -> tuple[float, float]:
        return 1.0 / stored_scalar(folder, "temperature"), 0.0
