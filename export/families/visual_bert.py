"""VisualBERT for question answering (Li et al. 2019, "VisualBERT: A Simple and Performant Baseline ...").

It takes features of image regions, not pixels: what makes them (a detector, usually) is no part of the checkpoint.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import VisualBertForQuestionAnswering

from edge_rsvlm.errors import UsageError
from edge_rsvlm.export.families.base import Arrays, Description, Family, GraphInput, GraphPlan, Source
from edge_rsvlm.export.families.dual_encoder import roles, text_inputs
from edge_rsvlm.export.families.tokenizers import FILE, load_tokenizer, tokenizer_fields, tokenizer_json
from edge_rsvlm.export.families.vilt import ANSWERS, GRAPH, MASKED, answers_txt

if TYPE_CHECKING:
    from transformers import PretrainedConfig

REGIONS = 9
SIZES = {"batch": 2, "regions": 5, "text": 7}


class Answer(nn.Module):
    """features [N, R, D] of regions, input_ids and attention_mask [N, S] -> logits [N, K].

    The answer is read at the last token before the closing [SEP] of the question.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.head = model.visual_bert, model.cls

    def forward(self, features: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        embedded = self.model.embeddings(input_ids=input_ids, visual_embeds=features)
        seen = F.pad(attention_mask, (0, features.shape[1]), value=1)
        bias = (1 - seen[:, None, None]).to(embedded.dtype) * MASKED
        hidden = self.model.encoder(embedded, attention_mask=bias, return_dict=True)[0]
        last = (attention_mask.sum(1) - 2)[:, None, None].expand(-1, 1, hidden.shape[2])
        return self.head(hidden.gather(1, last)[:, 0])


def regions_of(image_HWC: NDArray[np.uint8], width: int) -> NDArray[np.float32]:
    """Features [REGIONS, width] of an image that stand in for a detector's where two programs are only compared."""
    small = np.asarray(Image.fromarray(image_HWC).convert("L").resize((width, REGIONS), Image.Resampling.BILINEAR))
    return small.astype(np.float32) / 255.0


class VisualBert(Family):
    name = "visual_bert"
    model_types = ("visual_bert",)

    def model_class(self, config: PretrainedConfig) -> type[nn.Module]:
        return VisualBertForQuestionAnswering

    def graphs(self, source: Source) -> tuple[GraphPlan, ...]:
        if source.config.bypass_transformer:
            raise UsageError(
                f"{source.folder}: its regions bypass the transformer, which is not supported",
                fix="use a checkpoint whose config.json has bypass_transformer false",
            )
        features = GraphInput("features", ("batch", "regions", source.config.visual_embedding_dim))
        return (GraphPlan(GRAPH, Answer, (features, *text_inputs(masked=True)), ("logits",), SIZES),)

    def describe(self, source: Source) -> Description:
        tokenizer = load_tokenizer(source.folder, source.config)
        task = {
            "kind": "answer_classes",
            "input": None,
            "graph": GRAPH,
            "tokenizer": tokenizer_fields(tokenizer, source.config.max_position_embeddings),
            "answers": ANSWERS,
            "score": "softmax",
        }
        files = {FILE: tokenizer_json(tokenizer), ANSWERS: answers_txt(source.config)}
        return Description(roles(self.graphs(source)), {"ask": task}, files)

    def reference(self, source: Source, model: nn.Module, image_HWC: NDArray[np.uint8], text: str) -> Arrays:
        """``logits`` [K] for the ``features`` [R, D] of ``regions_of`` the image."""
        tokenizer = load_tokenizer(source.folder, source.config)
        longest = source.config.max_position_embeddings
        tokens = tokenizer(text, truncation=True, max_length=longest, return_tensors="pt")
        features = regions_of(image_HWC, source.config.visual_embedding_dim)
        with torch.inference_mode():
            output = model(**tokens, visual_embeds=torch.from_numpy(features)[None])
        return {"features": features, "logits": output.logits[0].float().numpy()}
