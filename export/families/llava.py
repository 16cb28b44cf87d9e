"""LLaVA 1.5 (Liu et al. 2023, "Improved Baselines with Visual Instruction Tuning"), which GeoChat is too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration, LlavaProcessor, PretrainedConfig

from edge_rsvlm.errors import UsageError
from edge_rsvlm.export.families.base import GraphInput, GraphPlan, Source
from edge_rsvlm.export.families.causal_decoder import TextModel
from edge_rsvlm.export.families.chat import adds_special_tokens
from edge_rsvlm.export.families.generation import GenerativeFamily, image_token, question
from edge_rsvlm.export.families.image_processors import load_image_processor
from edge_rsvlm.export.families.tokenizers import load_tokenizer

TOWERS = ("clip_vision_model", "siglip_vision_model")


class LlavaVision(nn.Module):
    """tiles [N, 3, H, W] -> features [N, T, D]: the chosen layers of the tower, side by side, then the projector."""

    def __init__(self, model: nn.Module, config: PretrainedConfig) -> None:
        super().__init__()
        self.tower, self.projector = model.model.vision_tower, model.model.multi_modal_projector
        self.chosen = chosen_layers(config)
        self.skips_first = skips_first(config)

    def forward(self, tiles: Tensor) -> Tensor:
        hidden = self.tower.embeddings(tiles)
        if hasattr(self.tower, "pre_layrnorm"):
            hidden = self.tower.pre_layrnorm(hidden)
        states = [hidden]
        for layer in self.tower.encoder.layers[: max(self.chosen)]:
            states.append(layer(states[-1], None))
        kept = torch.cat([states[index] for index in self.chosen], dim=-1)
        features: Tensor = self.projector(kept[:, 1:] if self.skips_first else kept)
        return features


def chosen_layers(config: PretrainedConfig) -> tuple[int, ...]:
    """``vision_feature_layer`` counted from the embeddings (0) up."""
    chosen = config.vision_feature_layer
    states = config.vision_config.num_hidden_layers + 1
    return tuple(index % states for index in ([chosen] if isinstance(chosen, int) else chosen))


def skips_first(config: PretrainedConfig) -> bool:
    return bool(config.vision_feature_select_strategy == "default")


def tokens_per_tile(config: PretrainedConfig) -> int:
    """Patches of the square image, and CLIP's class token, less the first where that is dropped."""
    vision = config.vision_config
    patches = (vision.image_size // vision.patch_size) ** 2
    return int(patches) + (vision.model_type == "clip_vision_model") - skips_first(config)


class Llava(GenerativeFamily):
    name = "llava"
    model_types = ("llava",)
    prompt = "USER: {image}\n{text} ASSISTANT:"

    def model_class(self, config: PretrainedConfig) -> type[nn.Module]:
        return LlavaForConditionalGeneration

    def image_graph(self, source: Source) -> GraphPlan:
        config, vision = source.config, source.config.vision_config
        if vision.model_type not in TOWERS:
            raise UsageError(
                f"{source.folder}: a LLaVA with the vision tower {vision.model_type} is not supported",
                fix=f"use one with {' or '.join(TOWERS)}",
            )
        return GraphPlan(
            name="image",
            wrap=lambda model: LlavaVision(model, config),
            inputs=(GraphInput("tiles", ("tiles", 3, vision.image_size, vision.image_size)),),
            outputs=("features",),
            sizes={"tiles": 2},
        )

    def text_model(self, model: nn.Module) -> TextModel:
        body = model.model.language_model
        return TextModel(body.get_input_embeddings(), body, model.lm_head)

    def visual(self, source: Source, tokenizer: Any) -> dict[str, Any]:
        return {"token": image_token(source, tokenizer), "per_tile": tokens_per_tile(source.config)}

    def inputs(self, source: Source, image: Image.Image, text: str) -> Mapping[str, Tensor]:
        tokenizer, config = load_tokenizer(source.folder, source.config), source.config
        token = image_token(source, tokenizer)
        # Processors of old checkpoints do not know how many tokens an image has; the model does.
        processor = LlavaProcessor(
            load_image_processor(source.folder),
            tokenizer,
            patch_size=config.vision_config.patch_size,
            vision_feature_select_strategy=config.vision_feature_select_strategy,
            num_additional_image_tokens=int(config.vision_config.model_type == "clip_vision_model"),
            image_token=token,
        )
        prompt = question(source, tokenizer, token, text, self.prompt)
        special = adds_special_tokens(tokenizer, prompt)
        inputs: Mapping[str, Tensor] = processor(image, prompt, return_tensors="pt", add_special_tokens=special)
        return inputs
