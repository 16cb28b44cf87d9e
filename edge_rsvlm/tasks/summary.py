"""One sentence for a scene out of the captions of its tiles."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

DISTINCT = 0.5  # word overlap (Jaccard) under which two captions say different things
WORTH_SAYING = 0.15  # share of the scene that earns a second clause in its summary


def summarise(captions: Sequence[str], weights: Sequence[float]) -> str:
    """One sentence for a scene from its tile captions, weighted by valid area.

    The caption that agrees best with all others (weighted word overlap) leads; a second one follows when captions
    unlike the first cover at least 15 % of the scene. Captions without a word say nothing of it.
    """
    share: Counter[str] = Counter()
    for caption, weight in zip(captions, weights, strict=True):
        if caption.split():
            share[caption] += weight / sum(weights)  # type: ignore[assignment]
    if not share:
        return ""
    first = _most_agreed(share, share)
    rest = Counter({c: s for c, s in share.items() if _overlap(c, first) < DISTINCT})
    if sum(rest.values()) < WORTH_SAYING:
        return first
    second = _most_agreed(rest, rest)
    return f"{first.rstrip(' .')}; elsewhere, {second}"


def _most_agreed(candidates: Counter[str], voters: Counter[str]) -> str:
    def agreement(caption: str) -> float:
        return sum(weight * _overlap(caption, other) for other, weight in voters.items())

    return min(candidates, key=lambda caption: (-round(agreement(caption), 9), caption))


def _overlap(a: str, b: str) -> float:
    words_a, words_b = set(a.split()), set(b.split())
    return len(words_a & words_b) / max(len(words_a | words_b), 1)
