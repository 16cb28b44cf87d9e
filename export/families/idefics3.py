"""Idefics3 (Laurençon et al. 2024, "Building and better understanding vision-language models") and SmolVLM."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import Idefics3ForConditionalGeneration, PretrainedConfig, SmolVLMForConditionalGeneration
from transformers.models.smolvlm.processing_smolvlm import get_image_prompt_string

from edge_rsvlm.errors import UsageError
from edge_rsvlm.export.families.base import GraphInput, GraphPlan, Source
from edge_rsvlm.export.families.causal_decoder import TextModel
from edge_rsvlm.export.families.generation import GenerativeFamily, encode, image_token, question
from edge_rsvlm.export.families.image_processors import load_image_processor
from edge_rsvlm.export.families.tokenizers import load_tokenizer

AROUND, OVERVIEW = "<fake_token_around_image>", "<global-img>"
LARGEST_SHARE = 1.0 - 1e-6


class Idefics3Vision(nn.Module):
    """tiles [N, 3, P, P] -> features [N, T, D]."""

    def __init__(self, model: nn.Module, positions: list[int]) -> None:
        super().__init__()
        self.tower, self.connector = model.model.vision_model, model.model.connector
        self.positions = positions

    def forward(self, tiles: Tensor) -> Tensor:
        embeddings = self.tower.embeddings
        hidden = embeddings.patch_embedding(tiles).flatten(2).transpose(1, 2)
        hidden = hidden + embeddings.position_embedding(torch.tensor(self.positions))
        for layer in self.tower.encoder.layers:
            hidden = layer(hidden, None)
        features: Tensor = self.connector(self.tower.post_layernorm(hidden))
        return features


def position_ids(image_px: int, patch_px: int, tile_px: int) -> list[int]:
    """Rows of the position embedding that a square tile of ``tile_px`` uses, in raster order.

    They are found by sorting shares of the side into buckets in single precision, so for some grids (19, 25, 40 ... per
    side) a row is used twice and another never: the model was trained so.
    """
    trained, side = image_px // patch_px, tile_px // patch_px
    edges = torch.arange(1 / trained, 1.0, 1 / trained)
    shares = torch.arange(side, dtype=torch.float32) * (1.0 / torch.tensor(side))
    buckets = torch.bucketize(shares.clamp(max=LARGEST_SHARE), edges, right=True)
    ids: list[int] = (buckets[:, None] * trained + buckets[None, :]).flatten().tolist()
    return ids


def tile_px(source: Source) -> int:
    """Every tile, and the overview, is a square of this side."""
    return int(load_image_processor(source.folder).max_image_size["longest_edge"])


def tokens_per_tile(config: PretrainedConfig, side_px: int) -> int:
    """Raises UsageError for tiles that the connector cannot shuffle into whole tokens."""
    patches = side_px // config.vision_config.patch_size
    if patches % config.scale_factor:
        raise UsageError(
            f"tiles of {side_px} px are {patches} x {patches} patches of {config.vision_config.patch_size} px, of which"
            f" {config.scale_factor} x {config.scale_factor} cannot always be joined to a token",
            fix='give the "max_image_size" that the model was trained with in preprocessor_config.json',
        )
    return int(patches // config.scale_factor) ** 2


class Idefics3(GenerativeFamily):
    name = "idefics3"
    model_types = ("idefics3", "smolvlm")
    prompt = "<|im_start|>User:{image}{text}<end_of_utterance>\nAssistant:"

    def model_class(self, config: PretrainedConfig) -> type[nn.Module]:
        smol = config.model_type == "smolvlm"
        return SmolVLMForConditionalGeneration if smol else Idefics3ForConditionalGeneration

    def image_graph(self, source: Source) -> GraphPlan:
        vision, side = source.config.vision_config, tile_px(source)
        positions = position_ids(vision.image_size, vision.patch_size, side)
        return GraphPlan(
            name="image",
            wrap=lambda model: Idefics3Vision(model, positions),
            inputs=(GraphInput("tiles", ("tiles", 3, side, side)),),
            outputs=("features",),
            sizes={"tiles": 2},
        )

    def text_model(self, model: nn.Module) -> TextModel:
        body = model.model.text_model
        return TextModel(body.get_input_embeddings(), body, model.lm_head)

    def visual(self, source: Source, tokenizer: Any) -> dict[str, Any]:
        # The strings that the processor writes for 0 x 0 and for rows x cols tiles.
        overview = f"{AROUND}{OVERVIEW}{{tokens}}{AROUND}"
        return {
            "token": image_token(source, tokenizer),
            "per_tile": tokens_per_tile(source.config, tile_px(source)),
            "single": overview,
            "tile": f"{AROUND}<row_{{row}}_col_{{col}}>{{tokens}}",
            "row_end": "\n",
            "overview": f"\n{overview}",
        }

    def inputs(self, source: Source, image: Image.Image, text: str) -> Mapping[str, Tensor]:
        # Not by the processors themselves: SmolVLM's wants torchvision for videos that nobody asked for.
        tokenizer = load_tokenizer(source.folder, source.config)
        token = image_token(source, tokenizer)
        prompt = question(source, tokenizer, token, text, self.prompt)
        pixels = load_image_processor(source.folder)(image, return_row_col_info=True, return_tensors="pt")
        written = get_image_prompt_string(
            pixels["rows"][0][0],
            pixels["cols"][0][0],
            tokens_per_tile(source.config, pixels["pixel_values"].shape[-1]),
            fake_token_around_image=AROUND,
            image_token=token,
            global_image_token=OVERVIEW,
        )
        images = {name: pixels[name] for name in ("pixel_values", "pixel_attention_mask")}
        return {**encode(tokenizer, prompt.replace(token, written)), **images}
