"""OWL-ViT and OWLv2: boxes for any words (Minderer et al. 2022 and 2023)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from transformers import Owlv2ForObjectDetection, OwlViTForObjectDetection

from edge_rsvlm.export.families.base import Arrays, Description, Family, GraphPlan, Source
from edge_rsvlm.export.families.dual_encoder import EMBEDDING_NAME, IMAGE, SIZES, TEXT, roles, text_inputs, tiles_input
from edge_rsvlm.export.families.image_processors import input_spec, load_image_processor
from edge_rsvlm.export.families.tokenizers import FILE, load_tokenizer, tokenizer_fields, tokenizer_json

if TYPE_CHECKING:
    from transformers import PretrainedConfig

EPSILON = 1e-6  # added to lengths, as the class head does
OVERLAP_SHARE = 0.25
SCORE_THRESHOLD, NMS_IOU = 0.1, 0.3  # defaults of the published post-processing
MAX_BOXES_PER_TILE = 300
OUTPUTS = ("class_embeds", "boxes", "logit_shift", "logit_scale")
CLASSES: dict[str, type[nn.Module]] = {"owlvit": OwlViTForObjectDetection, "owlv2": Owlv2ForObjectDetection}


class BoxEncoder(nn.Module):
    """tiles [N, 3, H, W] -> class_embeds [N, P, D] of unit length, boxes [N, P, 4], logit_shift and logit_scale [N, P].

    OWLv2's objectness is left out: it does not enter the scores of words.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tiles: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        map_NHWD = self.model.image_embedder(pixel_values=tiles)[0]
        features = map_NHWD.flatten(1, 2)
        head = self.model.class_head
        scale = head.elu(head.logit_scale(features)) + 1
        boxes = self.model.box_predictor(features, map_NHWD)
        return unit_as_the_head(head.dense0(features)), boxes, head.logit_shift(features)[..., 0], scale[..., 0]


class QueryEncoder(nn.Module):
    """input_ids [N, S] -> embedding [N, D] of unit length; causal, and taken where the text ends."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = getattr(model, model.base_model_prefix)

    def forward(self, input_ids: Tensor) -> Tensor:
        embeds = self.model.get_text_features(input_ids=input_ids).pooler_output
        return unit_as_the_head(embeds / embeds.norm(dim=-1, keepdim=True))


def unit_as_the_head(vectors: Tensor) -> Tensor:
    return vectors / (vectors.norm(dim=-1, keepdim=True) + EPSILON)


class Owl(Family):
    name = "owl"
    model_types = tuple(CLASSES)

    def model_class(self, config: PretrainedConfig) -> type[nn.Module]:
        return CLASSES[config.model_type]

    def graphs(self, source: Source) -> tuple[GraphPlan, ...]:
        tiles = tiles_input(source, load_image_processor(source.folder))
        return (
            GraphPlan(IMAGE, BoxEncoder, (tiles,), OUTPUTS, SIZES),
            GraphPlan(TEXT, QueryEncoder, text_inputs(masked=False), (EMBEDDING_NAME,), SIZES),
        )

    def describe(self, source: Source) -> Description:
        tokenizer = load_tokenizer(source.folder, source.config)
        fields = tokenizer_fields(tokenizer, source.config.text_config.max_position_embeddings)
        task = {
            "kind": "open_vocabulary",
            "input": input_spec(load_image_processor(source.folder), OVERLAP_SHARE),
            "encoder": IMAGE,
            "text": {"graph": TEXT, "tokenizer": fields},
            "query_prompt": "{label}",
            "score_threshold": SCORE_THRESHOLD,
            "nms_iou": NMS_IOU,
            "max_boxes_per_tile": MAX_BOXES_PER_TILE,
        }
        files = {FILE: tokenizer_json(tokenizer)}
        return Description(roles(self.graphs(source)), {"detect": task, "ground": task}, files)

    def reference(self, source: Source, model: nn.Module, image_HWC: NDArray[np.uint8], text: str) -> Arrays:
        """``boxes`` [P, 4] as the encoder gives them and ``scores`` [P] of the query ``text``, taken word for word."""
        tokenizer = load_tokenizer(source.folder, source.config)
        longest = source.config.text_config.max_position_embeddings
        tokens = tokenizer(text, padding="max_length", truncation=True, max_length=longest, return_tensors="pt")
        pixels = load_image_processor(source.folder)(images=Image.fromarray(image_HWC), return_tensors="pt")
        with torch.inference_mode():
            output = model(pixel_values=pixels["pixel_values"].float(), **tokens)
        return {
            "boxes": output.pred_boxes[0].float().numpy(),
            "scores": output.logits[0, :, 0].float().sigmoid().numpy(),
        }
