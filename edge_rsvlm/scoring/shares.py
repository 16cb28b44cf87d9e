"""Shares of what was counted: of pixels, answers and places. A ratio whose denominator is zero is 0, unless said.

Letters: I images, R resamples.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_rsvlm.scoring.sampling import F64, RESAMPLES, Score, resamples, scored

UNKNOWN = 255
RATES = ("precision", "recall", "F1")


def rates(counts: NDArray[Any]) -> F64:
    """Precision, recall and F1 [..., 3] from true positives, false positives and false negatives [..., 3]."""
    tp, fp, fn = np.moveaxis(np.asarray(counts, np.float64), -1, 0)
    ratios = [(tp, tp + fp), (tp, tp + fn), (2 * tp, 2 * tp + fp + fn)]
    return np.stack([np.divide(a, b, out=np.zeros_like(a), where=b > 0) for a, b in ratios], axis=-1)


def rate_scores(counts_I3: NDArray[Any], label: str | None = None) -> list[Score]:
    """Precision, recall and F1 pooled over images."""
    images = len(counts_I3)
    values, sampled_R3 = rates(counts_I3.sum(axis=0)), rates(resamples(images, RESAMPLES) @ counts_I3)
    return [scored(name, float(values[i]), sampled_R3[:, i], images, label) for i, name in enumerate(RATES)]


def change_counts(mask_HW: NDArray[np.uint8], changed_HW: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Pixels that are true positive, false positive and false negative [3], where the mask is known (not 255)."""
    found, known = mask_HW == 1, mask_HW != UNKNOWN
    pixels = (found & changed_HW, found & ~changed_HW, ~found & changed_HW)
    return np.array([int((p & known).sum()) for p in pixels], np.int64)


def accuracy_score(
    right_I: NDArray[np.int64], asked_I: NDArray[np.int64], label: str | None = None, *, metric: str = "accuracy"
) -> Score:
    """Share of questions answered right, pooled over images, which are resampled with all their questions."""
    images = int((asked_I > 0).sum())
    draws = resamples(len(asked_I), RESAMPLES)
    right_R, asked_R = draws @ right_I, draws @ asked_I
    sampled_R = np.divide(right_R, asked_R, out=np.full(len(draws), np.nan), where=asked_R > 0)
    value = float(right_I.sum() / asked_I.sum()) if asked_I.any() else 0.0
    return scored(metric, value, sampled_R, images, label)


def balanced_scores(counts_I4: NDArray[np.int64], label: str | None = None) -> list[Score]:
    """Balanced accuracy, which is the mean of recall and specificity, and these two, pooled over images.

    ``counts_I4`` are per image the positives found, all positives, the negatives left alone, and all negatives. A rate
    without places is not defined, and with it the balanced accuracy.
    """
    images = int((counts_I4[:, [1, 3]].sum(axis=1) > 0).sum())
    draws = np.vstack([np.ones(len(counts_I4), np.int64), resamples(len(counts_I4), RESAMPLES)])
    right_R2, all_R2 = (draws @ counts_I4[:, columns] for columns in ([0, 2], [1, 3]))
    rate_R2 = np.divide(right_R2, all_R2, out=np.full(all_R2.shape, np.nan), where=all_R2 > 0)
    rows = {"balanced accuracy": rate_R2.mean(axis=1), "recall": rate_R2[:, 0], "specificity": rate_R2[:, 1]}
    return [scored(name, float(values_R[0]), values_R[1:], images, label) for name, values_R in rows.items()]
