"""What goes into a task: pixels of a raster, and words."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from edge_rsvlm.config.model import Model
from edge_rsvlm.config.prepare import Filter, Step

BandRole = Literal["red", "green", "blue", "nir", "none", "validity"]
"""``none`` is a channel that stays empty: the model has it, and the task never learnt it."""
SourceDtype = Literal["uint8", "uint16", "float32"]
PerChannel = float | tuple[float, ...]


class InputSpec(Model):
    """How raster pixels become the pixels of one task.

    A value x of a source dtype with range (lo, hi) becomes ((x - lo) / (hi - lo) - mean) / std. Ranges are fixed:
    statistics of a tile would make seams. Bands that the raster lacks, and invalid pixels, are 0.

    Without ``prepare`` tiles of ``tile_px`` are cut straight from the raster. With it, the cut tile or the whole image
    is first brought to 8 bits (by its range), goes through the steps, and is then normalised.
    """

    bands: tuple[BandRole, ...] = Field(min_length=1)
    ranges: dict[SourceDtype, tuple[float, float]]
    mean: PerChannel
    std: PerChannel
    tile_px: int = Field(gt=0)
    overlap_px: int = Field(ge=0)
    resolution_m: tuple[float, float] | None
    """Ground resolution the task was trained for, finest first; rasters outside are resampled to the nearer end.
    None: not known, and tiles are native pixels."""
    whole_px: int = Field(ge=0)
    """An image of unknown ground resolution (its own or the task's) is looked at whole up to this long side."""
    resampling: Filter
    prepare: tuple[Step, ...] = ()


class TaskMemory(Model):
    """Anonymous bytes of one task (one thread, onnxruntime CPU)."""

    session_bytes: int = Field(gt=0)
    """Growth from importing the engine and opening every session of the task."""
    tile_bytes: int = Field(gt=0)
    """Growth of the peak per tile of a batch while they run."""
    measured: bool = True
    """In a fresh process; else estimated from the bytes of the weights."""


class Tokenizer(Model):
    """``tokenizer.json`` and how it is used."""

    file: str
    add_special_tokens: bool
    max_length: int | None = Field(default=None, gt=0)
    """Longer texts are cut, special tokens kept."""
    pad_to: int | None = Field(default=None, gt=0)
    """Fixed length of a model that wants one."""
    pad_id: int = 0


class TextEncoder(Model):
    """Texts -> vectors [N, D] by a graph that takes ``input_ids`` and, where listed, ``attention_mask`` and
    ``token_type_ids``."""

    graph: str
    tokenizer: Tokenizer
    output: str = "embedding"
    """The role that gives the vectors: one text encoder may serve several spaces."""
    vocabulary: str | None = None
    """A text file of the words that were learnt, one per line in lower case: a text with another word is refused.
    None: any text."""
