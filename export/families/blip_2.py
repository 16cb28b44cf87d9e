"""BLIP-2 with its Q-Former (Li et al. 2023), which RSGPT is too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from transformers import Blip2ForConditionalGeneration, GenerationConfig, PretrainedConfig

from edge_rsvlm.errors import UsageError
from edge_rsvlm.export.families import chat
from edge_rsvlm.export.families.base import Arrays, GraphInput, GraphPlan, Source
from edge_rsvlm.export.families.causal_decoder import TextModel
from edge_rsvlm.export.families.generation import GenerativeFamily, greedy
from edge_rsvlm.export.families.image_processors import load_image_processor
from edge_rsvlm.export.families.tokenizers import FILE, load_tokenizer


class Blip2Vision(nn.Module):
    """tiles [N, 3, P, P] -> features [N, Q, D]: what Q queries found in the image, as wide as a token."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.tower, self.qformer, self.projection = model.vision_model, model.qformer, model.language_projection
        self.query_tokens = model.query_tokens

    def forward(self, tiles: Tensor) -> Tensor:
        hidden = self.tower.embeddings(tiles)
        for layer in self.tower.encoder.layers:
            hidden = layer(hidden)
        image = self.tower.post_layernorm(hidden)
        found = self.qformer.layernorm(self.query_tokens.expand(tiles.shape[0], -1, -1))
        for layer in self.qformer.encoder.layer:
            found = layer(found, encoder_hidden_states=image, query_length=self.query_tokens.shape[1])
        features: Tensor = self.projection(found)
        return features


class Blip2(GenerativeFamily):
    name = "blip_2"
    model_types = ("blip-2",)
    prompt = "Question: {text} Answer:"

    def model_class(self, config: PretrainedConfig) -> type[nn.Module]:
        _check_text_model(config)
        return Blip2ForConditionalGeneration

    def image_graph(self, source: Source) -> GraphPlan:
        _check_text_model(source.config)
        side = source.config.vision_config.image_size
        return GraphPlan(
            name="image",
            wrap=Blip2Vision,
            inputs=(GraphInput("tiles", ("tiles", 3, side, side)),),
            outputs=("features",),
            sizes={"tiles": 2},
        )

    def text_model(self, model: nn.Module) -> TextModel:
        language = model.language_model
        return TextModel(language.get_input_embeddings(), language.base_model, language.get_output_embeddings())

    def visual(self, source: Source, tokenizer: Any) -> dict[str, Any]:
        # The queries stand before everything, even BOS, so the prompt has no place for them.
        return {"token": None, "per_tile": source.config.num_query_tokens}

    def chat_prompt(self, source: Source, tokenizer: Any) -> chat.Prompt:
        return chat.Prompt(self.prompt, add_special_tokens=True)

    def caption_fields(self, source: Source, tokenizer: Any, prompt: chat.Prompt) -> dict[str, Any]:
        """BOS alone, from which the text model was trained to go on with a caption: its own, not the tokenizer's."""
        bos = source.config.text_config.bos_token_id
        token = None if bos is None else tokenizer.convert_ids_to_tokens(bos)
        if tokenizer("")["input_ids"] == [bos] or token is None:
            return {"prompt": ""}
        if tokenizer(token, add_special_tokens=False)["input_ids"] != [bos]:
            raise UsageError(
                f"{source.folder}: captions begin with the token {bos} ('bos_token_id' of text_config), which the "
                "tokenizer does not write",
                fix="use the tokenizer files that the model was published with",
            )
        return {"prompt": token, "tokenizer": {"file": FILE, "add_special_tokens": False}}

    def generation_config(self, source: Source) -> GenerationConfig:
        # The text model generates by its own config, whatever the whole one's says.
        return GenerationConfig.from_model_config(source.config.text_config)

    def inputs(self, source: Source, image: Image.Image, text: str) -> Mapping[str, Tensor]:
        tokenizer = load_tokenizer(source.folder, source.config)
        pixels = load_image_processor(source.folder)(image, return_tensors="pt")
        ids = tokenizer(self.prompt.replace(chat.TEXT, text), return_tensors="pt")["input_ids"]
        return {"pixel_values": pixels["pixel_values"], "input_ids": ids}

    def reference(self, source: Source, model: nn.Module, image_HWC: NDArray[np.uint8], text: str) -> Arrays:
        inputs = dict(self.inputs(source, Image.fromarray(image_HWC), text))
        ends = self.eos_ids(source, load_tokenizer(source.folder, source.config))
        index, queries = source.config.image_token_index, source.config.num_query_tokens
        if index is not None:
            inputs["input_ids"] = torch.cat([torch.full((1, queries), index), inputs["input_ids"]], dim=1)
            return greedy(model, inputs, ends)
        # Saved before image tokens were: there the features simply came first.
        with torch.no_grad():
            features = model.get_image_features(inputs["pixel_values"]).pooler_output
            embeds = torch.cat([features, model.get_input_embeddings()(inputs["input_ids"])], dim=1)
        seen = torch.ones(embeds.shape[:2])
        return greedy(model.language_model, {"inputs_embeds": embeds, "attention_mask": seen}, ends)


def _check_text_model(config: PretrainedConfig) -> None:
    if not config.use_decoder_only_language_model:
        raise UsageError(
            f"a BLIP-2 whose text model is {config.text_config.model_type} is not supported",
            fix="use one with a decoder-only text model (OPT, Llama)",
        )
