"""Whether the weights in a bundle are those of the checkpoint, whatever a probe sees of them.

Outputs do not tell everything: no embedding of unit length changes with the scale of its projection, and no attention
with the bias of its keys.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edge_rsvlm.export.graphs.tensor_files import initialisers

BLOCK_ELEMENTS = 4 << 20
SMALLEST_RMS = 1e-5
"""Weights smaller than this count as if they were of this size: half precision rounds them away, and may."""


def compare_weights(path: Path, transposed: Mapping[str, bool], expected: Callable[[str], Tensor]) -> dict[str, float]:
    """|stored - expected| / |expected| of every weight of the graph in ``path``, by its name in the state dict.

    ``transposed`` tells of each weight whether the graph stores it with its axes swapped.
    """
    stored = initialisers(path)
    errors = {}
    for name, swapped in transposed.items():
        tensor = expected(name)
        found = stored.pop(name, None)  # what was mapped is let go with it
        errors[name] = float("inf") if found is None else _error(found, tensor.t() if swapped else tensor)
    return errors


def _error(stored: NDArray[Any], expected: Tensor) -> float:
    if stored.shape != tuple(expected.shape):
        return float("inf")
    if not expected.is_floating_point():
        return 0.0 if np.array_equal(stored, expected.numpy()) else float("inf")
    rows = expected if expected.dim() else expected[None]
    step = max(1, BLOCK_ELEMENTS * len(rows) // max(1, rows.numel()))
    difference = size = 0.0
    for start in range(0, len(rows), step):
        block = rows[start : start + step].float()
        found = torch.from_numpy(np.array(stored.reshape(rows.shape)[start : start + step], np.float32))
        difference += float((found - block).square().sum())
        size += float(block.square().sum())
    error = (difference / max(size, SMALLEST_RMS**2 * rows.numel())) ** 0.5 if rows.numel() else 0.0
    return error if np.isfinite(error) else float("inf")
