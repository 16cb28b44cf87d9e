"""The default model as a family of the export."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import nn
from transformers import PretrainedConfig

from edge_rsvlm.export import artifact
from edge_rsvlm.export.checkpoint.reading import LazyTensor
from edge_rsvlm.export.default.checkpoint import TEXTS, DefaultModel, open_stages
from edge_rsvlm.export.default.data.captions import EOS_ID
from edge_rsvlm.export.default.data.objects import CLASSES
from edge_rsvlm.export.default.data.scenes import TILE_PX
from edge_rsvlm.export.default.data.views import RGB_BANDS, U8_RANGE, cut
from edge_rsvlm.export.default.describe import (
    DESCRIPTION,
    LICENCE,
    NAME,
    OBJECTS_NAME,
    PHRASES_NAME,
    TRAINING_DATA,
    Scales,
    objects_vocabulary,
    phrases_vocabulary,
    read_thresholds,
    task_specs,
)
from edge_rsvlm.export.default.graphs import (
    CHANGE_INPUTS,
    DETECT_MAPS,
    ENCODER_MAPS,
    SEGMENT_MAPS,
    TOKEN_MAPS,
    ChangeGraph,
    DecoderGraph,
    DetectGraph,
    EmbedGraph,
    EncoderGraph,
    MatchGraph,
    PrefixGraph,
    SegmentGraph,
    TextGraph,
)
from edge_rsvlm.export.default.model.appearance import MAPS as APPEARANCE_MAPS
from edge_rsvlm.export.default.model.decoder import DecoderConfig
from edge_rsvlm.export.default.model.encoder import CHANNELS, STEM_BANDS, STRIDES
from edge_rsvlm.export.default.stages import appearance, language, match, vision
from edge_rsvlm.export.default.stages.features import tokens_of
from edge_rsvlm.export.default.stages.match import MOST_SCALE
from edge_rsvlm.export.families.base import Arrays, Description, Family, GraphInput, GraphPlan, Source
from edge_rsvlm.export.families.generation import roles
from edge_rsvlm.tasks.refer import feature_count

EXAMPLE_HW = (96, 160)
PARITY_TOKENS = 16
TEXT_EMBEDDING = "text_embedding"
"""In the graph: the exporter itself calls looked-up tokens "embedding"."""
CUT_STAGES = (vision.NAME, appearance.NAME, match.NAME)
"""Stages whose scores are cut."""


class Default(Family):
    """Folders of stages, as ``edge_rsvlm.export.default.train`` writes them."""

    name = "edge-rsvlm"
    model_types = ("edge_rsvlm",)

    def model_class(self, config: PretrainedConfig) -> type[nn.Module]:
        return DefaultModel

    def graphs(self, source: Source) -> tuple[GraphPlan, ...]:
        found = ("embeddings", "shift", "scale", "ltrb")
        return (
            _encoder_plan(),
            _maps_plan("detect", lambda m: DetectGraph(m.pyramid, m.boxes), DETECT_MAPS, found),
            _maps_plan("appearance", lambda m: m.appearance, APPEARANCE_MAPS, ("features",)),
            _maps_plan("segment", lambda m: SegmentGraph(m.pyramid, m.dense), SEGMENT_MAPS, ("embeddings",)),
            _maps_plan("change", lambda m: ChangeGraph(m.change), CHANGE_INPUTS, ("change",)),
            _maps_plan("match", lambda m: MatchGraph(m.match.pooled), ("c5",), ("embedding",)),
            _text_plan(),
            _refer_plan(),
            _maps_plan("language_prefix", lambda m: PrefixGraph(m.language.prefix), TOKEN_MAPS, ("features",)),
            *_language_plans(_decoder_config(source)),
        )

    def describe(self, source: Source) -> Description:
        stages = [artifact.load(source.folder / name) for name in CUT_STAGES]
        cuts = read_thresholds(source.folder, stages)
        graphs = {plan.name: roles(plan) for plan in self.graphs(source)}
        spoken = graphs["text"]["outputs"]
        spoken["embedding"] = spoken.pop(TEXT_EMBEDDING)
        files = {name: (source.folder / language.NAME / name).read_bytes() for name in TEXTS}
        for name, words in ((OBJECTS_NAME, objects_vocabulary()), (PHRASES_NAME, phrases_vocabulary())):
            files[name] = "".join(f"{word}\n" for word in words).encode()
        return Description(
            graphs,
            task_specs(_decoder_config(source), cuts, _scales(open_stages(source.folder).tensors)),
            files,
            {"name": NAME, "description": DESCRIPTION, "licence": LICENCE, "training_data": TRAINING_DATA},
        )

    def reference(self, source: Source, model: nn.Module, image_HWC: NDArray[np.uint8], text: str) -> Arrays:
        """The likeliest answer to the question ``text`` about an image cut as in training, word after word."""
        height, width = image_HWC.shape[:2]
        tile = cut(image_HWC, (0, 0, width, height), (TILE_PX, TILE_PX), RGB_BANDS, U8_RANGE)
        tokenizer = Tokenizer.from_file(str(source.folder / language.NAME / language.TOKENIZER_NAME))
        asked = tokenizer.encode(language.prompt_of(text), add_special_tokens=False).ids
        answer: list[int] = []
        with torch.no_grad():
            seen = tokens_of(model.encoder(torch.from_numpy(tile)[None]))
            while len(answer) < PARITY_TOKENS and EOS_ID not in answer:
                logits_V = model(seen, torch.tensor([[*asked, *answer]]), logits_to_keep=1).logits[0, -1]
                answer.append(int(logits_V.argmax()))
        return {"tokens": np.array(answer)}


def _decoder_config(source: Source) -> DecoderConfig:
    return DecoderConfig(source.config.vocabulary, dropout=0.0)


def _encoder_plan() -> GraphPlan:
    height, width = EXAMPLE_HW
    tiles = GraphInput("tiles", ("batch", len(STEM_BANDS), "height", "width"))
    sizes = {"batch": 2, "height": height, "width": width}
    return GraphPlan("encoder", lambda m: EncoderGraph(m.encoder), (tiles,), ENCODER_MAPS, sizes)


def _maps_plan(
    name: str, wrap: Callable[[nn.Module], nn.Module], inputs: Sequence[str], outputs: tuple[str, ...]
) -> GraphPlan:
    """A graph on feature maps; those of two dates have the same sizes."""
    levels = [given.rpartition("_")[2] for given in inputs]
    return GraphPlan(
        name,
        wrap,
        tuple(
            GraphInput(given, ("batch", CHANNELS[level], f"{level}_height", f"{level}_width"))
            for given, level in zip(inputs, levels, strict=True)
        ),
        outputs,
        {"batch": 2}
        | {
            f"{level}_{side}": size // STRIDES[level]
            for level in levels
            for side, size in zip(("height", "width"), EXAMPLE_HW, strict=True)
        },
    )


def _refer_plan() -> GraphPlan:
    objects = GraphInput("objects", ("batch", "objects", feature_count(len(CLASSES))))
    mask = GraphInput("objects_mask", ("batch", "objects"), torch.int64)
    sizes = {"batch": 2, "text": 7, "objects": 3}
    return GraphPlan("refer", lambda m: m.refer, (*_text_inputs(), objects, mask), ("logits",), sizes)


def _text_inputs() -> tuple[GraphInput, ...]:
    return tuple(GraphInput(name, ("batch", "text"), torch.int64) for name in ("input_ids", "attention_mask"))


def _text_plan() -> GraphPlan:
    outputs = (TEXT_EMBEDDING, "query", "label")
    return GraphPlan("text", lambda m: TextGraph(m.match.text), _text_inputs(), outputs, {"batch": 2, "text": 7})


def _language_plans(config: DecoderConfig) -> tuple[GraphPlan, GraphPlan]:
    words = GraphInput("input_ids", ("batch", "tokens"), torch.int64)
    embed = GraphPlan(
        "language_embed", lambda m: EmbedGraph(m.language.decoder), (words,), ("inputs_embeds",),
        {"batch": 2, "tokens": 3},
    )  # fmt: skip
    cache = [f"{layer}.{part}" for layer in range(config.layers) for part in ("key", "value")]
    past = ("batch", config.heads, "past", config.head_width)
    decoder = GraphPlan(
        "language_decoder",
        lambda m: DecoderGraph(m.language.decoder),
        (
            GraphInput("inputs_embeds", ("batch", "tokens", config.width)),
            *(GraphInput(f"past_key_values.{name}", past) for name in cache),
        ),
        ("logits", *(f"present.{name}" for name in cache)),
        {"batch": 2, "tokens": 3, "past": 5},
    )
    return embed, decoder


def _scales(tensors: Mapping[str, LazyTensor]) -> Scales:
    matched, label = (float(tensors[f"{head}.log_scale"].read().float().exp()) for head in ("match", "dense"))
    return Scales(min(matched, MOST_SCALE), label, float(tensors["dense.bias"].read()))
