"""CLIP (Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision")."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn
from transformers import CLIPModel

from edge_rsvlm.export.families.dual_encoder import DualEncoder

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class Clip(DualEncoder):
    """The text's embedding is taken where it ends, and attention is causal: what pads it cannot matter."""

    name = "clip"
    model_types = ("clip",)
    masked_text = False

    def model_class(self, config: PretrainedConfig) -> type[nn.Module]:
        return CLIPModel
