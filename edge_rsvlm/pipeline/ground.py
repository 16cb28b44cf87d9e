"""Boxes for a referring phrase, from a model that writes them or from one that finds any words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeGuard

import numpy as np

from edge_rsvlm.config.task_specs import BoxFormat, GenerateTask, GgufTask, OpenDetectTask, TextDetectTask
from edge_rsvlm.errors import BundleError
from edge_rsvlm.pipeline.boxes import Find, SceneBoxes
from edge_rsvlm.pipeline.cut import extent_xy
from edge_rsvlm.pipeline.detect import border_px, by_words
from edge_rsvlm.pipeline.outcome import Emit
from edge_rsvlm.pipeline.per_tile import Kept
from edge_rsvlm.pipeline.runtime import Runtime, detect_task
from edge_rsvlm.pipeline.stream import TileBatch, View
from edge_rsvlm.tasks.encode import encode
from edge_rsvlm.tasks.generate import parse_boxes
from edge_rsvlm.tasks.snap import snapped
from edge_rsvlm.tiles.prepare import Prepared
from edge_rsvlm.types import Boxes

WRITTEN_NMS_IOU = 0.5
"""A model that writes boxes says nothing of suppression; this only joins what two tiles saw of one object."""
SNAP_SHARE = 0.5
"""Of the detect task's threshold: that something is there was said already."""


def ground(
    runtime: Runtime, task: GenerateTask | GgufTask | OpenDetectTask, view: View, phrase: str, emit: Emit
) -> SceneBoxes:
    """Emits the boxes of ``phrase``: ``{"label", "score", "box"}``, box x, y, w, h in raster pixels.

    Boxes that a model wrote have no score: None.
    """
    if isinstance(task, OpenDetectTask):
        find, scored, nms_iou, margin_px = by_words(runtime, task, [phrase], None), True, task.nms_iou, border_px(task)
    else:
        find, scored, nms_iou, margin_px = _written(runtime, task, phrase), False, WRITTEN_NMS_IOU, border_px(task)

    def describe(score: float, _: int) -> dict[str, Any]:
        return {"label": phrase, "score": round(score, 4) if scored else None}

    return SceneBoxes(view, find, describe, emit, nms_iou=nms_iou, margin_px=margin_px)


def _written(runtime: Runtime, task: GenerateTask | GgufTask, phrase: str) -> Find:
    form = task.boxes
    if form is None:
        raise BundleError("the ground task does not say how boxes are written", fix="export the bundle again")

    def find(tiles: TileBatch, kept: Kept) -> list[Boxes]:
        images = tiles.dates[0].chosen(kept)
        answers = runtime.generator("ground", task)(images, phrase, None)
        written = [_boxes(answer, form, image) for answer, image in zip(answers, images, strict=True)]
        return _snapped(runtime, task, tiles, kept, written) if _snaps(task) else written

    return find


def _snaps(task: GenerateTask | GgufTask) -> TypeGuard[GenerateTask]:
    return isinstance(task, GenerateTask) and task.snap


def _snapped(
    runtime: Runtime, task: GenerateTask, tiles: TileBatch, kept: Kept, written: Sequence[Boxes]
) -> list[Boxes]:
    """Onto what the detect task's head sees in the very pixels that the decoder looked at."""
    spec = detect_task(runtime.manifest)
    assert isinstance(spec, TextDetectTask), "the manifest was checked"
    features = encode(runtime.open(task.encoder), tiles.dates[0].pixels_NCHW(kept), spec.encoder_outputs)
    queries_QD = runtime.text_queries(spec, spec.classes)
    seen = runtime.text_detector(spec)(features, queries_QD, SNAP_SHARE * spec.score_threshold)
    return [
        Boxes(snapped(boxes.xyxy_N4, objects.xyxy_N4, objects.scores_N), boxes.scores_N, boxes.labels_N)
        for boxes, objects in zip(written, seen, strict=True)
    ]


def _boxes(answer: str, form: BoxFormat, image: Prepared) -> Boxes:
    width, height = extent_xy(image)
    shares_N4 = np.array(parse_boxes(answer, form, (height, width)), np.float64).reshape(-1, 4)
    count = len(shares_N4)
    return Boxes(shares_N4 * (width, height, width, height), np.ones(count, np.float32), np.zeros(count, np.int64))
