"""Phrases and the boxes they mean: Pr@0.5, the share of phrases whose boxes are found.

Precision at an IoU of 0.5 is how referring expressions are scored (Zhan et al. 2023, "RSVG"); a phrase that means
several boxes is found when each of them is.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edge_rsvlm import scoring
from edge_rsvlm.evaluate import Evaluation, counted
from edge_rsvlm.evaluate.labels import Box, chosen, locate, read_phrases
from edge_rsvlm.pipeline.outcome import Progress
from edge_rsvlm.pipeline.session import Session
from edge_rsvlm.pipeline.vocabulary import check_texts
from edge_rsvlm.types import iou

LEAST_IOU = 0.5


def evaluate_ground(
    session: Session, phrases: Path, images: str, only: Path | None, progress: Progress | None
) -> Evaluation:
    """Pr@0.5 over all phrases.

    ``phrases`` has JSON lines of ``{"image", "phrases": [{"phrase", "boxes": [[x, y, w, h], ...]}]}``.
    """
    session.require("ground")
    wanted = read_phrases(phrases)
    names = chosen(list(wanted), only, phrases)
    check_texts(session.bundle, "ground", [p.phrase for name in names for p in wanted[name]])
    right_I, asked_I = np.zeros(len(names), np.int64), np.zeros(len(names), np.int64)
    for i, source in enumerate(counted(locate(images, names), progress)):
        for phrase in wanted[names[i]]:
            asked_I[i] += 1
            right_I[i] += all_found(_boxes(session, source.path, phrase.phrase), phrase.boxes)
    return Evaluation("ground", len(names), (scoring.accuracy_score(right_I, asked_I, metric="Pr@0.5"),))


def all_found(answered: Sequence[Box], wanted: Sequence[Box]) -> bool:
    """Whether the first answers, as many as boxes are wanted (x, y, width, height), meet these one to one."""
    first = answered[: len(wanted)]
    if len(first) < len(wanted):
        return False
    overlapping = overlaps(first, wanted) >= LEAST_IOU
    # At this IoU a box overlaps two others only where those overlap each other: the order of choice hardly matters.
    free = np.ones(len(wanted), np.bool_)
    for row in overlapping:
        hits = np.flatnonzero(row & free)
        if not len(hits):
            return False
        free[hits[0]] = False
    return True


def overlaps(a: Sequence[Box], b: Sequence[Box]) -> NDArray[np.float64]:
    """Intersection over union [N, M] of boxes x, y, width, height."""
    corners_a, corners_b = (_corners(boxes) for boxes in (a, b))
    return iou(corners_a[:, None], corners_b)


def _corners(boxes: Sequence[Box]) -> NDArray[np.float64]:
    xywh = np.array(boxes, np.float64).reshape(-1, 4)
    return np.hstack([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]])


def _boxes(session: Session, path: str, phrase: str) -> list[Box]:
    """The best first, where the bundle scores boxes; else in the order of the answer."""
    answered: list[tuple[float, Box]] = []

    def collect(record: dict[str, object], _: object) -> None:
        score = record["score"]
        answered.append((float(score) if isinstance(score, float) else 0.0, record["box"]))  # type: ignore[arg-type]

    session.ground(path, phrase, collect)
    return [box for _, box in sorted(answered, key=lambda item: -item[0])]
