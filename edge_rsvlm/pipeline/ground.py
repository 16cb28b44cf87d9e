"""Boxes for a referring phrase: written by a model, found by one that takes any words, or chosen among objects."""

from __future__ import annotations

from typing import Any

import numpy as np

from edge_rsvlm.config.offered import object_task
from edge_rsvlm.config.task_specs import BoxFormat, GenerateTask, GgufTask, OpenDetectTask, ReferTask
from edge_rsvlm.errors import BundleError
from edge_rsvlm.merge.boxes import concatenate, empty_boxes, take
from edge_rsvlm.pipeline.boxes import Describe, Find, SceneBoxes, emitting
from edge_rsvlm.pipeline.cut import extent_xy
from edge_rsvlm.pipeline.detect import border_px, by_vectors, by_words
from edge_rsvlm.pipeline.outcome import Emit, Outcome
from edge_rsvlm.pipeline.per_tile import Kept
from edge_rsvlm.pipeline.runtime import Runtime
from edge_rsvlm.pipeline.stream import TileBatch, View
from edge_rsvlm.tasks.generate import parse_boxes
from edge_rsvlm.tasks.refer import one_of_each
from edge_rsvlm.tiles.prepare import Prepared
from edge_rsvlm.types import Boxes

WRITTEN_NMS_IOU = 0.5
"""A model that writes boxes says nothing of suppression; this only joins what two tiles saw of one object."""


def ground(
    runtime: Runtime,
    task: GenerateTask | GgufTask | OpenDetectTask | ReferTask,
    view: View,
    phrase: str,
    emit: Emit,
) -> SceneBoxes:
    """Emits the boxes of ``phrase``: ``{"label", "score", "box"}``, box x, y, w, h in raster pixels.

    Boxes that a model wrote have no score: None.
    """
    if isinstance(task, ReferTask):
        return _referred(runtime, task, view, phrase, emit)
    if isinstance(task, OpenDetectTask):
        find, scored, nms_iou = by_words(runtime, task, [phrase], None), True, task.nms_iou
    else:
        find, scored, nms_iou = _written(runtime, task, phrase), False, WRITTEN_NMS_IOU
    outcome = Outcome()
    use = emitting(view, _describing(phrase, scored), emit, outcome)
    return SceneBoxes(view, find, use, outcome, nms_iou=nms_iou, margin_px=border_px(task))


def _describing(phrase: str, scored: bool) -> Describe:
    def describe(score: float, _: int) -> dict[str, Any]:
        return {"label": phrase, "score": round(score, 4) if scored else None}

    return describe


def _referred(runtime: Runtime, task: ReferTask, view: View, phrase: str, emit: Emit) -> SceneBoxes:
    """Of the objects of the scene, those that the phrase means, best first.

    Nothing is emitted before the end: which one is the largest, or the third from the left, is known only then.
    """
    spec, outcome = object_task(runtime.manifest), Outcome()
    find = by_vectors(runtime, spec, spec.classes, None)
    found, send = [empty_boxes()], emitting(view, _describing(phrase, True), emit, outcome)

    def choose() -> None:
        every = concatenate(found)
        objects = one_of_each(every, task.most_objects)
        if len(objects.scores_N) == task.most_objects < len(every.scores_N):
            outcome.warnings.append(
                f"the phrase was read beside the {task.most_objects} surest of {len(every.scores_N)} objects: for the "
                "others, give a part of the scene"
            )
        with outcome.clock("engine"):
            scores_N = runtime.referrer(task)(phrase, objects, view.size)
        order = np.argsort(-scores_N, kind="stable")
        meant = order[scores_N[order] >= task.threshold]
        send(take(Boxes(objects.xyxy_N4, scores_N, objects.labels_N), meant))

    return SceneBoxes(
        view, find, found.append, outcome, nms_iou=spec.nms_iou, margin_px=float(spec.stride), conclude=choose
    )


def _written(runtime: Runtime, task: GenerateTask | GgufTask, phrase: str) -> Find:
    form = task.boxes
    if form is None:
        raise BundleError("the ground task does not say how boxes are written", fix="export the bundle again")

    def find(tiles: TileBatch, kept: Kept) -> list[Boxes]:
        images = tiles.dates[0].chosen(kept)
        answers = runtime.generator("ground", task)(images, phrase, None)
        return [_boxes(answer, form, image) for answer, image in zip(answers, images, strict=True)]

    return find


def _boxes(answer: str, form: BoxFormat, image: Prepared) -> Boxes:
    width, height = extent_xy(image)
    shares_N4 = np.array(parse_boxes(answer, form, (height, width)), np.float64).reshape(-1, 4)
    count = len(shares_N4)
    return Boxes(shares_N4 * (width, height, width, height), np.ones(count, np.float32), np.zeros(count, np.int64))
