"""Detections against labelled boxes: AP as pycocotools has it, and rates at a threshold.

Letters: I images, R resamples, D detections, K classes, T IoU thresholds.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edge_rsvlm.scoring.libraries import detection_libraries
from edge_rsvlm.scoring.sampling import F64, Score, resamples, scored
from edge_rsvlm.scoring.shares import rate_scores

AP_RESAMPLES = 200
RECALLS = np.linspace(0.0, 1.0, 101)


class Truth(NamedTuple):
    """A labelled box x, y, w, h. What lies on an ``ignore`` box counts neither way; without label, for every class."""

    label: str | None
    box: tuple[float, float, float, float]
    ignore: bool = False


class Found(NamedTuple):
    """A detected box x, y, w, h."""

    label: str
    score: float
    box: tuple[float, float, float, float]


@dataclass(frozen=True)
class ClassMatches:
    """Detections of one class, best first, matched to labelled boxes; ``positives_I`` of those are to be found."""

    image_D: NDArray[np.intp]
    score_D: F64
    true_TD: NDArray[np.bool_]
    false_TD: NDArray[np.bool_]
    positives_I: NDArray[np.int64]

    def counts(self, threshold: float) -> NDArray[np.int64]:
        """True and false positives and false negatives [I, 3] of detections from ``threshold`` on, at IoU 0.5."""
        images, kept = len(self.positives_I), self.score_D >= threshold
        tp, fp = (np.bincount(self.image_D[side[0] & kept], minlength=images) for side in (self.true_TD, self.false_TD))
        return np.stack([tp, fp, self.positives_I - tp], axis=1)

    def average_precision(self, weights_I: NDArray[np.int64]) -> F64:
        """AP [T] with 101 recall points, NaN without a box to find. Weights equal repeating the images."""
        positives = int(weights_I @ self.positives_I)
        thresholds, count = self.true_TD.shape
        if not positives:
            return np.full(thresholds, np.nan)
        if not count:
            return np.zeros(thresholds)
        weights_D = weights_I[self.image_D]
        tp, fp = (np.cumsum(side * weights_D, axis=1) for side in (self.true_TD, self.false_TD))
        precision = tp / np.maximum(tp + fp, 1)
        # The precision at a recall is the best at that recall or above.
        best = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        padded = np.hstack([best, np.zeros((thresholds, 1))])
        reached = [np.searchsorted(row / positives, RECALLS, side="left") for row in tp]
        return np.array([padded[t, at].mean() for t, at in enumerate(reached)])


def match_detections(
    truth: Sequence[Sequence[Truth]], found: Sequence[Sequence[Found]], classes: Sequence[str]
) -> dict[str, ClassMatches]:
    """Greedy matching as COCO does it, at IoU 0.5 to 0.95, without its limit of 100 detections per image."""
    coco, cocoeval = detection_libraries()
    with contextlib.redirect_stdout(io.StringIO()):
        labelled = _dataset(coco, truth, classes)
        evaluation = cocoeval.COCOeval(labelled, _results(labelled, found, classes), "bbox")
        evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, 1e10]], ["all"]
        evaluation.params.maxDets = [max(map(len, found), default=0) + 1]
        evaluation.evaluate()
    images = len(truth)
    per_class = [evaluation.evalImgs[k * images : (k + 1) * images] for k in range(len(classes))]
    thresholds = len(evaluation.params.iouThrs)
    return {name: _class_matches(parts, thresholds) for name, parts in zip(classes, per_class, strict=True)}


def _dataset(coco: Any, truth: Sequence[Sequence[Truth]], classes: Sequence[str]) -> Any:
    annotations = [
        {
            "image_id": i + 1,
            "category_id": k + 1,
            "bbox": [*t.box],
            "area": t.box[2] * t.box[3],
            "iscrowd": int(t.ignore),
        }
        for i, boxes in enumerate(truth)
        for t in boxes
        for k, name in enumerate(classes)
        if t.label in (name, None)
    ]
    dataset = coco.COCO()
    dataset.dataset = {
        "images": [{"id": i + 1} for i in range(len(truth))],
        "annotations": [annotation | {"id": n + 1} for n, annotation in enumerate(annotations)],
        "categories": [{"id": k + 1, "name": name} for k, name in enumerate(classes)],
    }
    dataset.createIndex()
    return dataset


def _results(labelled: Any, found: Sequence[Sequence[Found]], classes: Sequence[str]) -> Any:
    number = {name: k + 1 for k, name in enumerate(classes)}
    rows = [
        {"image_id": i + 1, "category_id": number[f.label], "bbox": [*f.box], "score": f.score}
        for i, boxes in enumerate(found)
        for f in boxes
        if f.label in number
    ]
    if rows:
        return labelled.loadRes(rows)
    empty = type(labelled)()
    empty.dataset = labelled.dataset | {"annotations": []}
    empty.createIndex()
    return empty


def _class_matches(parts: Sequence[Any], thresholds: int) -> ClassMatches:
    """From COCOeval's record per image, which is None where there is neither a box nor a detection."""
    known = [(i, part) for i, part in enumerate(parts) if part is not None]
    positives = np.zeros(len(parts), np.int64)
    for i, part in known:
        positives[i] = int((np.asarray(part["gtIgnore"]) == 0).sum())
    image = np.concatenate([np.zeros(0, np.intp), *(np.full(len(p["dtScores"]), i, np.intp) for i, p in known)])
    score = np.concatenate([np.zeros(0), *(np.asarray(p["dtScores"], np.float64) for _, p in known)])
    matched, ignored = (
        np.hstack([np.zeros((thresholds, 0), bool), *(np.asarray(p[key]) != 0 for _, p in known)])
        for key in ("dtMatches", "dtIgnore")
    )
    order = np.argsort(-score, kind="stable")
    true, false = (matched & ~ignored)[:, order], (~matched & ~ignored)[:, order]
    return ClassMatches(image[order], score[order], true, false, positives)


def detection_scores(matches: dict[str, ClassMatches], threshold: float) -> list[Score]:
    """AP50, AP50:95, and precision, recall and F1 at ``threshold``: per class that has boxes, then all together.

    All together is the mean AP over those classes, and the counts of those classes pooled.
    """
    matches = {name: found for name, found in matches.items() if found.positives_I.any()}
    images = len(next(iter(matches.values())).positives_I)
    draws = np.vstack([np.ones(images, np.int64), resamples(images, AP_RESAMPLES)])  # the first row is the sample
    ap_KRT = np.array([[found.average_precision(weights) for weights in draws] for found in matches.values()])
    defined = np.isfinite(ap_KRT)  # a resample may hold no box of a class
    known = defined.sum(axis=0)
    total = np.where(defined, ap_KRT, 0).sum(axis=0)
    mean_RT = np.divide(total, known, out=np.full(total.shape, np.nan), where=known > 0)
    counts = {name: found.counts(threshold) for name, found in matches.items()}
    rows: list[tuple[str | None, F64, NDArray[np.int64]]] = [
        (name, ap_KRT[k], counts[name]) for k, name in enumerate(matches)
    ]
    rows.append((None, mean_RT, np.sum(list(counts.values()), axis=0)))
    scores: list[Score] = []
    for label, ap_RT, counts_I3 in rows:
        for metric, values_R in (("AP50", ap_RT[:, 0]), ("AP50:95", ap_RT.mean(axis=1))):
            scores.append(scored(metric, float(values_R[0]), values_R[1:], images, label))
        scores += rate_scores(counts_I3, label)
    return scores


def ap50(truth: Sequence[Sequence[Truth]], found: Sequence[Sequence[Found]], label: str) -> float:
    """AP at IoU 0.5 of one class that has boxes."""
    matches = match_detections(truth, found, [label])[label]
    return float(matches.average_precision(np.ones(len(truth), np.int64))[0])
