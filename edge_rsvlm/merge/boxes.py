"""Non-maximum suppression over a scene that arrives piece by piece.

The result is that of one class-aware greedy suppression over all boxes of the scene, best first. Boxes leave sorted by
their lower edge, so neither the order nor the size of what is fed shows in the output. Letters: N boxes, E overlaps.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from edge_rsvlm.types import Boxes, iou

PAIRS_AT_ONCE = 1 << 18


class BoxMerger:
    """Suppresses boxes that overlap a better one of their label by more than ``iou``.

    Memory holds the boxes that are not decided yet: those that reach below the frontier, and those that chains of
    overlaps tie to them.
    """

    def __init__(self, iou: float) -> None:
        self._iou = iou
        self._frontier = -math.inf
        self._open = empty_boxes()
        self._kept = empty_boxes()

    def feed(self, boxes: Boxes, frontier_row: float) -> Boxes:
        """Add boxes; return what is final. No box fed later may begin above ``frontier_row``."""
        self._open = concatenate([self._open, boxes])
        if frontier_row <= self._frontier:
            return empty_boxes()  # nothing more can be decided than when the frontier was last moved
        self._frontier = frontier_row
        return self._decide()

    def flush(self) -> Boxes:
        """Everything left."""
        self._frontier = math.inf
        return self._decide()

    def _decide(self) -> Boxes:
        ranked = take(self._open, rank(self._open))
        kept, undecided = suppress(ranked, self._iou, ranked.xyxy_N4[:, 3] > self._frontier)
        self._open = take(ranked, undecided)
        candidates = concatenate([self._kept, take(ranked, kept)])
        candidates = take(candidates, _reading_order(candidates))
        # A box still open may come to stand before a kept one, whose turn it then is not yet.
        first_open = self._open.xyxy_N4[:, 3].min() if len(self._open.scores_N) else math.inf
        ready = candidates.xyxy_N4[:, 3] < first_open
        self._kept = take(candidates, ~ready)
        return take(candidates, ready)


def empty_boxes() -> Boxes:
    return Boxes(np.zeros((0, 4)), np.zeros(0, np.float32), np.zeros(0, np.int64))


def take(boxes: Boxes, chosen: NDArray[np.generic]) -> Boxes:
    return Boxes(boxes.xyxy_N4[chosen], boxes.scores_N[chosen], boxes.labels_N[chosen])


def concatenate(parts: list[Boxes]) -> Boxes:
    return Boxes(
        np.concatenate([p.xyxy_N4 for p in parts]),
        np.concatenate([p.scores_N for p in parts]),
        np.concatenate([p.labels_N for p in parts]),
    )


def rank(boxes: Boxes) -> NDArray[np.intp]:
    """Best first, and a total order: boxes that tie in everything are the same box."""
    x0, y0, x1, y1 = boxes.xyxy_N4.T
    return np.lexsort((boxes.labels_N, x1, y1, x0, y0, -boxes.scores_N))


def _reading_order(boxes: Boxes) -> NDArray[np.intp]:
    x0, y0, x1, y1 = boxes.xyxy_N4.T
    return np.lexsort((boxes.labels_N, -boxes.scores_N, x1, y0, x0, y1))


def suppress(
    ranked: Boxes, most_iou: float, growing_N: NDArray[np.bool_]
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """(kept, undecided) of boxes that are sorted best first; the others are suppressed.

    ``growing_N`` marks boxes that one not seen yet may suppress. They stay undecided, and so does what only they could
    suppress, unless a kept box suppresses it anyway. Each round decides every box whose better overlaps are decided.
    """
    better_E, worse_E = _overlaps(ranked, most_iou)
    undecided = np.ones(len(growing_N), bool)
    kept = np.zeros(len(growing_N), bool)
    while True:
        alive = undecided[better_E] & undecided[worse_E]
        better_E, worse_E = better_E[alive], worse_E[alive]
        free = undecided & ~growing_N
        free[worse_E] = False
        if not free.any():
            return kept, undecided
        kept |= free
        undecided &= ~free
        undecided[worse_E[free[better_E]]] = False


def _overlaps(ranked: Boxes, most_iou: float) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Pairs (better, worse) of one label whose intersection over union exceeds ``most_iou``."""
    found = [(np.zeros(0, np.intp), np.zeros(0, np.intp))]
    for a, b in _neighbours(ranked, most_iou):
        over = iou(ranked.xyxy_N4[a], ranked.xyxy_N4[b]) > most_iou
        found.append((np.minimum(a, b)[over], np.maximum(a, b)[over]))
    return np.concatenate([f[0] for f in found]), np.concatenate([f[1] for f in found])


def _neighbours(boxes: Boxes, most_iou: float) -> Iterator[tuple[NDArray[np.intp], NDArray[np.intp]]]:
    """Every pair, once, that may exceed ``most_iou``.

    Sides of such a pair differ by less than 1 / most_iou, and their centres by less than the longer side. So boxes are
    sorted into levels by their longer side, and each level is joined with those near it in cells of the coarser one.
    """
    longest_N = (boxes.xyxy_N4[:, 2:] - boxes.xyxy_N4[:, :2]).max(axis=1, initial=0.0)
    with np.errstate(divide="ignore"):
        levels_N = np.floor(np.log2(longest_N))
    levels = [float(level) for level in np.unique(levels_N) if np.isfinite(level)]
    reach = math.ceil(math.log2(1 / most_iou))
    for i, coarse in enumerate(levels):
        for fine in levels[: i + 1]:
            if coarse - fine <= reach:
                a, b = np.flatnonzero(levels_N == coarse), np.flatnonzero(levels_N == fine)
                yield from _joined(boxes, a, b, 2.0 ** (coarse + 1))


def _joined(
    boxes: Boxes, a: NDArray[np.intp], b: NDArray[np.intp], cell: float
) -> Iterator[tuple[NDArray[np.intp], NDArray[np.intp]]]:
    """Pairs of one label whose centres lie in the same or in adjacent cells."""
    both = np.concatenate([a, b])
    xy = np.floor((boxes.xyxy_N4[both, :2] + boxes.xyxy_N4[both, 2:]) / 2 / cell).astype(np.int64)
    xy -= xy.min(axis=0) - 1
    columns, rows = xy.max(axis=0) + 2
    key = (boxes.labels_N[both] * rows + xy[:, 1]) * columns + xy[:, 0]
    key_a, key_b = key[: len(a)], key[len(a) :]
    order = np.argsort(key_b, kind="stable")
    b, key_b = b[order], key_b[order]
    for row in (-1, 0, 1):
        low = np.searchsorted(key_b, key_a + row * columns - 1)
        high = np.searchsorted(key_b, key_a + row * columns + 1, side="right")
        for left, right in _expanded(low, high):
            found_a, found_b = a[left], b[right]
            once = found_a != found_b if len(a) != len(b) or a[0] != b[0] else found_a < found_b
            yield found_a[once], found_b[once]


def _expanded(low: NDArray[np.intp], high: NDArray[np.intp]) -> Iterator[tuple[NDArray[np.intp], NDArray[np.intp]]]:
    """(i, j) for every j in low[i] .. high[i], about PAIRS_AT_ONCE at a time."""
    counts = high - low
    ends = np.cumsum(counts)
    start = 0
    while start < len(counts):
        before = ends[start] - counts[start]
        stop = max(int(np.searchsorted(ends, before + PAIRS_AT_ONCE, side="right")), start + 1)
        part = counts[start:stop]
        i = np.repeat(np.arange(start, stop), part)
        j = np.arange(len(i)) - np.repeat(ends[start:stop] - part - before, part) + np.repeat(low[start:stop], part)
        yield i, j
        start = stop
