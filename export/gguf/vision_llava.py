"""LLaVA's vision for libmtmd (projector ``mlp``): SigLIP up to the layer that is read, and two matrices.

Layers above it are not written. With CLIP, libmtmd of llama-cpp-python 0.3.36 appends the class token, and then drops
the first patch instead of it and shifts all positions by one (ggml-org/llama.cpp#25814): features are far off.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from edge_rsvlm.export.families.base import Source
from edge_rsvlm.export.families.image_processors import Steps, fixed_size
from edge_rsvlm.export.families.llava import chosen_layers, skips_first
from edge_rsvlm.export.gguf.towers import (
    TANH_GELUS,
    Projector,
    VisionWriter,
    Weights,
    as_prepared,
    each,
    siglip_layers,
    siglip_tower,
)

if TYPE_CHECKING:
    import gguf

TOWER, PROJECTOR = "model.vision_tower", "model.multi_modal_projector"
FEATURE_LAYERS = "clip.vision.feature_layer"


def _refusal(source: Source, steps: Steps) -> str | None:
    config, vision = source.config, source.config.vision_config
    chosen = chosen_layers(config)
    if len(chosen) != 1:
        return "llama.cpp reads one layer of a LLaVA's tower, and this checkpoint several"
    if vision.model_type != "siglip_vision_model":
        return f"llama.cpp confuses the patches of a LLaVA's {vision.model_type}, and can see by a SigLIP alone"
    if skips_first(config):
        return "llama.cpp reads all patches of SigLIP, and this checkpoint leaves out the first"
    if vision.hidden_act not in TANH_GELUS:
        return f"llama.cpp computes SigLIP with GELU by tanh, this one was trained with {vision.hidden_act}"
    if config.projector_hidden_act not in ("gelu", *TANH_GELUS):
        return (
            f"llama.cpp computes LLaVA's projector with GELU, this one was trained with {config.projector_hidden_act}"
        )
    if fixed_size(steps) != (vision.image_size, vision.image_size):
        return f"llama.cpp wants images of {vision.image_size} x {vision.image_size} pixels, and these are others"
    return siglip_tower(vision, vision.image_size, chosen[0]).refusal()


def _projector(source: Source, weights: Weights) -> Projector:
    config, vision = source.config, source.config.vision_config
    (last,) = chosen_layers(config)
    embeddings = f"{TOWER}.embeddings"
    entries = (
        *each(weights, "v.patch_embd", f"{embeddings}.patch_embedding", exact=True),
        *each(weights, "v.position_embd", f"{embeddings}.position_embedding", exact=True),
        *siglip_layers(weights, TOWER, last),
        *each(weights, "mm.0", f"{PROJECTOR}.linear_1"),
        *each(weights, "mm.2", f"{PROJECTOR}.linear_2"),
    )

    def describe(writer: gguf.GGUFWriter) -> None:
        writer.add_array(FEATURE_LAYERS, [last])
        writer.add_vision_use_gelu(True)

    tower = siglip_tower(vision, vision.image_size, last)
    return Projector("mlp", tower, config.text_config.hidden_size, entries, describe)


WRITER = VisionWriter(_refusal, _projector, as_prepared)
