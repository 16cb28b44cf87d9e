"""From logits to scores, without overflow."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray


def sigmoid(logits: NDArray[np.floating[Any]]) -> NDArray[np.float32]:
    """1 / (1 + exp(-x)), by the exponential that cannot overflow."""
    small = np.exp(-np.abs(logits))
    return np.asarray(np.where(logits >= 0, 1 / (1 + small), small / (1 + small)), np.float32)


def softmax(logits: NDArray[np.floating[Any]]) -> NDArray[np.float32]:
    """Along the last axis."""
    raised = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.asarray(raised / raised.sum(axis=-1, keepdims=True), np.float32)


def scores(logits: NDArray[np.floating[Any]], kind: Literal["sigmoid", "softmax"]) -> NDArray[np.float32]:
    """``softmax``: one of many; ``sigmoid``: each by itself."""
    return sigmoid(logits) if kind == "sigmoid" else softmax(logits)
