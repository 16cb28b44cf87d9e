"""Idefics3's and SmolVLM's vision for libmtmd (projector ``idefics3``): SigLIP, patches joined, one matrix.

libmtmd cuts every image into tiles and adds an overview, which transformers does wherever an image has more than one
tile. It takes rows of the position embedding in raster order; transformers sorts positions into buckets and for some
grids uses rows twice, so the rows are written in the order in which they are used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from edge_rsvlm.export.families.base import Source
from edge_rsvlm.export.families.idefics3 import AROUND, OVERVIEW, position_ids, tile_px
from edge_rsvlm.export.families.image_processors import Steps, load_image_processor
from edge_rsvlm.export.families.tokenizers import load_tokenizer
from edge_rsvlm.export.gguf.towers import (
    TANH_GELUS,
    Projector,
    VisionWriter,
    Weights,
    each,
    siglip_layers,
    siglip_tower,
)

if TYPE_CHECKING:
    import gguf

TOWER = "model.vision_model"
WRITTEN = ("\n", "\n\n", AROUND, OVERVIEW)
"""What libmtmd looks up as one token each."""


def _refusal(source: Source, steps: Steps) -> str | None:
    config, side = source.config.vision_config, tile_px(source)
    if steps[-1]["op"] != "split" or steps[0]["px"] <= side:
        return "llama.cpp always splits images for Idefics3, and this checkpoint does not"
    if any(step["filter"] != "lanczos3" for step in steps):
        return "llama.cpp resizes overviews for Idefics3 by Lanczos' filter, this checkpoint by another"
    if config.hidden_act not in TANH_GELUS:
        return f"llama.cpp computes SigLIP with GELU by tanh, this one was trained with {config.hidden_act}"
    tokenizer = load_tokenizer(source.folder, source.config)
    for text in WRITTEN:
        if len(tokenizer(text, add_special_tokens=False)["input_ids"]) != 1:
            return f"llama.cpp wants {text!r} to be one token of the tokenizer"
    return siglip_tower(config, side, config.num_hidden_layers).refusal()


def _projector(source: Source, weights: Weights) -> Projector:
    config, side = source.config.vision_config, tile_px(source)
    rows = torch.tensor(position_ids(config.image_size, config.patch_size, side))
    embeddings = f"{TOWER}.embeddings"
    entries = (
        *each(weights, "mm.model.fc", "model.connector.modality_projection.proj"),
        *each(weights, "v.patch_embd", f"{embeddings}.patch_embedding", exact=True),
        *each(weights, "v.position_embd", f"{embeddings}.position_embedding", lambda table: table[rows], exact=True),
        *siglip_layers(weights, TOWER, config.num_hidden_layers),
        *each(weights, "v.post_ln", f"{TOWER}.post_layernorm"),
    )

    def describe(writer: gguf.GGUFWriter) -> None:
        writer.add_vision_use_gelu(True)
        writer.add_vision_projector_scale_factor(source.config.scale_factor)
        longest = int(load_image_processor(source.folder).size["longest_edge"])
        writer.add_vision_preproc_image_size(-(-longest // side) * side)

    tower = siglip_tower(config, side, config.num_hidden_layers)
    return Projector("idefics3", tower, source.config.text_config.hidden_size, entries, describe)


def _steps(source: Source, steps: Steps) -> Steps:
    return steps[:-1]


WRITER = VisionWriter(_refusal, _projector, _steps)
