"""Where an exported graph leaves its model: the output of every layer, compared in the order in which they run."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from edge_rsvlm.export.checkpoint.streaming import captured_outputs
from edge_rsvlm.export.families.base import GraphPlan
from edge_rsvlm.export.graphs.sliced import SLICE_BYTES, run_sliced

ROUNDING = 1e-7
"""Errors below are those of float32; growth counts from here."""


@dataclass(frozen=True)
class LayerRow:
    """``error`` is |graph - model| / |model| over the layer's output, ``growth`` its ratio to the row before."""

    module: str
    error: float
    growth: float


def compare_layers(
    path: Path,
    layers: Mapping[str, str],
    model: nn.Module,
    plan: GraphPlan,
    inputs: Mapping[str, NDArray[Any]],
    slice_bytes: int = SLICE_BYTES,
) -> list[LayerRow]:
    """One row per layer, in execution order: the first bad layer is the first row that jumps.

    ``layers`` are ``Traced.layers`` of the graph in ``path``, ``model`` is what it should equal (a streamed one needs
    no memory), ``inputs`` are by graph input. Outputs of the model wait on disk, so memory is that of a slice.
    """
    module = plan.wrap(model).eval()
    errors: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        with captured_outputs(model, layers, Path(folder)) as files:
            module(*(torch.from_numpy(inputs[spec.name]) for spec in plan.inputs))
        modules: dict[str, list[str]] = {}
        for name in files:
            modules.setdefault(layers[name], []).append(name)
        for value, array in run_sliced(path, inputs, modules, slice_bytes):
            for name in modules[value]:
                errors[name] = _relative_error(array, np.load(files[name]))
    return _rows({name: errors[name] for name in layers if name in errors})


def first_above(rows: list[LayerRow], tolerance: float) -> LayerRow | None:
    """The layer where the error begins: the first whose output is off by more than ``tolerance``."""
    return next((row for row in rows if not row.error <= tolerance), None)


def _relative_error(array: NDArray[Any], reference: NDArray[Any]) -> float:
    """inf where sizes differ or a value is not finite. Axes may be grouped otherwise in the graph."""
    found, wanted = array.ravel().astype(np.float64), reference.ravel().astype(np.float64)
    if found.size != wanted.size:
        return float("inf")
    error = float(np.linalg.norm(found - wanted)) / max(float(np.linalg.norm(wanted)), np.finfo(np.float64).tiny)
    return error if np.isfinite(error) else float("inf")


def _rows(errors: Mapping[str, float]) -> list[LayerRow]:
    rows, before = [], ROUNDING
    for module, error in errors.items():
        rows.append(LayerRow(module, error, error / before))
        before = max(error, ROUNDING)
    return rows
