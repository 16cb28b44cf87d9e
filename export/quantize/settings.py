"""What a recipe says about fewer bits."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from edge_rsvlm.config.model import Model

Precision = Literal["f32", "f16", "int8", "int8-dynamic", "int4"]
"""``int8``: weights and activations, whose ranges calibration found. ``int8-dynamic``: ranges measured while the graph
runs. ``int4``: weights alone."""
Ranges = Literal["minmax", "percentile", "entropy"]
WeightMethod = Literal["rtn", "gptq", "awq"]


def _several(given: Any) -> Any:
    return [given] if isinstance(given, (str, Path)) else given


class CalibrationImages(Model):
    """Images like those of the mission, cut by the runtime's own tile definition."""

    images: Annotated[tuple[Path, ...], BeforeValidator(_several), Field(min_length=1)]
    """Folders, globs, or .tar archives; one, or a list."""
    pairs: Path | None = None
    """For the change task: a folder of pairs as ``edge-rsvlm eval change`` reads it; without it, images that follow
    each other."""
    without: tuple[Path, ...] = ()
    """Files of names, one per line: images and pairs that judge, and so must not calibrate."""
    count: int = Field(default=64, gt=0)
    """So many images, of each place alike and evenly spread over its sorted names."""
    texts: tuple[str, ...] = ()
    """Questions, labels or phrases for the tasks that take a text; each image is asked the next one."""


class Int8(Model):
    """Static INT8 (Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient
    Integer-Arithmetic-Only Inference"): weights per output channel and symmetric, activations per tensor."""

    ranges: Ranges = "percentile"
    percentile: float = Field(default=99.999, gt=50, le=100)
    smooth: float = Field(default=0.5, ge=0, le=1)
    """Share of the difficulty that SmoothQuant moves from activations to weights of matrix products (Xiao et al. 2023,
    section 4); 0: none."""
    equalise: bool = True
    """Equal weight ranges across convolutions that follow each other (Nagel et al. 2019, "Data-Free Quantization
    Through Weight Equalization and Bias Correction", section 4.1)."""
    keep: tuple[str, ...] = ()
    """Layers that stay in floating point: names of weights, or the beginnings of names."""


class Int4(Model):
    """Weight-only INT4 in blocks of ``block`` numbers of a row."""

    method: WeightMethod = "gptq"
    block: Literal[16, 32, 64, 128] = 32
    keep: tuple[str, ...] = ()
    """As for Int8."""
