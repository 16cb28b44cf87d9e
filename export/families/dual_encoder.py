"""Models that put images and texts into one space: what CLIP, SigLIP and ALIGN share, and VisionTextDualEncoder.

A VisionTextDualEncoder holds any vision and any text model of transformers that pool their output (Swin and BERT, say).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from transformers import VisionTextDualEncoderModel

from edge_rsvlm.errors import UsageError
from edge_rsvlm.export.checkpoint.reading import open_checkpoint
from edge_rsvlm.export.families.base import Arrays, Description, Family, GraphInput, GraphPlan, Source
from edge_rsvlm.export.families.image_processors import fixed_size, input_spec, load_image_processor
from edge_rsvlm.export.families.tokenizers import FILE, load_tokenizer, tokenizer_fields, tokenizer_json

if TYPE_CHECKING:
    from transformers import PretrainedConfig

IMAGE, TEXT = "image_encoder", "text_encoder"
EMBEDDING, EMBEDDING_NAME = "embedding", "unit_embedding"
"""Role of an output, and its name in the graph: the exporter itself calls looked-up tokens "embedding"."""
SIZES = {"batch": 2, "text": 7}
COUNTED_FROM_PADDING = ("camembert", "data2vec-text", "roberta", "xlm-roberta", "xlm-roberta-xl")
"""Text models whose first position is padding_idx + 1, so that they have that many positions less."""


class ImageEmbedding(nn.Module):
    """tiles [N, 3, H, W] -> embedding [N, D] of unit length."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tiles: Tensor) -> Tensor:
        return unit(self.model.get_image_features(pixel_values=tiles).pooler_output)


class TextEmbedding(nn.Module):
    """input_ids [N, S], and the mask where the model needs one, -> embedding [N, D] of unit length."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return unit(self.model.get_text_features(input_ids=input_ids, attention_mask=attention_mask).pooler_output)


def unit(vectors: Tensor) -> Tensor:
    return vectors / vectors.norm(dim=-1, keepdim=True)


def stored_scalar(folder: Path, name: str) -> float:
    """A tensor of one element of the checkpoint; raises UsageError where it is missing."""
    tensor = open_checkpoint(folder).tensors.get(name)
    if tensor is None:
        raise UsageError(f"{folder}: no tensor '{name}' in the checkpoint", fix="use a checkpoint of the whole model")
    return float(tensor.read())


def text_inputs(masked: bool) -> tuple[GraphInput, ...]:
    """``input_ids``, and ``attention_mask`` where texts of one batch may be of different lengths."""
    names = ("input_ids", "attention_mask") if masked else ("input_ids",)
    return tuple(GraphInput(name, ("batch", "text"), torch.int64) for name in names)


def tiles_input(source: Source, processor: Any) -> GraphInput:
    """``tiles`` of the one size that the processor makes; raises UsageError where the model was built for another."""
    size = fixed_size(input_spec(processor)["prepare"])
    if size is None:
        raise UsageError(
            f"{source.folder}: images keep their aspect, and {source.config.model_type} takes one size only",
            fix='set "do_center_crop" in preprocessor_config.json, or give "size" as height and width',
        )
    return GraphInput("tiles", ("batch", 3, *size))


def roles(plans: tuple[GraphPlan, ...]) -> dict[str, dict[str, dict[str, str]]]:
    """The manifest's graphs: the names in the graph are those of the roles, but for the embedding's."""
    return {
        plan.name: {
            "inputs": {given.name: given.name for given in plan.inputs},
            "outputs": {EMBEDDING if name == EMBEDDING_NAME else name: name for name in plan.outputs},
        }
        for plan in plans
    }


class DualEncoder(Family):
    """Image and text encoders with ``get_image_features`` and ``get_text_features``; children say what differs."""

    masked_text = True
    score = "softmax"
    pads = False
    image_module: Callable[[nn.Module], nn.Module] = ImageEmbedding
    label_prompt = "This is a photo of {label}."
    """What the zero-shot pipeline of transformers asks."""

    def longest_text(self, config: PretrainedConfig) -> int:
        """Positions of the text model."""
        longest: int = config.text_config.max_position_embeddings
        return longest

    def logits(self, folder: Path) -> tuple[float, float]:
        """(scale, bias) of the cosine."""
        return math.exp(stored_scalar(folder, "logit_scale")), 0.0

    def graphs(self, source: Source) -> tuple[GraphPlan, ...]:
        tiles = tiles_input(source, load_image_processor(source.folder))
        return (
            GraphPlan(IMAGE, type(self).image_module, (tiles,), (EMBEDDING_NAME,), SIZES),
            GraphPlan(TEXT, TextEmbedding, text_inputs(self.masked_text), (EMBEDDING_NAME,), SIZES),
        )

    def describe(self, source: Source) -> Description:
        task = self.task(source, *self.logits(source.folder))
        return Description(roles(self.graphs(source)), {"classify": task, "search": task}, self.files(source))

    def task(self, source: Source, scale: float, bias: float) -> dict[str, Any]:
        """The manifest's MatchTask; class scores are of cosine * ``scale`` + ``bias``."""
        tokenizer = load_tokenizer(source.folder, source.config)
        return {
            "input": input_spec(load_image_processor(source.folder)),
            "encoder": IMAGE,
            "text": {"graph": TEXT, "tokenizer": self._tokenizer_fields(tokenizer, source.config)},
            "label_prompt": self.label_prompt,
            "score": self.score,
            "logit_scale": scale,
            "logit_bias": bias,
        }

    def files(self, source: Source) -> dict[str, bytes]:
        return {FILE: tokenizer_json(load_tokenizer(source.folder, source.config))}

    def reference(self, source: Source, model: nn.Module, image_HWC: NDArray[np.uint8], text: str) -> Arrays:
        """``score`` is the logit of the pair, before softmax or sigmoid."""
        tokenizer = load_tokenizer(source.folder, source.config)
        fields = self._tokenizer_fields(tokenizer, source.config)
        padding = {"padding": "max_length"} if self.pads else {}
        tokens = tokenizer(text, truncation=True, max_length=fields["max_length"], return_tensors="pt", **padding)
        pixels = load_image_processor(source.folder)(images=Image.fromarray(image_HWC), return_tensors="pt")
        names = [given.name for given in text_inputs(self.masked_text)]
        with torch.inference_mode():
            output = model(pixel_values=pixels["pixel_values"], **{name: tokens[name] for name in names})
        return {
            "image_embedding": output.image_embeds[0].float().numpy(),
            "text_embedding": output.text_embeds[0].float().numpy(),
            "score": output.logits_per_image[0].float().numpy(),
        }

    def _tokenizer_fields(self, tokenizer: Any, config: PretrainedConfig) -> dict[str, Any]:
        longest = self.longest_text(config)
        return tokenizer_fields(tokenizer, longest, longest if self.pads else None)


class EagerImageEmbedding(ImageEmbedding):
    """Attention spelled out: in the fused form the windows of Swin do not trace with a batch of any size."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        model.vision_model.set_attn_implementation("eager")


class VisionTextDualEncoder(DualEncoder):
    name = "vision_text_dual_encoder"
    model_types = ("vision-text-dual-encoder",)
    image_module = EagerImageEmbedding

    def model_class(self, config: PretrainedConfig) -> type[nn.Module]:
        return VisionTextDualEncoderModel

    def longest_text(self, config: PretrainedConfig) -> int:
        text = config.text_config
        unused = text.pad_token_id + 1 if text.model_type in COUNTED_FROM_PADDING else 0
        return int(text.max_position_embeddings) - unused
