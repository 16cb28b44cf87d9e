"""The families that this package exports, by the ``model_type`` of config.json."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edge_rsvlm.errors import UsageError
from edge_rsvlm.export.checkpoint.reading import Checkpoint, open_checkpoint
from edge_rsvlm.export.default.checkpoint import is_stages, open_stages
from edge_rsvlm.export.default.family import Default
from edge_rsvlm.export.families.align import Align
from edge_rsvlm.export.families.blip_2 import Blip2
from edge_rsvlm.export.families.clip import Clip
from edge_rsvlm.export.families.dual_encoder import VisionTextDualEncoder
from edge_rsvlm.export.families.idefics3 import Idefics3
from edge_rsvlm.export.families.llava import Llava
from edge_rsvlm.export.families.owl import Owl
from edge_rsvlm.export.families.qwen2_vl import Qwen2VL
from edge_rsvlm.export.families.siglip import Siglip
from edge_rsvlm.export.families.vilt import Vilt
from edge_rsvlm.export.families.visual_bert import VisualBert

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PretrainedConfig

    from edge_rsvlm.export.families.base import Family

FAMILIES: tuple[Family, ...] = (
    Align(),
    Blip2(),
    Clip(),
    Default(),
    Idefics3(),
    Llava(),
    Owl(),
    Qwen2VL(),
    Siglip(),
    Vilt(),
    VisionTextDualEncoder(),
    VisualBert(),
)
BY_MODEL_TYPE = {model_type: family for family in FAMILIES for model_type in family.model_types}


def open_source(folder: Path) -> Checkpoint:
    """A checkpoint of transformers, or the stages of the default model. InputError when it is neither."""
    return open_stages(folder) if is_stages(folder) else open_checkpoint(folder)


def family_of(config: PretrainedConfig) -> Family:
    """The family that reads this config; raises UsageError for a model that none of them exports."""
    family = BY_MODEL_TYPE.get(config.model_type)
    if family is None:
        raise UsageError(
            f"models of type '{config.model_type}' cannot be exported",
            fix=f"known types are {', '.join(sorted(BY_MODEL_TYPE))}",
        )
    wanted = family.model_class(config).__name__
    if config.architectures and wanted not in config.architectures:
        raise UsageError(
            f"the checkpoint holds a {' or '.join(config.architectures)}",
            fix=f"for {family.name} a checkpoint of {wanted} can be exported",
        )
    return family
