"""What the manifest says of the default model: its facts, its tasks, and where its scores are cut."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from edge_rsvlm.errors import InputError
from edge_rsvlm.export.artifact import Artifact
from edge_rsvlm.export.default.data.captions import BOS, EOS_ID
from edge_rsvlm.export.default.data.change import OVERLAP_PX, TILE_PX
from edge_rsvlm.export.default.data.objects import CLASSES, QUERIES
from edge_rsvlm.export.default.data.phrases import every_phrase
from edge_rsvlm.export.default.data.views import MEAN, S2_RANGE, STD, U8_RANGE
from edge_rsvlm.export.default.data.words import vocabulary
from edge_rsvlm.export.default.graphs import DETECT_MAPS, SEGMENT_MAPS, TOKEN_MAPS
from edge_rsvlm.export.default.model import appearance, boxes, change, dense
from edge_rsvlm.export.default.model.decoder import DecoderConfig
from edge_rsvlm.export.default.model.encoder import STEM_BANDS, STRIDES
from edge_rsvlm.export.default.stages import language, refer
from edge_rsvlm.export.default.stages.features import ANSWER, ASK

NAME = "edge-rsvlm-default"
LICENCE = "research and non-commercial use only (terms of the training data)"
DESCRIPTION = (
    "MobileNetV2 encoder with heads for boxes, masks, change, scenes and language, asked by words and by examples, for"
    " aerial and satellite images"
)
TRAINING_DATA = (
    "ImageNet MobileNetV2 weights (Apache-2.0)",
    "UC Merced Land Use (public domain) with UCM-Captions and RSIVQA (research)",
    "RSICD (research only)", "HRPlanes (CC BY 4.0)", "Aerial Airport (public domain)",
    "Airbus Aircraft Sample (CC BY-NC-SA 4.0)", "SIMD (research)", "drone vehicles (CC BY / BY-SA)",
    "OSCD (Copernicus imagery; masks CC BY-NC-SA)", "SZTAKI AirChange (scientific use)",
    "NAIP imagery (public domain) with tree points (CC BY 4.0, Ventura et al. 2022)",
)  # fmt: skip
COLOUR = tuple("none" if band == "nir" else band for band in STEM_BANDS)
"""All but change was learnt without near infrared."""
FLOAT_RANGE = S2_RANGE / 10_000  # reflectance
THRESHOLDS_NAME = "thresholds.json"
OBJECTS_NAME = "objects.txt"
"""The words that name objects: a list of what boxes were learnt for, shorter than what captions say."""
PHRASES_NAME = "phrases.txt"
"""The words of phrases for objects."""
ARTICLES = ("a", "the", "all")
"""Said before the words in training."""
OBJECTS_M, SCENES_M = (0.1, 1.0), (0.3, 15.0)
"""Ground resolutions of the training images under their scale jitter."""
SCENE_PX, WHOLE_SCENE_PX = 256, 512
"""Images of unknown ground resolution up to so many pixels are looked at whole."""
CAPTION_TOKENS, ANSWER_TOKENS = 32, 16
CAPTION_BEAMS, CAPTION_LENGTH_PENALTY = 3, 0.4
"""Chosen on UCM-Captions' validation part: ranked by the mean over their tokens, long sentences win too often."""
TEXT_TOKENS = 64
"""More than the longest caption has."""
SEGMENT_THRESHOLD = 0.5
REFER_THRESHOLD = 0.3
"""Below a half: who asks for an object expects an answer, and training has phrases for nothing too."""


@dataclass(frozen=True)
class Thresholds:
    """Where scores are cut, chosen on data that only training has: as much a fact of the model as its weights."""

    detect: float
    like: float
    """Of boxes by examples."""
    change: float
    change_by_others: dict[str, float] = field(default_factory=dict)
    """Per held-out city, the threshold of change that the other cities choose."""


@dataclass(frozen=True)
class Scales:
    """By which cosines become logits, learnt with the weights."""

    match: float
    label: float
    label_bias: float


def write_thresholds(folder: Path, stages: Sequence[Artifact], chosen: Thresholds) -> None:
    """Beside the stages, with the hashes of those that they were chosen for."""
    text = json.dumps({**asdict(chosen), "stages": _hashes(stages)}, indent=2)
    (folder / THRESHOLDS_NAME).write_text(text + "\n")


def read_thresholds(folder: Path, stages: Sequence[Artifact]) -> Thresholds:
    """InputError where there are none, or where they were chosen for other weights."""
    path = folder / THRESHOLDS_NAME
    fix = "python -m edge_rsvlm.export.default.thresholds chooses them"
    try:
        found = json.loads(path.read_text())
        stages_of = found.pop("stages", None)
        chosen = Thresholds(**found)
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise InputError(f"{path} does not say where to cut scores ({exc!r})", fix=fix) from exc
    if stages_of != _hashes(stages):
        raise InputError(f"{path} is of other weights than those beside it", fix=fix)
    return chosen


def _hashes(stages: Sequence[Artifact]) -> dict[str, str]:
    return {str(stage.manifest["stage"]): stage.hash for stage in stages}


def objects_vocabulary() -> list[str]:
    """Words that ``detect`` takes."""
    return vocabulary([*ARTICLES, *(word for query in QUERIES for word in query.words)])


def phrases_vocabulary() -> list[str]:
    """Words that ``ground`` takes."""
    return vocabulary(every_phrase())


def input_spec(
    tile_px: int,
    overlap_px: int,
    resolution_m: tuple[float, float],
    bands: Sequence[str] = COLOUR,
    *,
    whole_px: int = 0,
) -> dict[str, Any]:
    ranges = {"uint8": (0.0, U8_RANGE), "uint16": (0.0, S2_RANGE), "float32": (0.0, FLOAT_RANGE)}
    return {
        "bands": bands, "ranges": ranges, "mean": MEAN, "std": STD, "tile_px": tile_px, "overlap_px": overlap_px,
        "resolution_m": resolution_m, "whole_px": whole_px, "resampling": "bilinear",
    }  # fmt: skip


def task_specs(decoder: DecoderConfig, cuts: Thresholds, scales: Scales) -> dict[str, Any]:
    """Tasks of the manifest, without ``memory``."""
    scene = input_spec(SCENE_PX, 0, SCENES_M, whole_px=WHOLE_SCENE_PX)
    written = _generate(decoder)
    return {
        **_map_tasks(cuts, scales),
        "change": _change(cuts.change),
        "caption": {
            **written, "input": scene, "prompt": "{image}" + BOS, "max_tokens": CAPTION_TOKENS,
            "beams": CAPTION_BEAMS, "length_penalty": CAPTION_LENGTH_PENALTY,
        },
        "ask": {
            **written, "input": scene, "prompt": f"{{image}}{ASK}{{text}}{ANSWER}", "max_tokens": ANSWER_TOKENS,
            "beams": 1, "vocabulary": language.VOCABULARY_NAME,
        },
        **dict.fromkeys(("classify", "search"), _match(scene, scales)),
    }  # fmt: skip


def _map_tasks(cuts: Thresholds, scales: Scales) -> dict[str, Any]:
    """What is read of maps of embeddings: boxes, what phrases mean of them, and masks."""
    spec = input_spec(512, 160, OBJECTS_M)
    return {
        "detect": {
            "kind": "text_heat_map", "input": spec, **_head("detect", DETECT_MAPS),
            "text": _text("query", OBJECTS_NAME), "query_prompt": "{label}", "classes": CLASSES,
            "stride": boxes.STRIDE, "score_threshold": cuts.detect, "nms_iou": 0.5, "max_boxes_per_tile": 1000,
            "like": {"graph": "appearance", "encoder_outputs": appearance.MAPS, "threshold": cuts.like},
        },
        "ground": {
            "kind": "refer", "input": spec, "graph": "refer", "tokenizer": _tokenizer(), "vocabulary": PHRASES_NAME,
            "threshold": REFER_THRESHOLD, "most_objects": refer.MOST_OBJECTS,
        },
        "segment": {
            "input": spec, **_head("segment", SEGMENT_MAPS), "text": _text("label", language.VOCABULARY_NAME),
            "label_prompt": "{label}", "logit_scale": scales.label, "logit_bias": scales.label_bias,
            "stride": dense.STRIDE, "threshold": SEGMENT_THRESHOLD, "min_area_m2": 4.0,
            "min_area_px": dense.STRIDE**2, "experimental": True,
        },
    }  # fmt: skip


def _match(spec: dict[str, Any], scales: Scales) -> dict[str, Any]:
    return {
        "input": spec, **_head("match", ("c5",)), "text": _text("embedding", language.VOCABULARY_NAME),
        "label_prompt": "{label}", "score": "softmax", "logit_scale": scales.match,
    }  # fmt: skip


def _head(name: str, maps: Sequence[str]) -> dict[str, Any]:
    return {"encoder": "encoder", "head": name, "encoder_outputs": maps}


def _text(output: str, words: str) -> dict[str, Any]:
    return {"graph": "text", "tokenizer": _tokenizer(), "output": output, "vocabulary": words}


def _tokenizer() -> dict[str, Any]:
    return {"file": language.TOKENIZER_NAME, "add_special_tokens": False, "max_length": TEXT_TOKENS}


def _change(threshold: float) -> dict[str, Any]:
    return {
        "input": input_spec(TILE_PX, OVERLAP_PX, (1.5, 6.4), STEM_BANDS), "encoder": "encoder", "head": "change",
        "encoder_outputs": change.LEVELS[::-1], "stride": change.STRIDE, "threshold": threshold,
        "mirrored": True, "min_area_m2": 200.0, "min_cells": 4,
    }  # fmt: skip


def _generate(decoder: DecoderConfig) -> dict[str, Any]:
    """What tasks have in common whose words the decoder writes."""
    return {
        "kind": "generate", "encoder": "encoder", "encoder_outputs": TOKEN_MAPS, "project": "language_prefix",
        "decoder": {
            "kind": "onnx", "embed": "language_embed", "graph": "language_decoder",
            "cache": {"layers": decoder.layers, "heads": decoder.heads, "head_dim": decoder.head_width},
        },
        "tokenizer": {"file": language.TOKENIZER_NAME, "add_special_tokens": False},
        "visual": {"token": None, "unit_px": STRIDES["c5"]}, "positions": "sequence", "eos_ids": [EOS_ID],
        "length_penalty": 1.0,
    }  # fmt: skip
