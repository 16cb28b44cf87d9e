"""Which of the objects that were found a phrase means.

The detector says where objects are and what they are; what a phrase adds is a choice among them, by kind, side, size,
order and relation. A small network reads the phrase beside a description of every object, and scores each.
Letters: N objects, K kinds, F features, T tokens.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_rsvlm.tasks.scores import sigmoid
from edge_rsvlm.tasks.text import Texts
from edge_rsvlm.types import Boxes, InferenceSession, iou

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
RANKS = 4
"""First, second, third, and any later."""
ORDERS = 6
"""Ranks among objects of the same kind: from the left, right, top and bottom, by largest and smallest area."""
PLACE = 8


class Referrer:
    """A phrase and the objects of an image -> how surely it means each. ``kinds`` is K."""

    def __init__(self, graph: InferenceSession, texts: Texts, kinds: int) -> None:
        self._graph, self._texts, self._kinds = graph, texts, kinds

    def __call__(self, phrase: str, objects: Boxes, size: tuple[float, float]) -> F32:
        """Scores [N] of the objects of an image of ``size`` (width, height); their labels are numbers of kinds."""
        count = len(objects.scores_N)
        if not count:
            return np.zeros(0, np.float32)
        seen: dict[str, NDArray[Any]] = {
            "objects": describe(objects, size, self._kinds)[None],
            "objects_mask": np.ones((1, count), np.int64),
        }
        (logits_1N,) = self._graph.run({**self._texts.encode([phrase]), **seen}, ["logits"])
        return sigmoid(logits_1N[0])


def feature_count(kinds: int) -> int:
    """F for so many kinds."""
    return PLACE + kinds + ORDERS * RANKS + 1


def describe(objects: Boxes, size: tuple[float, float], kinds: int) -> F32:
    """Features [N, F] of the objects of an image of ``size`` (width, height); their labels are numbers of kinds.

    Place and size as shares of the image, the kind weighted by its score, ranks among objects of the same kind (one of
    RANKS each), and how many of the kind there are.
    """
    shares_N4 = objects.xyxy_N4 / np.tile(np.asarray(size, np.float64), 2)
    centre_xy, extent_wh = (shares_N4[:, :2] + shares_N4[:, 2:]) / 2, shares_N4[:, 2:] - shares_N4[:, :2]
    place = np.hstack([shares_N4, centre_xy, np.log(np.maximum(extent_wh, 1e-4)) / 4])
    of_kind = np.eye(kinds)[objects.labels_N] * objects.scores_N[:, None]
    same_NN = objects.labels_N[:, None] == objects.labels_N[None]
    area = np.prod(extent_wh, axis=1)
    orders = (centre_xy[:, 0], -centre_xy[:, 0], centre_xy[:, 1], -centre_xy[:, 1], -area, area)
    ranked = [np.eye(RANKS)[np.minimum(_rank(values, same_NN), RANKS - 1)] for values in orders]
    count = np.log(same_NN.sum(axis=1, keepdims=True)) / 3
    return np.hstack([place, of_kind, *ranked, count]).astype(np.float32)


def _rank(values_N: F64, same_NN: NDArray[np.bool_]) -> NDArray[np.int64]:
    """How many of the same kind come before each."""
    before: NDArray[np.int64] = (same_NN & (values_N[None] < values_N[:, None])).sum(axis=1)
    return before


def one_of_each(objects: Boxes, most: int, most_iou: float = 0.5) -> Boxes:
    """Objects with one kind each, the likeliest, and of these the ``most`` with the best scores.

    A detector that is asked for several kinds may call one object by two names.
    """
    order = np.argsort(-objects.scores_N, kind="stable")
    kept: list[int] = []
    for n in order:
        if (iou(objects.xyxy_N4[kept], objects.xyxy_N4[n]) <= most_iou).all():
            kept.append(int(n))
        if len(kept) == most:
            break
    return Boxes(objects.xyxy_N4[kept], objects.scores_N[kept], objects.labels_N[kept])
