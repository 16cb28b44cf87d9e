"""What the manifest says of the model that is asked by words: its facts and its tasks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from edge_rsvlm.export.default.data.captions import BOS
from edge_rsvlm.export.default.data.objects import CLASSES, QUERIES
from edge_rsvlm.export.default.data.words import vocabulary
from edge_rsvlm.export.default.describe import (
    TRAINING_DATA,
    Thresholds,
    change_task,
    generate_task,
    input_spec,
)
from edge_rsvlm.export.default.model import boxes, dense
from edge_rsvlm.export.default.model.decoder import DecoderConfig
from edge_rsvlm.export.default.open_model.graphs import DETECT_MAPS, SEGMENT_MAPS, TOKEN_MAPS
from edge_rsvlm.export.default.stages import crops, language
from edge_rsvlm.export.default.stages.features import ANSWER, ASK, BOX, END_BOX, GROUND, LOCATIONS

NAME = "edge-rsvlm-default"
DESCRIPTION = (
    "MobileNetV2 encoder with heads for boxes, masks, change, scenes and language, asked by words and by examples, for"
    " aerial and satellite images"
)
ALL_TRAINING_DATA = (*TRAINING_DATA, "NAIP imagery (public domain) with tree points (CC BY 4.0, Ventura et al. 2022)")
OBJECTS_NAME = "objects.txt"
"""The words that name objects: a list of what boxes were learnt for, shorter than what captions say."""
ARTICLES = ("a", "the", "all")
"""Said before the words in training."""
OBJECTS_M, SCENES_M = (0.1, 1.0), (0.3, 15.0)
"""Ground resolutions of the training images under their scale jitter."""
SCENE_PX, WHOLE_SCENE_PX, WHOLE_CROP_PX = 256, 512, 1024
"""Images of unknown ground resolution up to so many pixels are looked at whole."""
CAPTION_TOKENS, ANSWER_TOKENS = 32, 16
CAPTION_BEAMS = 3
TEXT_TOKENS = 64
"""More than the longest caption has."""
SEGMENT_THRESHOLD = 0.5


@dataclass(frozen=True, kw_only=True)
class OpenThresholds(Thresholds):
    """And where scores by examples are cut."""

    chosen_by: ClassVar[str] = "edge_rsvlm.export.default.open_model.thresholds"

    like: float


@dataclass(frozen=True)
class Scales:
    """By which cosines become logits, learnt with the weights."""

    match: float
    label: float
    label_bias: float


def objects_vocabulary() -> list[str]:
    """Words that ``detect`` takes."""
    return vocabulary([*ARTICLES, *(word for query in QUERIES for word in query.words)])


def task_specs(decoder: DecoderConfig, cuts: OpenThresholds, scales: Scales) -> dict[str, Any]:
    """Tasks of the manifest, without ``memory``."""
    scene = input_spec(SCENE_PX, 0, SCENES_M, whole_px=WHOLE_SCENE_PX)
    written = generate_task("language", decoder) | {"encoder_outputs": TOKEN_MAPS}
    asked = {**written, "vocabulary": language.ASKED_NAME, "beams": 1}
    return {
        **_map_tasks(cuts, scales),
        "change": change_task(cuts.change),
        "caption": {
            **written, "input": scene, "prompt": "{image}" + BOS, "max_tokens": CAPTION_TOKENS,
            "beams": CAPTION_BEAMS,
        },
        "ask": {**asked, "input": scene, "prompt": _prompt(ASK), "max_tokens": ANSWER_TOKENS},
        "ground": {
            **asked, "input": input_spec(crops.SIZE_PX, 0, OBJECTS_M, whole_px=WHOLE_CROP_PX),
            "prompt": _prompt(GROUND), "max_tokens": language.MOST_TOKENS,
            "boxes": {"open": BOX, "close": END_BOX, "scale": len(LOCATIONS)}, "snap": True,
        },
        **dict.fromkeys(("classify", "search"), _match(scene, scales)),
    }  # fmt: skip


def _prompt(mark: str) -> str:
    return f"{{image}}{mark}{{text}}{ANSWER}"


def _map_tasks(cuts: OpenThresholds, scales: Scales) -> dict[str, Any]:
    """What is read of maps of embeddings: boxes and masks."""
    spec = input_spec(512, 160, OBJECTS_M)
    return {
        "detect": {
            "kind": "text_heat_map", "input": spec, **_head("detect", DETECT_MAPS),
            "text": _text("query", OBJECTS_NAME), "query_prompt": "{label}", "classes": CLASSES,
            "stride": boxes.STRIDE, "score_threshold": cuts.detect, "like_threshold": cuts.like, "nms_iou": 0.5,
            "max_boxes_per_tile": 1000,
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
    tokenizer = {"file": language.TOKENIZER_NAME, "add_special_tokens": False, "max_length": TEXT_TOKENS}
    return {"graph": "text", "tokenizer": tokenizer, "output": output, "vocabulary": words}
