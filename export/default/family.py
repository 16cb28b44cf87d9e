"""The default model as a family of the export."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import PretrainedConfig

from edge_rsvlm.export import artifact
from edge_rsvlm.export.default.checkpoint import DefaultModel
from edge_rsvlm.export.default.data.captions import BOS_ID, EOS_ID
from edge_rsvlm.export.default.data.scenes import TILE_PX
from edge_rsvlm.export.default.data.views import RGB_BANDS, U8_RANGE, cut
from edge_rsvlm.export.default.describe import (
    DESCRIPTION,
    LICENCE,
    NAME,
    TRAINING_DATA,
    Thresholds,
    read_thresholds,
    task_specs,
)
from edge_rsvlm.export.default.graphs import (
    CHANGE_INPUTS,
    DETECT_MAPS,
    ENCODER_MAPS,
    ChangeGraph,
    DecoderGraph,
    DetectGraph,
    EmbedGraph,
    EncoderGraph,
    PrefixGraph,
)
from edge_rsvlm.export.default.model.decoder import Decoder, DecoderConfig
from edge_rsvlm.export.default.model.encoder import CHANNELS, STEM_BANDS, STRIDES
from edge_rsvlm.export.default.stages import caption, change, joint
from edge_rsvlm.export.families.base import Arrays, Description, Family, GraphInput, GraphPlan, Source
from edge_rsvlm.export.families.generation import roles

EXAMPLE_HW = (96, 160)
PARITY_TOKENS = 16


class Default(Family):
    """Folders of stages, as ``edge_rsvlm.export.default.train`` writes them."""

    name = "edge-rsvlm"
    model_types = ("edge_rsvlm",)

    def model_class(self, config: PretrainedConfig) -> type[nn.Module]:
        return DefaultModel

    def graphs(self, source: Source) -> tuple[GraphPlan, ...]:
        return (
            encoder_plan(),
            maps_plan("detect", lambda m: DetectGraph(m.detect), DETECT_MAPS, ("scores", "ltrb")),
            maps_plan("change", lambda m: ChangeGraph(m.change), CHANGE_INPUTS, ("change",)),
            maps_plan("caption_prefix", lambda m: PrefixGraph(m.captioner), ("c5",), ("features",)),
            *language_plans("caption", lambda m: m.captioner.decoder, _decoder_config(source)),
        )

    def describe(self, source: Source) -> Description:
        stages = [artifact.load(source.folder / stage.NAME) for stage in (joint, change)]
        graphs = {plan.name: roles(plan) for plan in self.graphs(source)}
        tokenizer = source.folder / caption.NAME / caption.TOKENIZER_NAME
        return Description(
            graphs,
            task_specs(_decoder_config(source), read_thresholds(source.folder, stages, Thresholds)),
            {caption.TOKENIZER_NAME: tokenizer.read_bytes()},
            {"name": NAME, "description": DESCRIPTION, "licence": LICENCE, "training_data": TRAINING_DATA},
        )

    def reference(self, source: Source, model: nn.Module, image_HWC: NDArray[np.uint8], text: str) -> Arrays:
        """The likeliest word after word, of an image cut as in training; ``text`` is not asked."""
        height, width = image_HWC.shape[:2]
        tile = cut(image_HWC, (0, 0, width, height), (TILE_PX, TILE_PX), RGB_BANDS, U8_RANGE)
        tokens: list[int] = []
        with torch.no_grad():
            c5 = model.encoder(torch.from_numpy(tile)[None])["c5"]
            while len(tokens) < PARITY_TOKENS and EOS_ID not in tokens:
                logits_V = model(c5, torch.tensor([[BOS_ID, *tokens]]), logits_to_keep=1).logits[0, -1]
                tokens.append(int(logits_V.argmax()))
        return {"tokens": np.array(tokens)}


def _decoder_config(source: Source) -> DecoderConfig:
    return DecoderConfig(source.config.vocabulary, dropout=0.0)


def encoder_plan() -> GraphPlan:
    height, width = EXAMPLE_HW
    tiles = GraphInput("tiles", ("batch", len(STEM_BANDS), "height", "width"))
    sizes = {"batch": 2, "height": height, "width": width}
    return GraphPlan("encoder", lambda m: EncoderGraph(m.encoder), (tiles,), ENCODER_MAPS, sizes)


def maps_plan(
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


def language_plans(
    name: str, decoder_of: Callable[[nn.Module], Decoder], config: DecoderConfig
) -> tuple[GraphPlan, GraphPlan]:
    """``NAME_embed`` and ``NAME_decoder``."""
    words = GraphInput("input_ids", ("batch", "tokens"), torch.int64)
    embed = GraphPlan(
        f"{name}_embed", lambda m: EmbedGraph(decoder_of(m)), (words,), ("inputs_embeds",), {"batch": 2, "tokens": 3}
    )
    cache = [f"{layer}.{part}" for layer in range(config.layers) for part in ("key", "value")]
    past = ("batch", config.heads, "past", config.head_width)
    decoder = GraphPlan(
        f"{name}_decoder",
        lambda m: DecoderGraph(decoder_of(m)),
        (
            GraphInput("inputs_embeds", ("batch", "tokens", config.width)),
            *(GraphInput(f"past_key_values.{name}", past) for name in cache),
        ),
        ("logits", *(f"present.{name}" for name in cache)),
        {"batch": 2, "tokens": 3, "past": 5},
    )
    return embed, decoder
