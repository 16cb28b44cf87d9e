"""Scores of detection, change and captions, each with a bootstrap 95 % interval over images: pure numbers, no files.

A resample draws as many images as there are, with replacement: a row of integer weights per image. Every score here
is a function of weighted sums over images, which makes recomputing it cheap (Efron 1979, "Bootstrap methods").
A ratio whose denominator is zero is 0. Letters: I images, R resamples, D detections, T IoU thresholds.

AP is that of pycocotools, CIDEr and BLEU are those of pycocoevalcap; both are imported when first used.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edge_rsvlm.errors import UsageError

F64 = NDArray[np.float64]
SEED = 0
RESAMPLES = 1000
AP_RESAMPLES = 200
UNKNOWN = 255
RECALLS = np.linspace(0.0, 1.0, 101)
RATES = ("precision", "recall", "F1")
RANKS = (1, 5, 10)


@dataclass(frozen=True)
class Score:
    """``label`` is a class or a pair, None for all together; ``interval`` is None for fewer than two samples.

    ``draws_R`` are the values of the resamples: those of two scores over equally many images are drawn alike, and can
    be compared pair by pair.
    """

    metric: str
    value: float
    interval: tuple[float, float] | None
    samples: int
    label: str | None = None
    draws_R: F64 = field(default_factory=lambda: np.zeros(0), repr=False, compare=False)


def _score(metric: str, value: float, draws_R: F64, images: int, label: str | None = None) -> Score:
    return Score(metric, value, interval(draws_R, images), images, label, draws_R)


def loss_bound(before: Score, after: Score) -> float:
    """The upper end of the 95 % interval of what ``after`` lost, over the same images; their difference for one."""
    lost_R = before.draws_R - after.draws_R
    defined = lost_R[np.isfinite(lost_R)]
    return float(np.percentile(defined, 97.5)) if before.samples > 1 and len(defined) else before.value - after.value


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


def require(*modules: str) -> list[Any]:
    """The named modules; UsageError with the install command when one is missing."""
    try:
        return [importlib.import_module(name) for name in modules]
    except ImportError as exc:
        raise UsageError(f"scoring needs {exc.name}", fix="pip install 'edge-rsvlm[eval]'") from exc


def detection_libraries() -> list[Any]:
    return require("pycocotools.coco", "pycocotools.cocoeval")


def caption_libraries() -> list[Any]:
    return require("pycocoevalcap.cider.cider", "pycocoevalcap.bleu.bleu", "pycocoevalcap.bleu.bleu_scorer")


def resamples(images: int, count: int) -> NDArray[np.int64]:
    """How often each image is drawn in each resample [R, I]; the same for the same numbers."""
    return np.random.default_rng(SEED).multinomial(images, np.full(images, 1 / images), size=count)


def interval(values_R: F64, images: int) -> tuple[float, float] | None:
    """The middle 95 % of the resamples in which the score is defined."""
    defined = values_R[np.isfinite(values_R)]
    if images < 2 or not len(defined):
        return None
    low, high = np.percentile(defined, [2.5, 97.5])
    return float(low), float(high)


def rates(counts: NDArray[Any]) -> F64:
    """Precision, recall and F1 [..., 3] from true positives, false positives and false negatives [..., 3]."""
    tp, fp, fn = np.moveaxis(np.asarray(counts, np.float64), -1, 0)
    ratios = [(tp, tp + fp), (tp, tp + fn), (2 * tp, 2 * tp + fp + fn)]
    return np.stack([np.divide(a, b, out=np.zeros_like(a), where=b > 0) for a, b in ratios], axis=-1)


def rate_scores(counts_I3: NDArray[Any], label: str | None = None) -> list[Score]:
    """Precision, recall and F1 pooled over images."""
    images = len(counts_I3)
    values, sampled_R3 = rates(counts_I3.sum(axis=0)), rates(resamples(images, RESAMPLES) @ counts_I3)
    return [_score(name, float(values[i]), sampled_R3[:, i], images, label) for i, name in enumerate(RATES)]


def change_counts(mask_HW: NDArray[np.uint8], changed_HW: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Pixels that are true positive, false positive and false negative [3], where the mask is known (not 255)."""
    found, known = mask_HW == 1, mask_HW != UNKNOWN
    pixels = (found & changed_HW, found & ~changed_HW, ~found & changed_HW)
    return np.array([int((p & known).sum()) for p in pixels], np.int64)


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
            scores.append(_score(metric, float(values_R[0]), values_R[1:], images, label))
        scores += rate_scores(counts_I3, label)
    return scores


def ap50(truth: Sequence[Sequence[Truth]], found: Sequence[Sequence[Found]], label: str) -> float:
    """AP at IoU 0.5 of one class that has boxes."""
    matches = match_detections(truth, found, [label])[label]
    return float(matches.average_precision(np.ones(len(truth), np.int64))[0])


def score_of_draws(metric: str, values_R: F64, label: str) -> Score:
    """The mean over random draws, and the middle 95 % of them; ``samples`` are the draws."""
    return _score(metric, float(values_R.mean()), values_R, len(values_R), label)


def words(text: str) -> str:
    """The tokens of a sentence, joined by spaces: lower case, every run of letters and digits, no punctuation."""
    return " ".join(re.findall(r"\w+", text.lower()))


def accuracy_score(
    right_I: NDArray[np.int64], asked_I: NDArray[np.int64], label: str | None = None, *, metric: str = "accuracy"
) -> Score:
    """Share of questions answered right, pooled over images, which are resampled with all their questions."""
    images = int((asked_I > 0).sum())
    draws = resamples(len(asked_I), RESAMPLES)
    right_R, asked_R = draws @ right_I, draws @ asked_I
    sampled_R = np.divide(right_R, asked_R, out=np.full(len(draws), np.nan), where=asked_R > 0)
    value = float(right_I.sum() / asked_I.sum()) if asked_I.any() else 0.0
    return _score(metric, value, sampled_R, images, label)


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
    return [_score(name, float(values_R[0]), values_R[1:], images) for name, values_R in rows.items()]


def _ranks(values_NM: F64, ties_M: NDArray[np.int64]) -> NDArray[np.int64]:
    """How many of a row are ahead of each value [N, M]: larger ones, and equal ones that come first in ``ties_M``."""
    order_NM = np.lexsort((np.broadcast_to(ties_M, values_NM.shape), -values_NM), axis=1)
    ranks_NM = np.empty(values_NM.shape, np.int64)
    np.put_along_axis(ranks_NM, order_NM, np.broadcast_to(np.arange(values_NM.shape[1]), values_NM.shape), axis=1)
    return ranks_NM


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
    return [_score(name, float(values_R[0]), values_R[1:], images, label) for name, values_R in rows.items()]


def caption_scores(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> list[Score]:
    """CIDEr and BLEU-4 of one sentence per image. Both sides are tokenised by ``words``, not by PTB (no Java).

    Resamples keep CIDEr's document frequencies, which are those of all references here.
    """
    cider, bleu, bleu_scorer = caption_libraries()
    said = {i: [words(text)] for i, text in enumerate(candidates)}
    true = {i: [words(text) for text in texts] for i, texts in enumerate(references)}
    images = len(said)
    draws = resamples(images, RESAMPLES)
    consensus, cider_I = cider.Cider().compute_score(true, said)
    bleus, _ = bleu.Bleu(4).compute_score(true, said, verbose=0)
    counts = np.array([_bleu_counts(bleu_scorer, said[i][0], true[i]) for i in said], np.float64)
    sampled_R = draws @ np.asarray(cider_I) / images
    return [
        _score("CIDEr", float(consensus), sampled_R, images),
        _score("BLEU-4", float(bleus[3]), bleu4(draws @ counts), images),
    ]


def _bleu_counts(bleu_scorer: Any, candidate: str, references: Sequence[str]) -> list[int]:
    """Matching n-grams (n = 1..4), n-grams (n = 1..4), length, and the closest reference length [10]."""
    lengths, most = bleu_scorer.cook_refs(references)
    cooked = bleu_scorer.cook_test(candidate, (lengths, most), eff="closest")
    return [*cooked["correct"], *cooked["guess"], cooked["testlen"], cooked["reflen"]]


def bleu4(counts: F64) -> F64:
    """BLEU-4 of summed counts [..., 10] (Papineni et al. 2002), with pycocoevalcap's guards against zero."""
    tiny, small = 1e-15, 1e-9
    correct, guess, length, reference = counts[..., :4], counts[..., 4:8], counts[..., 8], counts[..., 9]
    precision: F64 = np.prod((correct + tiny) / (guess + small), axis=-1) ** 0.25
    ratio = (length + tiny) / (reference + small)
    shortness: F64 = np.exp(np.minimum(0.0, 1 - 1 / ratio))
    score: F64 = precision * shortness
    return score
