"""Does a graph compile? TensorRT for RTX tells without a GPU, for desktop GPUs; a Jetson's engine is built there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from edge_rsvlm.config.manifest import ShapeRange
from edge_rsvlm.engines.tensorrt_build import BuildSettings, build
from edge_rsvlm.engines.tensorrt_library import WITHOUT_GPU, Complaints, TensorRt, load_tensorrt

NEAREST = "8.6"
"""Ampere, as a Jetson Orin (8.7), for which nothing compiles without the board."""
WORKSPACE_BYTES = 4 << 30


def compiler() -> TensorRt:
    """TensorRT for RTX; UsageError where it is not installed."""
    return load_tensorrt(WITHOUT_GPU)


def compiled_bytes(graph: Path, shapes: Mapping[str, ShapeRange], compute_capability: str = NEAREST) -> int:
    """Bytes of the engine. BundleError says what is not taken; UsageError where TensorRT for RTX is not installed."""
    library = compiler()
    settings = BuildSettings(WORKSPACE_BYTES, compute_capability=compute_capability)
    return len(build(library, Complaints(library), graph, shapes, settings).plan)
