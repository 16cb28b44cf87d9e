"""Which images are held out, and which must leave the training part because a held-out one shows the same place.

UC Merced's images were cut from larger ones, so a freeway or a harbour goes on from one file to the next.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

SAME_PLACE_COSINE = 0.84
"""Of the 1280-channel ImageNet features. Chosen by looking: overlapping pairs begin to appear above it."""


def near_duplicates(features_ND: npt.NDArray[np.float32], held_out_N: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Mask [N] of the images that are not held out but too much like one that is."""
    unit = features_ND / np.linalg.norm(features_ND, axis=1, keepdims=True)
    likeness = (unit @ unit[held_out_N].T).max(axis=1)
    found: npt.NDArray[np.bool_] = ~held_out_N & (likeness >= SAME_PLACE_COSINE)
    return found


def by_hash(names: Sequence[str], share: float) -> npt.NDArray[np.bool_]:
    """Mask [N] of the ``share`` of names with the smallest hashes, for sets without visible near-duplicates."""
    rank = np.argsort([hashlib.sha256(name.encode()).hexdigest() for name in names])
    mask = np.zeros(len(names), bool)
    mask[rank[: round(share * len(names))]] = True
    return mask
