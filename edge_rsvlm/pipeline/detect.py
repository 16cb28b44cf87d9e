"""Objects: of the classes that the bundle knows, of any words where it reads them, or like an example."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from edge_rsvlm.config.task_specs import (
    AnyDetectTask,
    DetectTask,
    GenerateTask,
    GgufTask,
    OpenDetectTask,
    TextDetectTask,
)
from edge_rsvlm.errors import UsageError
from edge_rsvlm.pipeline.boxes import Find, SceneBoxes, emitting
from edge_rsvlm.pipeline.cut import extent_xy
from edge_rsvlm.pipeline.outcome import Emit, Outcome
from edge_rsvlm.pipeline.per_tile import Kept
from edge_rsvlm.pipeline.runtime import Runtime
from edge_rsvlm.pipeline.stream import TileBatch, View
from edge_rsvlm.tasks.encode import encode
from edge_rsvlm.tasks.like import Examples
from edge_rsvlm.types import Boxes

BORDER_SHARE = 0.25
"""Where a model has no stride, two tiles may place one object apart by this share of their overlap."""
LIKE = "like"
"""The label of what was found by examples."""


@dataclass(frozen=True)
class DetectQuery:
    """Which objects are wanted. ``labels`` empty: all that the bundle knows.

    ``examples`` is what they look like, by the label that each kind shall have, where that is said instead of words.
    """

    labels: tuple[str, ...] = ()
    score_threshold: float | None = None
    examples: Mapping[str, Examples] = field(default_factory=dict, compare=False)


def wanted_labels(query: DetectQuery, task: AnyDetectTask) -> tuple[str, ...]:
    """The labels to look for, each once.

    Raises UsageError for a word outside a fixed vocabulary, with the nearest known one, and where any word will do but
    none was given.
    """
    labels = tuple(dict.fromkeys(label.strip() for label in query.labels))
    if isinstance(task, TextDetectTask):
        if not all(labels):
            raise UsageError("an empty --query names nothing", fix='write it like --query "airplane"')
        return tuple(query.examples) or labels or task.classes
    if isinstance(task, OpenDetectTask):
        if not labels or not all(labels):
            raise UsageError("this bundle finds what you name, and nothing was named", fix='add --query "airplane"')
        return labels
    for label in labels:
        if label not in task.classes:
            near = difflib.get_close_matches(label, task.classes, n=1, cutoff=0.4)
            hint = f"did you mean '{near[0]}'? " if near else ""
            known = ", ".join(task.classes)
            raise UsageError(f"'{label}' is not in this bundle's vocabulary", fix=f"{hint}known: {known}")
    return labels or task.classes


def detect(runtime: Runtime, task: AnyDetectTask, view: View, query: DetectQuery, emit: Emit) -> SceneBoxes:
    """Emits every object of the view's raster: ``{"label", "score", "box"}``, box x, y, w, h in raster pixels."""
    labels = wanted_labels(query, task)
    if isinstance(task, DetectTask):
        names, margin_px = task.classes, float(task.stride)
        find = _by_heat_map(runtime, task, query.score_threshold, [task.classes.index(label) for label in labels])
    elif isinstance(task, TextDetectTask):
        names, margin_px = labels, float(task.stride)
        if not query.examples:
            find = by_vectors(runtime, task, labels, query.score_threshold)
        else:
            find = by_examples(runtime, task, [*query.examples.values()], query.score_threshold)
    else:
        names, margin_px = labels, border_px(task)
        find = by_words(runtime, task, labels, query.score_threshold)

    def describe(score: float, label: int) -> dict[str, Any]:
        return {"label": names[label], "score": round(score, 4)}

    outcome = Outcome()
    use = emitting(view, describe, emit, outcome)
    return SceneBoxes(view, find, use, outcome, nms_iou=task.nms_iou, margin_px=margin_px)


def border_px(task: OpenDetectTask | GenerateTask | GgufTask) -> float:
    """How far beyond its own part of the scene a tile may see the centre of an object."""
    return BORDER_SHARE * task.input.overlap_px


def _by_heat_map(runtime: Runtime, task: DetectTask, threshold: float | None, wanted: Sequence[int]) -> Find:
    def find(tiles: TileBatch, kept: Kept) -> list[Boxes]:
        pixels_NCHW = tiles.dates[0].pixels_NCHW(kept)
        features = encode(runtime.open(task.encoder), pixels_NCHW, task.encoder_outputs)
        return [_of_labels(boxes, wanted) for boxes in runtime.detector(task, threshold)(features)]

    return find


def by_vectors(runtime: Runtime, task: TextDetectTask, labels: Sequence[str], threshold: float | None) -> Find:
    """Boxes like the vectors of words; their labels are places in ``labels``."""
    least = task.score_threshold if threshold is None else threshold

    def find(tiles: TileBatch, kept: Kept) -> list[Boxes]:
        features = encode(runtime.open(task.encoder), tiles.dates[0].pixels_NCHW(kept), task.encoder_outputs)
        return runtime.text_detector(task)(features, runtime.text_queries(task, labels), least)

    return find


def by_examples(runtime: Runtime, task: TextDetectTask, things: Sequence[Examples], threshold: float | None) -> Find:
    """Boxes of what looks like one of the examples of a thing."""
    least = task.like.threshold if threshold is None else threshold

    def find(tiles: TileBatch, kept: Kept) -> list[Boxes]:
        features = encode(runtime.open(task.encoder), tiles.dates[0].pixels_NCHW(kept), task.encoder_outputs)
        return runtime.like_detector(task)(features, things, least)

    return find


def _of_labels(boxes: Boxes, wanted: Sequence[int]) -> Boxes:
    keep = np.isin(boxes.labels_N, wanted)
    return Boxes(boxes.xyxy_N4[keep], boxes.scores_N[keep], boxes.labels_N[keep])


def by_words(runtime: Runtime, task: OpenDetectTask, labels: Sequence[str], threshold: float | None) -> Find:
    """Boxes for any words."""

    def find(tiles: TileBatch, kept: Kept) -> list[Boxes]:
        cut = tiles.dates[0]
        shares = runtime.open_detector(task, labels, threshold)(cut.pixels_NCHW(kept))
        return [
            Boxes(boxes.xyxy_N4 * np.tile(extent_xy(image), 2), boxes.scores_N, boxes.labels_N)
            for image, boxes in zip(cut.chosen(kept), shares, strict=True)
        ]

    return find
