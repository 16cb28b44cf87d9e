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
    overlaps = iou(np.array(first, np.float64), np.array(wanted, np.float64)) >= LEAST_IOU
    # At this IoU a box overlaps two others only where those overlap each other: the order of choice hardly matters.
    free = np.ones(len(wanted), np.bool_)
    for row in overlaps:
        hits = np.flatnonzero(row & free)
        if not len(hits):
            return False
        free[hits[0]] = False
    return True


def iou(a_N4: NDArray[np.float64], b_M4: NDArray[np.float64]) -> NDArray[np.float64]:
    """Intersection over union [N, M] of boxes x, y, width, height."""
    low = np.maximum(a_N4[:, None, :2], b_M4[None, :, :2])
    high = np.minimum((a_N4[:, :2] + a_N4[:, 2:])[:, None], (b_M4[:, :2] + b_M4[:, 2:])[None])
    common = np.prod(np.clip(high - low, 0, None), axis=-1)
    either = np.prod(a_N4[:, 2:], axis=1)[:, None] + np.prod(b_M4[:, 2:], axis=1)[None] - common
    found: NDArray[np.float64] = np.divide(common, either, out=np.zeros_like(common), where=either > 0)
    return found


def _boxes(session: Session, path: str, phrase: str) -> list[Box]:
    """The best first, where the bundle scores boxes; else in the order of the answer."""
    answered: list[tuple[float, Box]] = []

    def collect(record: dict[str, object], _: object) -> None:
        score = record["score"]
        answered.append((float(score) if isinstance(score, float) else 0.0, record["box"]))  # type: ignore[arg-type]

    session.ground(path, phrase, collect)
    return [box for _, box in sorted(answered, key=lambda item: -item[0])]
