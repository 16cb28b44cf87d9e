"""What the manifest says of the default model: its facts, its tasks, and where its scores are cut."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from edge_rsvlm.errors import InputError
from edge_rsvlm.export.artifact import Artifact
from edge_rsvlm.export.default.data.captions import BOS, EOS_ID
from edge_rsvlm.export.default.data.change import OVERLAP_PX, TILE_PX
from edge_rsvlm.export.default.data.views import MEAN, S2_RANGE, STD, U8_RANGE
from edge_rsvlm.export.default.model import change, detect
from edge_rsvlm.export.default.model.decoder import DecoderConfig
from edge_rsvlm.export.default.model.encoder import STEM_BANDS, STRIDES
from edge_rsvlm.export.default.stages import caption

NAME, VERSION = "edge-rsvlm-default", 1
LICENCE = "research and non-commercial use only (terms of the training data)"
DESCRIPTION = "MobileNetV2 encoder with box, change and caption heads for aerial and satellite images"
TRAINING_DATA = (
    "ImageNet MobileNetV2 weights (Apache-2.0)",
    "UC Merced Land Use (public domain) with UCM-Captions and RSIVQA (research)",
    "RSICD (research only)", "HRPlanes (CC BY 4.0)", "Aerial Airport (public domain)",
    "Airbus Aircraft Sample (CC BY-NC-SA 4.0)", "SIMD (research)", "drone vehicles (CC BY / BY-SA)",
    "OSCD (Copernicus imagery; masks CC BY-NC-SA)", "SZTAKI AirChange (scientific use)",
)  # fmt: skip
COLOUR = tuple("none" if band == "nir" else band for band in STEM_BANDS)
"""Boxes and captions were learnt without near infrared."""
FLOAT_RANGE = S2_RANGE / 10_000  # reflectance
WHOLE_PX = 512
"""Images of unknown ground resolution up to this long side have one caption."""
THRESHOLDS_NAME = "thresholds.json"


@dataclass(frozen=True)
class Thresholds:
    """Where scores are cut, chosen on data that only training has: as much a fact of the model as its weights."""

    chosen_by: ClassVar[str] = "edge_rsvlm.export.default.thresholds"
    """The module that chooses them."""

    detect: float
    change: float
    change_by_others: dict[str, float] = field(default_factory=dict)
    """Per held-out city, the threshold of change that the other cities choose."""


Chosen = TypeVar("Chosen", bound=Thresholds)


def write_thresholds(folder: Path, stages: Sequence[Artifact], chosen: Thresholds) -> None:
    """Beside the stages, with the hashes of those that they were chosen for."""
    text = json.dumps({**asdict(chosen), "stages": _hashes(stages)}, indent=2)
    (folder / THRESHOLDS_NAME).write_text(text + "\n")


def read_thresholds(folder: Path, stages: Sequence[Artifact], kind: type[Chosen]) -> Chosen:
    """InputError where there are none, or where they were chosen for other weights."""
    path = folder / THRESHOLDS_NAME
    fix = f"python -m {kind.chosen_by} chooses them"
    try:
        found = json.loads(path.read_text())
        stages_of = found.pop("stages", None)
        chosen = kind(**found)
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise InputError(f"{path} does not say where to cut scores ({exc!r})", fix=fix) from exc
    if stages_of != _hashes(stages):
        raise InputError(f"{path} is of other weights than those beside it", fix=fix)
    return chosen


def _hashes(stages: Sequence[Artifact]) -> dict[str, str]:
    return {str(stage.manifest["stage"]): stage.hash for stage in stages}


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


def task_specs(decoder: DecoderConfig, cuts: Thresholds) -> dict[str, Any]:
    """Tasks of the manifest, without ``memory``.

    Ground resolutions are those of the training images under their scale jitter.
    """
    return {
        "detect": {
            "kind": "heat_map", "input": input_spec(512, 160, (0.1, 1.0)), "encoder": "encoder", "head": "detect",
            "encoder_outputs": detect.LEVELS[::-1], "classes": detect.CLASSES, "stride": detect.STRIDE,
            "score_threshold": cuts.detect, "nms_iou": 0.5, "max_boxes_per_tile": 1000,
        },
        "change": change_task(cuts.change),
        "caption": {
            "input": input_spec(256, 0, (0.3, 15.0), whole_px=WHOLE_PX), "encoder_outputs": ["c5"],
            **generate_task("caption", decoder), "prompt": "{image}" + BOS,
            "max_tokens": caption.MOST_TOKENS, "beams": 3,
        },
    }  # fmt: skip


def change_task(threshold: float) -> dict[str, Any]:
    return {
        "input": input_spec(TILE_PX, OVERLAP_PX, (1.5, 6.4), STEM_BANDS), "encoder": "encoder", "head": "change",
        "encoder_outputs": change.LEVELS[::-1], "stride": change.STRIDE, "threshold": threshold,
        "mirrored": True, "min_area_m2": 200.0, "min_area_px": 4,
    }  # fmt: skip


def generate_task(graphs: str, decoder: DecoderConfig) -> dict[str, Any]:
    """What tasks have in common whose words are written by the graphs ``NAME_prefix``, ``NAME_embed`` and
    ``NAME_decoder``."""
    return {
        "kind": "generate", "encoder": "encoder", "project": f"{graphs}_prefix",
        "decoder": {
            "kind": "onnx", "embed": f"{graphs}_embed", "graph": f"{graphs}_decoder",
            "cache": {"layers": decoder.layers, "heads": decoder.heads, "head_dim": decoder.head_width},
        },
        "tokenizer": {"file": caption.TOKENIZER_NAME, "add_special_tokens": False},
        "visual": {"token": None, "unit_px": STRIDES["c5"]}, "positions": "sequence", "eos_ids": [EOS_ID],
        "length_penalty": 1.0,
    }  # fmt: skip
