"""Recall of texts by images and of images by texts. Letters: I images, T texts, R resamples."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edge_rsvlm.scoring.sampling import F64, RESAMPLES, SEED, Score, resamples, scored

RANKS = (1, 5, 10)


def recall_scores(cosine_IT: F64, owner_T: NDArray[np.int64]) -> list[Score]:
    """Recall at RANKS in percent: of images that find one of their texts, of texts that find their image, and the mean.

    Equal values are ranked in a random order that is always the same. Images are resampled with their texts, among all
    others as they are.
    """
    images, texts = cosine_IT.shape
    rng = np.random.default_rng(SEED)
    own_IT = owner_T[None] == np.arange(images)[:, None]
    text_rank_IT = _ranks(cosine_IT, rng.permutation(texts))
    image_rank_TI = _ranks(np.ascontiguousarray(cosine_IT.T), rng.permutation(images))
    best_I = np.where(own_IT, text_rank_IT, texts).min(axis=1)
    own_rank_T = image_rank_TI[np.arange(texts), owner_T]
    draws_RI = np.vstack([np.ones(images, np.int64), resamples(images, RESAMPLES)])
    count_I = np.bincount(owner_T, minlength=images)
    rows: dict[str, F64] = {}
    for k in RANKS:
        rows[f"image to text R@{k}"] = 100 * (draws_RI @ (best_I < k)) / images
    for k in RANKS:
        hits_I = np.bincount(owner_T, weights=own_rank_T < k, minlength=images)
        rows[f"text to image R@{k}"] = 100 * (draws_RI @ hits_I) / (draws_RI @ count_I)
    rows["mean recall"] = np.mean(list(rows.values()), axis=0)
    return [scored(name, float(values_R[0]), values_R[1:], images) for name, values_R in rows.items()]


def _ranks(values_NM: F64, ties_M: NDArray[np.int64]) -> NDArray[np.int64]:
    """How many of a row are ahead of each value [N, M]: larger ones, and equal ones that come first in ``ties_M``."""
    order_NM = np.lexsort((np.broadcast_to(ties_M, values_NM.shape), -values_NM), axis=1)
    ranks_NM = np.empty(values_NM.shape, np.int64)
    np.put_along_axis(ranks_NM, order_NM, np.broadcast_to(np.arange(values_NM.shape[1]), values_NM.shape), axis=1)
    return ranks_NM
