"""Boxes that a decoder wrote, moved onto objects that a box head sees.

A decoder says which object is meant and about where; the box head says exactly where objects are. Letters: W written
boxes, S seen ones.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

F64 = NDArray[np.float64]
REACH = 1.0
"""Of a written box's longer side, from its centre: an object whose centre lies beyond is another one."""


def snapped(written_W4: F64, seen_S4: F64, scores_S: NDArray[np.float32]) -> F64:
    """Written boxes x0, y0, x1, y1, each replaced by the seen one that it means best; unchanged where none is near.

    What means a box best has the nearest centre, in units of the written box, and the higher score among equals. No
    seen box is taken twice.
    """
    result: F64 = written_W4.copy()
    free = np.ones(len(seen_S4), np.bool_)
    for w, box in enumerate(written_W4):
        distance_S = np.abs(_centres(seen_S4) - _centres(box[None])).max(axis=1) / max(box[2] - box[0], box[3] - box[1])
        near = np.flatnonzero(free & (distance_S <= REACH))
        if len(near):
            best = near[np.lexsort((-scores_S[near], distance_S[near].round(1)))[0]]
            result[w], free[best] = seen_S4[best], False
    return result


def _centres(boxes_N4: F64) -> F64:
    centre_xy: F64 = (boxes_N4[:, :2] + boxes_N4[:, 2:]) / 2
    return centre_xy
