"""``manifest.json`` of a bundle: everything the runtime knows about a model is here, and nowhere in the code."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from edge_rsvlm.config.model import Model

SCHEMA_VERSION = 1
MANIFEST_NAME = "manifest.json"

BandRole = Literal["red", "green", "blue", "nir", "none", "validity"]
"""``none`` is a channel that stays empty: the model has it, and the task never learnt it."""
SourceDtype = Literal["uint8", "uint16", "float32"]


class FileEntry(Model):
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    bytes: int = Field(ge=0)


class InputSpec(Model):
    """How raster pixels become tiles of one task.

    A value x of a source dtype with range (lo, hi) becomes ((x - lo) / (hi - lo) - mean) / std. Ranges are fixed:
    statistics of a tile would make seams. Bands that the raster lacks, and invalid pixels, are 0.
    """

    bands: tuple[BandRole, ...] = Field(min_length=1)
    ranges: dict[SourceDtype, tuple[float, float]]
    mean: float
    std: float = Field(gt=0)
    tile_px: int = Field(gt=0, multiple_of=32)
    overlap_px: int = Field(ge=0)
    resolution_m: tuple[float, float]
    """Ground resolution the task was trained for, finest first; rasters outside are resampled to the nearer end."""
    resampling: Literal["bilinear"]


class TaskMemory(Model):
    """Anonymous bytes, measured in a fresh process per task (one thread, onnxruntime CPU)."""

    session_bytes: int = Field(gt=0)
    """Growth from importing the engine and opening every session of the task."""
    tile_bytes: int = Field(gt=0)
    """Growth of the peak per tile of a batch while they run."""


class DetectTask(Model):
    """Boxes from a heat map of object centres and distances to the four sides."""

    input: InputSpec
    head: str
    encoder_outputs: tuple[str, ...]
    classes: tuple[str, ...] = Field(min_length=1)
    stride: int = Field(gt=0)
    score_threshold: float = Field(gt=0, lt=1)
    nms_iou: float = Field(gt=0, lt=1)
    max_boxes_per_tile: int = Field(gt=0)
    memory: TaskMemory


class ChangeTask(Model):
    """Probability of change from features of two dates."""

    input: InputSpec
    head: str
    encoder_outputs: tuple[str, ...]
    stride: int = Field(gt=0)
    threshold: float = Field(gt=0, lt=1)
    min_area_m2: float = Field(ge=0)
    min_area_px: int = Field(ge=1)
    memory: TaskMemory


class CaptionTask(Model):
    """A Llama-architecture decoder on projected visual tokens."""

    input: InputSpec
    prefix: str
    embed: str
    decoder: str
    encoder_outputs: tuple[str, ...]
    tokenizer: str
    bos_id: int
    eos_id: int
    layers: int = Field(gt=0)
    heads: int = Field(gt=0)
    head_dim: int = Field(gt=0)
    max_tokens: int = Field(gt=0)
    beams: int = Field(gt=0)
    length_penalty: float
    """Beams are ranked by log-probability / length ** length_penalty (after Wu et al. 2016, section 7)."""
    memory: TaskMemory


class Tasks(Model):
    detect: DetectTask | None = None
    change: ChangeTask | None = None
    caption: CaptionTask | None = None


class Accuracy(Model):
    """One measured score, with its bootstrap 95 % interval and the command that measured it."""

    task: str
    metric: str
    value: float
    interval: tuple[float, float]
    samples: int
    data: str
    command: str


class Probe(Model):
    """Golden inputs and outputs. ``tolerance`` is the greatest absolute difference of a probability."""

    file: str
    tolerance: float = Field(gt=0)


class Manifest(Model):
    schema_version: Literal[1]
    name: str
    version: int = Field(ge=1)
    """Monotonic: a higher number is newer."""
    description: str
    licence: str
    training_data: tuple[str, ...]
    engine: Literal["onnxruntime"]
    precision: str
    encoder: str
    tasks: Tasks
    accuracy: tuple[Accuracy, ...]
    probe: Probe
    files: dict[str, FileEntry]
    """Every file of the bundle but the manifest itself, by relative path."""
