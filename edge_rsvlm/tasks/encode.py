"""The visual encoder: one pass per tile feeds every head of the same input spec."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edge_rsvlm.types import InferenceSession

Features = dict[str, NDArray[np.float32]]


def encode(encoder: InferenceSession, tiles_NCHW: NDArray[np.float32], outputs: Sequence[str]) -> Features:
    """Feature maps by name (c1 ... c5, at strides 2 ... 32) of normalised tiles."""
    return dict(zip(outputs, encoder.run({"tiles": tiles_NCHW}, outputs), strict=True))
