"""SigLIP (Zhai et al. 2023, "Sigmoid Loss for Language Image Pre-Training"), and SigLIP 2 of one resolution."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn
from transformers import SiglipModel

from edge_rsvlm.export.families.dual_encoder import DualEncoder, stored_scalar

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class Siglip(DualEncoder):
    """Texts are padded to the model's full length, and the padding is seen: it was trained so."""

    name = "siglip"
    model_types = ("siglip",)
    masked_text = False
    score = "sigmoid"
    pads = True

    def model_class(self, config: PretrainedConfig) -> type[nn.Module]:
        return SiglipModel

    def logits(self, folder: Path) -> tuple[float, float]:
        return math.exp(stored_scalar(folder, "logit_scale")), stored_scalar(folder, "logit_bias")
