"""Sentences against those of people: CIDEr and BLEU-4, which are those of pycocoevalcap."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from edge_rsvlm.scoring.libraries import caption_libraries
from edge_rsvlm.scoring.sampling import F64, RESAMPLES, Score, resamples, scored


def words(text: str) -> str:
    """The tokens of a sentence, joined by spaces: lower case, every run of letters and digits, no punctuation."""
    return " ".join(re.findall(r"\w+", text.lower()))


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
        scored("CIDEr", float(consensus), sampled_R, images),
        scored("BLEU-4", float(bleus[3]), bleu4(draws @ counts), images),
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
