"""The model that is asked by words as a family of the export."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import nn
from transformers import PretrainedConfig

from edge_rsvlm.export import artifact
from edge_rsvlm.export.checkpoint.reading import LazyTensor
from edge_rsvlm.export.default.data.captions import EOS_ID
from edge_rsvlm.export.default.data.scenes import TILE_PX
from edge_rsvlm.export.default.data.views import RGB_BANDS, U8_RANGE, cut
from edge_rsvlm.export.default.describe import LICENCE, read_thresholds
from edge_rsvlm.export.default.family import PARITY_TOKENS, encoder_plan, language_plans, maps_plan
from edge_rsvlm.export.default.graphs import CHANGE_INPUTS, ChangeGraph
from edge_rsvlm.export.default.model.decoder import DecoderConfig
from edge_rsvlm.export.default.open_model.checkpoint import TEXTS, OpenModel, open_stages
from edge_rsvlm.export.default.open_model.describe import (
    ALL_TRAINING_DATA,
    DESCRIPTION,
    NAME,
    OBJECTS_NAME,
    OpenThresholds,
    Scales,
    objects_vocabulary,
    task_specs,
)
from edge_rsvlm.export.default.open_model.graphs import (
    DETECT_MAPS,
    SEGMENT_MAPS,
    TOKEN_MAPS,
    DetectGraph,
    MatchGraph,
    PrefixGraph,
    SegmentGraph,
    TextGraph,
)
from edge_rsvlm.export.default.stages import change, language, match, vision
from edge_rsvlm.export.default.stages.features import ANSWER, ASK, tokens_of
from edge_rsvlm.export.default.stages.match import MOST_SCALE
from edge_rsvlm.export.families.base import Arrays, Description, Family, GraphInput, GraphPlan, Source
from edge_rsvlm.export.families.generation import roles

TEXT_EMBEDDING = "text_embedding"
"""In the graph: the exporter itself calls looked-up tokens "embedding"."""
CUT_STAGES = (vision.NAME, change.NAME, match.NAME)
"""Stages whose scores are cut."""


class Open(Family):
    """Folders of the stages of ``checkpoint.STAGES``."""

    name = "edge-rsvlm-open"
    model_types = ("edge_rsvlm_open",)

    def model_class(self, config: PretrainedConfig) -> type[nn.Module]:
        return OpenModel

    def graphs(self, source: Source) -> tuple[GraphPlan, ...]:
        spoken = DecoderConfig(source.config.vocabulary, dropout=0.0)
        found = ("embeddings", "shift", "scale", "ltrb")
        return (
            encoder_plan(),
            maps_plan("detect", lambda m: DetectGraph(m.pyramid, m.boxes), DETECT_MAPS, found),
            maps_plan("segment", lambda m: SegmentGraph(m.pyramid, m.dense), SEGMENT_MAPS, ("embeddings",)),
            maps_plan("change", lambda m: ChangeGraph(m.change), CHANGE_INPUTS, ("change",)),
            maps_plan("match", lambda m: MatchGraph(m.match.pooled), ("c5",), ("embedding",)),
            _text_plan(),
            maps_plan("language_prefix", lambda m: PrefixGraph(m.language.prefix), TOKEN_MAPS, ("features",)),
            *language_plans("language", lambda m: m.language.decoder, spoken),
        )

    def describe(self, source: Source) -> Description:
        stages = [artifact.load(source.folder / name) for name in CUT_STAGES]
        cuts = read_thresholds(source.folder, stages, OpenThresholds)
        graphs = {plan.name: roles(plan) for plan in self.graphs(source)}
        spoken = graphs["text"]["outputs"]
        spoken["embedding"] = spoken.pop(TEXT_EMBEDDING)
        files = {name: (source.folder / language.NAME / name).read_bytes() for name in TEXTS}
        files[OBJECTS_NAME] = "".join(f"{word}\n" for word in objects_vocabulary()).encode()
        decoder = DecoderConfig(source.config.vocabulary, dropout=0.0)
        return Description(
            graphs,
            task_specs(decoder, cuts, _scales(open_stages(source.folder).tensors)),
            files,
            {"name": NAME, "description": DESCRIPTION, "licence": LICENCE, "training_data": ALL_TRAINING_DATA},
        )

    def reference(self, source: Source, model: nn.Module, image_HWC: NDArray[np.uint8], text: str) -> Arrays:
        """The likeliest answer to the question ``text`` about an image cut as in training, word after word."""
        height, width = image_HWC.shape[:2]
        tile = cut(image_HWC, (0, 0, width, height), (TILE_PX, TILE_PX), RGB_BANDS, U8_RANGE)
        tokenizer = Tokenizer.from_file(str(source.folder / language.NAME / language.TOKENIZER_NAME))
        asked = tokenizer.encode(f"{ASK}{text}{ANSWER}", add_special_tokens=False).ids
        answer: list[int] = []
        with torch.no_grad():
            seen = tokens_of(model.encoder(torch.from_numpy(tile)[None]))
            while len(answer) < PARITY_TOKENS and EOS_ID not in answer:
                logits_V = model(seen, torch.tensor([[*asked, *answer]]), logits_to_keep=1).logits[0, -1]
                answer.append(int(logits_V.argmax()))
        return {"tokens": np.array(answer)}


def _text_plan() -> GraphPlan:
    inputs = tuple(GraphInput(name, ("batch", "text"), torch.int64) for name in ("input_ids", "attention_mask"))
    outputs = (TEXT_EMBEDDING, "query", "label")
    return GraphPlan("text", lambda m: TextGraph(m.match.text), inputs, outputs, {"batch": 2, "text": 7})


def _scales(tensors: Mapping[str, LazyTensor]) -> Scales:
    matched, label = (float(tensors[f"{head}.log_scale"].read().float().exp()) for head in ("match", "dense"))
    return Scales(min(matched, MOST_SCALE), label, float(tensors["dense.bias"].read()))
