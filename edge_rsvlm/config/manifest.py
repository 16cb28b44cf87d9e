"""``manifest.json`` of a bundle: everything the runtime knows about a model is here, and nowhere in the code.

Graphs are listed once with the names of their inputs and outputs; tasks refer to them and speak of *roles* (``tiles``,
``input_ids``, ``logits``), so that a graph which others exported is taken as it is.
"""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Literal

from pydantic import Field, model_validator

from edge_rsvlm.config.model import Model
from edge_rsvlm.config.prepare import Filter, Step

SCHEMA_VERSION = 3
MANIFEST_NAME = "manifest.json"

BandRole = Literal["red", "green", "blue", "nir", "none", "validity"]
"""``none`` is a channel that stays empty: the model has it, and the task never learnt it."""
SourceDtype = Literal["uint8", "uint16", "float32"]
PerChannel = float | tuple[float, ...]


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
    """Texts -> ``embedding`` [N, D] by a graph that takes ``input_ids`` and, where listed, ``attention_mask`` and
    ``token_type_ids``."""

    graph: str
    tokenizer: Tokenizer


class DetectTask(Model):
    """Boxes from a heat map of object centres and distances to the four sides."""

    kind: Literal["heat_map"]
    input: InputSpec
    encoder: str
    head: str
    encoder_outputs: tuple[str, ...]
    classes: tuple[str, ...] = Field(min_length=1)
    stride: int = Field(gt=0)
    score_threshold: float = Field(gt=0, lt=1)
    nms_iou: float = Field(gt=0, lt=1)
    max_boxes_per_tile: int = Field(gt=0)
    memory: TaskMemory


class OpenDetectTask(Model):
    """Boxes for any words (Minderer et al. 2022, "Simple Open-Vocabulary Object Detection").

    The encoder gives ``class_embeds`` [N, P, D], ``boxes`` [N, P, 4] (centre x, y, width, height as shares of the
    prepared image), ``logit_shift`` and ``logit_scale`` [N, P]; the score of a query is
    sigmoid((cosine + shift) * scale).
    """

    kind: Literal["open_vocabulary"]
    input: InputSpec
    encoder: str
    text: TextEncoder
    query_prompt: str
    """``{label}`` stands for the word asked for."""
    score_threshold: float = Field(gt=0, lt=1)
    nms_iou: float = Field(gt=0, lt=1)
    max_boxes_per_tile: int = Field(gt=0)
    memory: TaskMemory


class ChangeTask(Model):
    """Probability of change from features of two dates."""

    input: InputSpec
    encoder: str
    head: str
    encoder_outputs: tuple[str, ...]
    stride: int = Field(gt=0)
    threshold: float = Field(gt=0, lt=1)
    mirrored: bool
    """Probabilities are the mean of the pair's and of its mirror image's: twice the work."""
    min_area_m2: float = Field(ge=0)
    min_area_px: int = Field(ge=1)
    memory: TaskMemory


class KeyValueCache(Model):
    """Tensors [N, heads, past, head_dim] named by patterns with ``{layer}`` and ``{part}`` (key, value)."""

    layers: int = Field(gt=0)
    heads: int = Field(gt=0)
    head_dim: int = Field(gt=0)
    past: str = "past_key_values.{layer}.{part}"
    present: str = "present.{layer}.{part}"


class VisualTokens(Model):
    """How an image is written into a prompt: ``token`` repeated once per visual token, inside these patterns.

    ``single`` is the image as one tile; a split image is ``tile`` for each tile (with ``{row}`` and ``{col}`` from 1),
    ``row_end`` after each row, and then ``overview``. ``{tokens}`` is where the repeated token goes.
    """

    token: str | None
    """None: the features come before the text, which does not mention them."""
    per_tile: int | None = Field(default=None, gt=0)
    unit_px: int | None = Field(default=None, gt=0)
    """Without ``per_tile``: a tile of H x W pixels has (H / unit_px) * (W / unit_px) visual tokens."""
    single: str = "{tokens}"
    tile: str | None = None
    row_end: str = ""
    overview: str | None = None


class OnnxDecoder(Model):
    """``embed`` maps ``input_ids`` to ``inputs_embeds``; ``graph`` takes those, and ``attention_mask`` and
    ``position_ids`` where it lists them, and gives ``logits`` [N, any, V] whose last row is the next token."""

    kind: Literal["onnx"]
    embed: str
    graph: str
    cache: KeyValueCache


class GgufFile(Model):
    """A file that llama.cpp reads."""

    file: str
    quantization: str
    """As llama.cpp calls it: F16, Q8_0, Q4_K_M ..."""


class GgufDecoder(Model):
    """A language model of llama.cpp, which takes visual tokens as embeddings among the words."""

    kind: Literal["gguf"]
    model: GgufFile
    context_tokens: int = Field(gt=0)


class BoxFormat(Model):
    """Boxes in an answer: four numbers x0, y0, x1, y1 somewhere between ``open`` and ``close``.

    They are shares of the image times ``scale``, or pixels of the prepared image where ``scale`` is None.
    """

    open: str = Field(min_length=1)
    close: str = Field(min_length=1)
    scale: float | None = Field(default=None, gt=0)


class GenerateTask(Model):
    """Text from an image and a prompt, token by token.

    ``encoder`` gives ``encoder_outputs`` of the pixels, which ``project`` (or the encoder itself, where it is None and
    the one output is ``features``) turns into visual tokens [N, T, D] for ``decoder``.
    """

    kind: Literal["generate"]
    input: InputSpec
    encoder: str
    encoder_outputs: tuple[str, ...]
    project: str | None
    decoder: Annotated[OnnxDecoder | GgufDecoder, Field(discriminator="kind")]
    tokenizer: Tokenizer
    visual: VisualTokens
    prompt: str
    """``{image}`` is the image written by ``visual``, ``{text}`` the question or phrase."""
    positions: Literal["sequence", "mrope"]
    """mrope: three rows of positions, an image's tokens by row and column (Wang et al. 2024, "Qwen2-VL")."""
    eos_ids: tuple[int, ...] = Field(min_length=1)
    repetition_penalty: float = Field(default=1.0, gt=0)
    """Logits of tokens that the prompt or the answer holds are divided by it where positive, else multiplied
    (Keskar et al. 2019, "CTRL", section 4.1)."""
    max_tokens: int = Field(gt=0)
    beams: int = Field(gt=0)
    length_penalty: float
    """Beams are ranked by log-probability / length ** length_penalty (after Wu et al. 2016, section 7)."""
    boxes: BoxFormat | None = None
    memory: TaskMemory


class GgufTask(Model):
    """Text from an image and a prompt by llama.cpp alone, which sees through ``projector`` (an mmproj file) and
    prepares images itself: ``input`` gives them whole, in 8 bits."""

    kind: Literal["gguf"]
    input: InputSpec
    model: GgufFile
    projector: GgufFile
    context_tokens: int = Field(gt=0)
    prompt: str
    """``{image}`` is the image, ``{text}`` the question or phrase."""
    repetition_penalty: float = Field(default=1.0, gt=0)
    """As of GenerateTask, for the words of the prompt: what llama.cpp reads of an image has no numbers of words."""
    max_tokens: int = Field(gt=0)
    boxes: BoxFormat | None = None
    memory: TaskMemory


class AnswerTask(Model):
    """A question answered by one class of many (Kim et al. 2021, "ViLT"): ``graph`` takes ``tiles`` (or ``features``
    [N, R, D] of regions, where ``input`` is None) and the question's ``input_ids``, and gives ``logits`` [N, K]."""

    kind: Literal["answer_classes"]
    input: InputSpec | None
    graph: str
    tokenizer: Tokenizer
    answers: str
    """A text file, one answer per line."""
    score: Literal["sigmoid", "softmax"]
    memory: TaskMemory


class MatchTask(Model):
    """Images and texts in one space (Radford et al. 2021, "CLIP"): classes of scenes, and retrieval.

    ``encoder`` gives ``embedding`` [N, D] of the pixels. Class scores are softmax or sigmoid of
    cosine * logit_scale + logit_bias.
    """

    input: InputSpec
    encoder: str
    text: TextEncoder
    label_prompt: str
    """``{label}`` stands for the class."""
    score: Literal["sigmoid", "softmax"]
    logit_scale: float
    logit_bias: float = 0.0
    memory: TaskMemory


AnyDetectTask = Annotated[DetectTask | OpenDetectTask, Field(discriminator="kind")]
AnyCaptionTask = Annotated[GenerateTask | GgufTask, Field(discriminator="kind")]
AnyGroundTask = Annotated[GenerateTask | GgufTask | OpenDetectTask, Field(discriminator="kind")]
AnyAskTask = Annotated[GenerateTask | GgufTask | AnswerTask, Field(discriminator="kind")]


class Tasks(Model):
    """What the bundle answers; the keys are the verbs."""

    detect: AnyDetectTask | None = None
    change: ChangeTask | None = None
    caption: AnyCaptionTask | None = None
    ask: AnyAskTask | None = None
    ground: AnyGroundTask | None = None
    classify: MatchTask | None = None
    search: MatchTask | None = None


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
    schema_version: Literal[3]
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
