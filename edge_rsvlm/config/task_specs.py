"""The tasks of a bundle, as its manifest describes them: the keys of ``Tasks`` are the verbs.

Tasks refer to graphs by name and speak of *roles* (``tiles``, ``input_ids``, ``logits``), which the manifest maps to
the graphs' own names.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from edge_rsvlm.config.inputs import InputSpec, TaskMemory, TextEncoder, Tokenizer
from edge_rsvlm.config.model import Model


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


class Likeness(Model):
    """Boxes for things that look like an example: those objects of any class of the task that resemble it most.

    ``graph`` gives ``features`` [N, D, h, w] at the cells of the task's head, from some of the task's own
    ``encoder_outputs``. The vector of a box is their mean over it, of unit length. An example has one in each of the
    eight symmetries of the square, in which its tile is seen, and a side: the root of its area in tile pixels.

    Objects are the peaks of the highest score that any of the task's ``classes`` gives a cell, from 0.01 on. The score
    of one is the greatest, over examples and symmetries, of max(cosine, 0) * exp(-0.5 * |log(side / side of the
    example)|), times its score as an object to the power of 0.1.
    """

    graph: str
    encoder_outputs: tuple[str, ...] = Field(min_length=1)
    threshold: float = Field(gt=0, lt=1)


class TextDetectTask(Model):
    """Boxes for words, or for things that look like an example, from maps of the features of one encoder.

    ``head`` gives, per cell of ``stride`` tile pixels, ``embeddings`` [N, D, h, w], ``shift`` and ``scale``
    [N, 1, h, w], and ``ltrb`` [N, 4, h, w], the distances in tile pixels from the cell's centre to the sides of its
    box. The score of a query vector q is sigmoid((cosine(embedding, q) + shift) * scale) (Minderer et al. 2022, as
    OpenDetectTask), and its peaks are objects (Zhou et al. 2019, "Objects as Points"). ``like`` says what looks like an
    example.
    """

    kind: Literal["text_heat_map"]
    input: InputSpec
    encoder: str
    head: str
    encoder_outputs: tuple[str, ...]
    text: TextEncoder
    query_prompt: str
    """``{label}`` stands for the word asked for."""
    classes: tuple[str, ...] = Field(min_length=1)
    """What is looked for when nothing is named."""
    stride: int = Field(gt=0)
    score_threshold: float = Field(gt=0, lt=1)
    nms_iou: float = Field(gt=0, lt=1)
    max_boxes_per_tile: int = Field(gt=0)
    like: Likeness
    memory: TaskMemory

    @model_validator(mode="after")
    def _likeness_needs_no_more_of_the_encoder(self) -> TextDetectTask:
        if not set(self.like.encoder_outputs) <= set(self.encoder_outputs):
            raise ValueError("like.encoder_outputs are some of the task's encoder_outputs: name them there too")
        return self


class SegmentTask(Model):
    """Masks for words: ``head`` gives ``embeddings`` [N, D, h, w] per cell of ``stride`` tile pixels, in the space of
    texts. The score of a label is sigmoid(cosine * logit_scale + logit_bias); a pixel is of its best label where that
    reaches ``threshold``, else of none."""

    input: InputSpec
    encoder: str
    head: str
    encoder_outputs: tuple[str, ...]
    text: TextEncoder
    label_prompt: str
    """``{label}`` stands for the class."""
    logit_scale: float
    logit_bias: float
    stride: int = Field(gt=0)
    threshold: float = Field(gt=0, lt=1)
    min_area_m2: float = Field(ge=0)
    min_area_px: int = Field(ge=1)
    experimental: bool = False
    """It was measured, and is not yet to be relied on: the verb says so."""
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
    min_cells: int = Field(ge=1)
    """Of the head's map, of stride² pixels of its input each: a region of fewer is what noise gives."""
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
    vocabulary: str | None = None
    """As of TextEncoder, for what is asked."""
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


class ReferTask(Model):
    """Which objects a phrase means, of those that the bundle's detect task, a TextDetectTask, finds by its own classes.

    ``graph`` reads the phrase beside a description of every object of the whole scene (``edge_rsvlm.tasks.refer``):
    ``input_ids`` and ``attention_mask`` [N, T], ``objects`` [N, C, F] and ``objects_mask`` [N, C] -> ``logits`` [N, C].
    An object is meant where the sigmoid of its logit reaches ``threshold``.
    """

    kind: Literal["refer"]
    input: InputSpec
    """That of the detect task: one pass over a scene serves both."""
    graph: str
    tokenizer: Tokenizer
    vocabulary: str | None = None
    """As of TextEncoder, for phrases."""
    threshold: float = Field(gt=0, lt=1)
    most_objects: int = Field(gt=0)
    """The surest so many are described."""
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

    ``encoder`` gives ``embedding`` [N, D] of the pixels, or ``encoder_outputs`` from which ``head`` makes it. Class
    scores are softmax or sigmoid of cosine * logit_scale + logit_bias.
    """

    input: InputSpec
    encoder: str
    encoder_outputs: tuple[str, ...] = ()
    head: str | None = None
    text: TextEncoder
    label_prompt: str
    """``{label}`` stands for the class."""
    score: Literal["sigmoid", "softmax"]
    logit_scale: float
    logit_bias: float = 0.0
    memory: TaskMemory

    @model_validator(mode="after")
    def _head_has_features(self) -> MatchTask:
        if (self.head is None) != (not self.encoder_outputs):
            raise ValueError("a head makes the embedding of encoder_outputs: name both, or neither")
        return self


AnyDetectTask = Annotated[DetectTask | OpenDetectTask | TextDetectTask, Field(discriminator="kind")]
AnyCaptionTask = Annotated[GenerateTask | GgufTask, Field(discriminator="kind")]
AnyGroundTask = Annotated[GenerateTask | GgufTask | OpenDetectTask | ReferTask, Field(discriminator="kind")]
AnyAskTask = Annotated[GenerateTask | GgufTask | AnswerTask, Field(discriminator="kind")]


class Tasks(Model):
    """What the bundle answers; the keys are the verbs. A ReferTask chooses of what a detect task by words finds."""

    detect: AnyDetectTask | None = None
    change: ChangeTask | None = None
    caption: AnyCaptionTask | None = None
    ask: AnyAskTask | None = None
    ground: AnyGroundTask | None = None
    classify: MatchTask | None = None
    segment: SegmentTask | None = None
    search: MatchTask | None = None

    @model_validator(mode="after")
    def _refers_to_objects(self) -> Tasks:
        if isinstance(self.ground, ReferTask):
            detect = self.detect
            if not isinstance(detect, TextDetectTask) or detect.input != self.ground.input:
                raise ValueError("the ground task refers to objects, and no detect task by words has its input")
        return self
