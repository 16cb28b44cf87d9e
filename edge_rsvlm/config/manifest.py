"""``manifest.json`` of a bundle: everything the runtime knows about a model is here, and nowhere in the code.

Graphs are listed once with the names of their inputs and outputs; tasks refer to them and speak of *roles* (``tiles``,
``input_ids``, ``logits``), so that a graph which others exported is taken as it is.
"""

from __future__ import annotations

from collections import Counter
from typing import Literal

from pydantic import Field, model_validator

from edge_rsvlm.config.model import Model
from edge_rsvlm.config.task_specs import Tasks

SCHEMA_VERSION = 4
MANIFEST_NAME = "manifest.json"


class FileEntry(Model):
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    bytes: int = Field(ge=0)


class ShapeRange(Model):
    """Sizes of one input of a graph that an engine is built for; fixed dimensions are the same in all three."""

    least: tuple[int, ...]
    usual: tuple[int, ...]
    most: tuple[int, ...]


class TensorRtGraph(Model):
    """The same computation for TensorRT: strongly typed, quantized symmetrically. Engines are built on the device."""

    file: str
    shapes: dict[str, ShapeRange]
    """By input of the graph, caches included."""


class Graph(Model):
    """One ONNX file for ONNX Runtime. ``inputs`` and ``outputs`` map roles to names in the graph; an input not listed
    is not fed.

    Key-value caches have names of their own, see KeyValueCache.
    """

    file: str
    precision: str
    """Of its weights: f32, f16, int8 (activations too, by fixed ranges), int8-dynamic, int4."""
    inputs: dict[str, str]
    outputs: dict[str, str]
    tensorrt: TensorRtGraph | None = None


class Adapter(Model):
    """A LoRA (Hu et al. 2021) that was not merged, and is chosen when the bundle is used.

    ``file`` is an ``.npz`` of float arrays ``GRAPH/INPUT``: A [in, rank] and B [rank, out] for every layer that then
    gives y + (x A) B. A graph gives what the base model gives where these inputs are not fed.
    """

    file: str
    parameters: int = Field(gt=0)
    """Numbers in the file, 4 bytes each in memory."""


class Calibration(Model):
    """The images whose activations set the ranges of a quantized bundle."""

    images: tuple[str, ...]
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    """Over the images' names and files, in this order."""
    distance: float | None = None
    """To the images that the bundle was judged on, in standard deviations of simple statistics of their pixels."""
    warnings: tuple[str, ...] = ()


class Accuracy(Model):
    """One measured score, with its bootstrap 95 % interval and the command that measured it."""

    task: str
    metric: str
    value: float
    interval: tuple[float, float]
    samples: int
    data: str
    command: str


class Comparison(Model):
    """A task before and after a step that changes what the model computes, on the same samples.

    ``loss`` is the mean of what each sample lost, ``bound`` the upper end of its bootstrap 95 % interval.
    """

    step: str
    task: str
    metric: str
    before: float
    after: float
    loss: float
    bound: float
    samples: int
    data: str


class ProbeCase(Model):
    """Golden inputs and outputs in an ``.npz``: arrays ``in.NAME`` and ``out.NAME``, of a graph by its own names.

    Of a task, it is what llama.cpp does in it: ``in.answer`` [A] are tokens of an answer, and ``out.logits`` [A, V]
    those by which each would be chosen after what stands before it. That is an image's ``in.image`` [H, W, 3] and
    ``in.text`` where llama.cpp sees for itself, else a prompt: ``in.ids`` and ``in.visual`` [S], ``in.features``
    [1, T, D], ``in.positions``.
    """

    graph: str | None = None
    task: Literal["caption", "ask", "ground"] | None = None
    """Instead of a graph."""
    file: str
    adapter: str | None = None
    """Whose factors are fed beside them."""
    tolerance: float = Field(gt=0)
    """Greatest absolute difference, as a share of the greatest absolute value of that output."""

    @model_validator(mode="after")
    def _one_of_two(self) -> ProbeCase:
        if (self.graph is None) == (self.task is None):
            raise ValueError("a golden probe is of a graph or of a task")
        return self


class StepRecord(Model):
    """One step of the export: what it did, with which tools, what the gate measured and what was let through."""

    step: str
    hash: str = Field(pattern="^[0-9a-f]{64}$")
    tools: dict[str, str]
    metrics: dict[str, float | int | str]
    allowed: tuple[str, ...] = ()


class Manifest(Model):
    schema_version: Literal[4]
    name: str
    version: int = Field(ge=1)
    """Monotonic: a higher number is newer."""
    description: str
    licence: str
    training_data: tuple[str, ...]
    graphs: dict[str, Graph]
    tasks: Tasks
    adapters: dict[str, Adapter] = Field(default_factory=dict)
    """By the name that the user gives; one at a time."""
    calibration: Calibration | None = None
    comparisons: tuple[Comparison, ...] = ()
    accuracy: tuple[Accuracy, ...] = ()
    probe: tuple[ProbeCase, ...]
    steps: tuple[StepRecord, ...] = ()
    files: dict[str, FileEntry]
    """Every file of the bundle but the manifest and its signature, by relative path."""

    @property
    def precision(self) -> str:
        """Precisions of its graphs, the most frequent first."""
        return ", ".join(name for name, _ in Counter(graph.precision for graph in self.graphs.values()).most_common())
