"""ViLT for question answering (Kim et al. 2021, "ViLT: Vision-and-Language Transformer ...")."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import ViltForQuestionAnswering

from edge_rsvlm.errors import UsageError
from edge_rsvlm.export.families.base import Arrays, Description, Family, GraphInput, GraphPlan, Source
from edge_rsvlm.export.families.dual_encoder import roles, text_inputs
from edge_rsvlm.export.families.image_processors import input_spec, load_image_processor
from edge_rsvlm.export.families.tokenizers import FILE, load_tokenizer, tokenizer_fields, tokenizer_json

if TYPE_CHECKING:
    from transformers import PretrainedConfig

GRAPH, ANSWERS = "answer", "answers.txt"
MASKED = -3e4
"""Added to the scores of padding: exp() of it is 0, and half precision can still hold it."""


class Answer(nn.Module):
    """tiles [N, 3, H, W] (H, W multiples of the patch), input_ids and attention_mask [N, S] -> logits [N, K].

    Every patch is seen, in raster order. Transformers draws the order by lot, and this model does not mind the order.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.head = model.vilt, model.classifier
        self.grid = model.config.image_size // model.config.patch_size

    def forward(self, tiles: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        embeddings = self.model.embeddings
        modality = embeddings.token_type_embeddings.weight
        words = embeddings.text_embeddings(input_ids=input_ids) + modality[0]
        patches = self._patches(tiles) + modality[1]
        seen = F.pad(attention_mask, (0, patches.shape[1]), value=1)
        bias = (1 - seen[:, None, None]).to(words.dtype) * MASKED
        hidden = self.model.encoder(torch.cat((words, patches), dim=1), attention_mask=bias, return_dict=True)[0]
        return self.head(self.model.pooler(self.model.layernorm(hidden)))

    def _patches(self, tiles: Tensor) -> Tensor:
        """[N, 1 + h w, D], the class token first; positions are interpolated to the grid h x w of this image."""
        embeddings = self.model.embeddings
        map_NDhw = embeddings.patch_embeddings(tiles)
        positions = embeddings.position_embeddings
        square = positions[:, 1:].transpose(1, 2).unflatten(2, (self.grid, self.grid))
        square = F.interpolate(square, size=map_NDhw.shape[2:], mode="bilinear", align_corners=True)
        patches = (map_NDhw + square).flatten(2).transpose(1, 2)
        first = (embeddings.cls_token + positions[:, :1]).expand(tiles.shape[0], -1, -1)
        return torch.cat((first, patches), dim=1)


def answers_txt(config: PretrainedConfig) -> bytes:
    """One answer per line, in the order of the logits."""
    labels = {int(index): " ".join(str(label).split()) for index, label in (config.id2label or {}).items()}
    return "".join(f"{labels[index]}\n" for index in sorted(labels)).encode()


class Vilt(Family):
    name = "vilt"
    model_types = ("vilt",)

    def model_class(self, config: PretrainedConfig) -> type[nn.Module]:
        return ViltForQuestionAnswering

    def graphs(self, source: Source) -> tuple[GraphPlan, ...]:
        config = source.config
        if config.max_image_length > 0:
            raise UsageError(
                f"{source.folder}: the model looks at {config.max_image_length} patches, drawn by lot",
                fix='set "max_image_length" to -1 in config.json, so that it looks at all',
            )
        tiles = GraphInput("tiles", ("batch", 3, "height", "width"))
        sizes = {"batch": 2, "text": 7, "height": 3 * config.patch_size, "width": 5 * config.patch_size}
        return (GraphPlan(GRAPH, Answer, (tiles, *text_inputs(masked=True)), ("logits",), sizes),)

    def describe(self, source: Source) -> Description:
        tokenizer = load_tokenizer(source.folder, source.config)
        task = {
            "kind": "answer_classes",
            "input": input_spec(load_image_processor(source.folder)),
            "graph": GRAPH,
            "tokenizer": tokenizer_fields(tokenizer, source.config.max_position_embeddings),
            "answers": ANSWERS,
            "score": "sigmoid",
        }
        files = {FILE: tokenizer_json(tokenizer), ANSWERS: answers_txt(source.config)}
        return Description(roles(self.graphs(source)), {"ask": task}, files)

    def reference(self, source: Source, model: nn.Module, image_HWC: NDArray[np.uint8], text: str) -> Arrays:
        """``logits`` [K]."""
        tokenizer = load_tokenizer(source.folder, source.config)
        longest = source.config.max_position_embeddings
        tokens = tokenizer(text, truncation=True, max_length=longest, return_tensors="pt")
        pixels = load_image_processor(source.folder)(images=Image.fromarray(image_HWC), return_tensors="pt")
        with torch.inference_mode():
            return {"logits": model(**tokens, **pixels).logits[0].float().numpy()}
